"""Find the smallest model within an allowed loss increase, by trial.

Where the loss of every size is predicted, the next share to try is where the prediction, moved by what the last trial
differed from it, meets the limit. Else it is where the power law through the nearest trials does, since the loss grows
roughly as a power of the removed share. Either is kept between the largest share that was within the limit and the
smallest that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from huggingface_hub.utils import tqdm

from hf_context_prune.errors import BudgetError

FIRST_SHARE = 0.15
"""Share of all parameters that is tried first."""
TOLERANCE = 0.005
"""Share of all parameters below which a bracket is narrow enough."""
MAX_TRIALS = 8
MAX_SEQUENTIAL_TRIALS = 4
"""Most trials where each is a sequential reconstruction."""
EXPONENT = 1.3
"""Exponent of the power law while there is only one trial."""


@dataclass(frozen=True)
class SizeTrial:
    """One size that was measured.

    Attributes:
        share: Share of all parameters that was removed.
        increase: Relative increase of the loss.
        reconstruction: Name of the reconstruction.
    """

    share: float
    increase: float
    reconstruction: str


def search_size(
    measure: Callable[[float], SizeTrial],
    limit: float,
    *,
    start: float,
    smallest: float,
    largest: float,
    max_trials: int = MAX_TRIALS,
    enough: float = 1.0,
    aim: float = 1.0,
    predict: Callable[[float], float] | None = None,
) -> tuple[SizeTrial, list[SizeTrial]]:
    """Find the largest share whose increase is within the limit.

    Args:
        measure: Removes at least the given share and measures; the trial has the share that was removed.
        limit: Allowed relative increase, above 0.
        start: Share to try first.
        smallest: Least share that can be removed; tried where no other is within the limit.
        largest: Largest share that can be removed.
        max_trials: Most measurements.
        enough: A trial within the limit that uses this part of it ends the search.
        aim: Part of the limit that the next trial aims at; below 1 where a trial above the limit is expensive.
        predict: Predicted relative increase at a share, which grows with it.

    Returns:
        (the trial to take, all trials in order).

    Raises:
        BudgetError: No trial was within the limit; the message names the smallest.
    """
    trials: list[SizeTrial] = []
    low, high = 0.0, math.inf
    asked = min(max(start, smallest), largest)
    for _ in range(4 * max_trials):  # with coarse widths, several shares may give the same trial
        trial = measure(asked)
        if trial not in trials:
            trials.append(trial)
        if trial.increase <= limit:
            low = max(low, asked, trial.share)
        else:
            high = min(high, asked)
        done = asked == smallest or (low > 0 and (low >= largest or high - low <= TOLERANCE))
        if done or len(trials) == max_trials or enough * limit <= trial.increase <= limit:
            break
        last = len(trials) == max_trials - 1
        if low == 0 and high <= TOLERANCE:
            asked = smallest
        elif predict is not None:
            # The last trial should rather be far within the limit than above it again.
            goal = aim * limit * (0.5 if last and low == 0 else 1.0)
            asked = _predicted_share(predict, trial, goal, low, min(high, largest))
        else:
            asked = _next_share(trials, limit, aim, low, high, last=last)
        asked = min(max(asked, smallest), largest)
    within = [trial for trial in trials if trial.increase <= limit]
    if not within:
        least = min(trials, key=lambda trial: trial.share)
        raise BudgetError(
            f"max_loss_increase is {limit:g}, but with {least.share:.2%} of the parameters removed, the least that was "
            f"tried, the loss on validation text grew by {least.increase:.4f} ({least.reconstruction}). Allow more, "
            f"give more calibration text, or use pruning_ratio."
        )
    return max(within, key=lambda trial: trial.share), trials


def _predicted_share(predict: Callable[[float], float], last: SizeTrial, goal: float, low: float, high: float) -> float:
    """Return the share between `low` and `high` where the prediction, moved to the last trial, meets the goal."""
    wanted = goal - (last.increase - predict(last.share))
    margin = min(0.9 * TOLERANCE, (high - low) / 2)
    return _share_at(predict, wanted, low + margin, high - margin)


def _share_at(predict: Callable[[float], float], increase: float, low: float, high: float) -> float:
    """Return the largest share between `low` and `high` whose predicted increase is below a value, by bisection."""
    while high - low > TOLERANCE / 4:
        middle = (low + high) / 2
        low, high = (middle, high) if predict(middle) < increase else (low, middle)
    return low


def _next_share(trials: list[SizeTrial], limit: float, aim: float, low: float, high: float, *, last: bool) -> float:
    """Return the share to try next, above `low` and below `high`."""
    goal = aim * limit
    below = max((t for t in trials if t.increase <= limit), key=lambda t: t.share, default=None)
    above = min((t for t in trials if t.increase > limit), key=lambda t: t.share, default=None)
    if below is None and above is not None:
        # The last trial should rather be far within the limit than above it again.
        return min(above.share * (goal * (0.5 if last else 1.0) / above.increase) ** (1 / EXPONENT), high - TOLERANCE)
    if below is not None and above is None:
        factor = (goal / below.increase) ** (1 / EXPONENT) if below.increase > 0 else 2.0
        return low * min(max(factor, 1.1), 2.5)
    assert below is not None
    assert above is not None
    margin = min(0.9 * TOLERANCE, (high - low) / 2)  # the next trial closes the bracket, or moves an end by that much
    one_sided = len(trials) > 2 and len({t.increase <= limit for t in trials[-2:]}) == 1
    if one_sided or below.increase <= 0:
        share = (low + high) / 2
    else:
        exponent = math.log(above.increase / below.increase) / math.log(above.share / below.share)
        share = low * (goal / below.increase) ** (1 / exponent)
    return min(max(share, low + margin), high - margin)


Size = TypeVar("Size", bound=Hashable)
Built = TypeVar("Built")


@dataclass(frozen=True)
class Candidate(Generic[Built]):
    """A model that was built for a share.

    Attributes:
        built: The model with what belongs to it.
        share: Share of all parameters that is gone.
        loss: Its loss on the validation text, above 0.
    """

    built: Built
    share: float
    loss: float


def find_smallest(
    limit: float,
    base_loss: float,
    *,
    sizes: Callable[[float], Size],
    build: Callable[[Size], Candidate[Built]],
    reconstruction: str,
    smallest: float,
    largest: float,
    predict: Callable[[float], float] | None = None,
) -> tuple[Built, dict[str, Any]]:
    """Build models until the smallest one is found whose loss is within a limit.

    Args:
        limit: Allowed relative increase of the loss, above 0.
        base_loss: Loss of the base model.
        sizes: A share of all parameters to the size that removes it.
        build: Builds the model of a size, and measures its loss.
        reconstruction: Name of the reconstruction; after `sequential`, which is slow, few models are built.
        smallest: As for [`search_size`][].
        largest: As for [`search_size`][].
        predict: As for [`search_size`][].

    Returns:
        (the model, limit, increase and trials as facts for the provenance).

    Raises:
        BudgetError: No model that was built is within the limit.
    """
    known: dict[Size, SizeTrial] = {}
    best: list[Candidate[Built]] = []
    is_slow = reconstruction == "sequential"
    max_trials = MAX_SEQUENTIAL_TRIALS if is_slow else MAX_TRIALS

    def measure(share: float) -> SizeTrial:
        size = sizes(share)
        if size not in known:
            found = build(size)
            trial = known[size] = SizeTrial(found.share, found.loss / base_loss - 1, reconstruction)
            if trial.increase <= limit and (not best or found.share >= best[0].share):
                best[:] = [found]
            bar.set_postfix_str(f"-{trial.share:.1%} of the parameters: {trial.increase:+.2%}")
            bar.update()
        return known[size]

    start = FIRST_SHARE if predict is None else _share_at(predict, limit, smallest, largest)
    with tqdm(total=max_trials, desc="Searching the size", unit="trial", name="hf_context_prune.loss_search") as bar:
        found, trials = search_size(
            measure,
            limit,
            start=min(max(start, smallest), largest),
            smallest=smallest,
            largest=largest,
            max_trials=max_trials,
            enough=0.85 if is_slow else 1.0,
            aim=0.92 if is_slow else 1.0,
            predict=predict,
        )
    return best[0].built, {
        "max_loss_increase": limit,
        "increase": found.increase,
        "trials": [asdict(trial) for trial in trials],
    }
