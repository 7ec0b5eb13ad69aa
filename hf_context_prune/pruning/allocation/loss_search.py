"""Find the smallest model within an allowed loss increase, by trial.

The loss grows roughly as a power of the removed share, so the next share to try is where the power law through the
nearest trials meets the limit, kept between the largest share that was within the limit and the smallest that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.specs import LayerWidths
from hf_context_prune.pruning.surgery import ReconstructFn, apply_plan
from hf_context_prune.utils.distributed import on_main_process

Loss = Callable[[PreTrainedModel], float]

FIRST_SHARE = 0.15
"""Share of all parameters that is tried first."""
TOLERANCE = 0.005
"""Share of all parameters below which a bracket is narrow enough."""
MAX_TRIALS = 8
MAX_SEQUENTIAL_RUNS = 3
"""Most sequential runs that refine a size."""
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
        asked = smallest if low == 0 and high <= TOLERANCE else _next_share(trials, limit, aim, low, high, last=last)
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


Widths = Callable[[PrunerConfig], tuple[LayerWidths, ...]]
"""A config with a size to the widths of that size."""
Build = Callable[[PrunerConfig], tuple[PruningPlan, ReconstructFn]]
"""A config with a size to the plan of that size and its reconstruction."""


class _SizeTrials:
    """Sizes that were built and measured; keeps the smallest model's plan and reconstruction within the limit."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: PrunerConfig,
        loss: Loss,
        base: float,
        *,
        widths: Widths,
        build: Build,
        reconstruction: str,
        max_trials: int,
    ) -> None:
        self.model, self.config, self.loss, self.base = model, config, loss, base
        self.widths, self.build, self.reconstruction, self.max_trials = widths, build, reconstruction, max_trials
        self.known: dict[tuple[LayerWidths, ...], SizeTrial] = {}
        self.best: tuple[PruningPlan, ReconstructFn] | None = None
        self.best_share = 0.0

    def search(self, start: float, largest: float, **options: float) -> tuple[SizeTrial, list[SizeTrial]]:
        """Search from a share of the parameters on, with a progress bar."""
        limit, total = self.config.max_loss_increase, self.model.num_parameters()
        assert limit is not None
        name = "hf_context_prune.loss_search"
        with tqdm(total=self.max_trials, desc="Searching the size", unit="trial", name=name) as self.bar:
            return search_size(
                self.measure,
                limit,
                start=start,
                smallest=1 / total,
                largest=largest,
                max_trials=self.max_trials,
                **options,
            )

    def measure(self, share: float) -> SizeTrial:
        """Build the model without a share of the parameters, and measure how much its loss grew."""
        config = replace(self.config, max_loss_increase=None, pruning_ratio=share)
        widths = self.widths(config)
        if widths in self.known:
            return self.known[widths]
        plan, reconstruct = self.build(config)
        smaller = apply_plan(self.model, plan, reconstruct=reconstruct).eval()
        total = self.model.num_parameters()
        gone = (total - smaller.num_parameters()) / total
        increase = on_main_process(lambda: self.loss(smaller)) / self.base - 1
        trial = self.known[widths] = SizeTrial(gone, increase, self.reconstruction)
        if increase <= (self.config.max_loss_increase or 0) and gone >= self.best_share:
            self.best, self.best_share = (plan, reconstruct), gone
        self.bar.set_postfix_str(f"-{gone:.1%} of the parameters: {increase:+.2%}")
        self.bar.update()
        return trial


def smallest_within(
    model: PreTrainedModel,
    config: PrunerConfig,
    loss: Loss,
    *,
    base_loss: float | None = None,
    most_removable: int,
    widths: Widths,
    one_shot: Build,
    sequential: Build,
) -> tuple[PruningPlan, ReconstructFn]:
    """Find the smallest model whose loss is within `max_loss_increase`.

    Sequential reconstruction is slow, so `least_squares` finds an approximate size first, and at most
    `MAX_SEQUENTIAL_RUNS` sequential runs refine it.

    Args:
        model: The base model.
        config: With `max_loss_increase`.
        loss: Loss of a model on validation text, above 0.
        base_loss: Loss that the increase is measured against; None: the loss of `model`.
        most_removable: Parameters that can be removed at most.
        widths: Gives the widths of a size.
        one_shot: Builds a size from the statistics of one pass.
        sequential: Builds a size by sequential reconstruction; `one_shot` is not called after it.

    Returns:
        Plan and reconstruction; the plan's provenance has ``loss_budget``: limit, increase and trials.

    Raises:
        BudgetError: No size that was tried is within the limit.
    """
    if not most_removable:
        raise BudgetError(
            f"Nothing can be removed: MLP widths stay multiples of round_to={config.round_to}, and the layers are no "
            f"wider. Give a smaller round_to."
        )
    largest = most_removable / model.num_parameters()
    base = on_main_process(lambda: loss(model)) if base_loss is None else base_loss
    trials_of = partial(_SizeTrials, model, config, loss, base, widths=widths)
    is_sequential = config.reconstruction == "sequential"
    approximate = "least_squares" if is_sequential else config.reconstruction
    stage = trials_of(build=one_shot, reconstruction=approximate, max_trials=MAX_TRIALS)
    found, trials = stage.search(min(FIRST_SHARE, largest / 2), largest)
    if is_sequential:
        stage = trials_of(build=sequential, reconstruction="sequential", max_trials=MAX_SEQUENTIAL_RUNS)
        found, more = stage.search(found.share, largest, enough=0.8, aim=0.92)
        trials = trials + more
    assert stage.best is not None  # `search_size` raises where no size is within the limit
    plan, reconstruct = stage.best
    facts = {
        "max_loss_increase": config.max_loss_increase,
        "increase": found.increase,
        "trials": [asdict(trial) for trial in trials],
    }
    return replace(plan, provenance={**plan.provenance, "config": config.to_dict(), "loss_budget": facts}), reconstruct
