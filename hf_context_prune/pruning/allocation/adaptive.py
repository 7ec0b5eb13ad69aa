"""Budget -> widths -> plan. Pure and deterministic: no model, no data, no randomness."""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError, NumericsError
from hf_context_prune.modeling.plan import LayerPlan
from hf_context_prune.modeling.specs import Geometry, LayerWidths
from hf_context_prune.pruning.calibration.statistics import Curve, Key

Costs = Mapping[str, int]
"""Parameters a unit, by target."""


@dataclass(frozen=True)
class Budget:
    """What the config asks for, in parameters.

    Attributes:
        total_params: Parameters of the model as it is, tied ones once.
        remove_params: Parameters to remove at least; None where the unit ratios alone decide.
        asked_ratio: The share that was asked for, if one was.
    """

    total_params: int
    remove_params: int | None
    asked_ratio: float | None

    @classmethod
    def of(cls, config: PrunerConfig, total_params: int) -> Budget:
        """Read the budget of a config for a model of this size.

        Raises:
            BudgetError: `target_params` is above the model's size.
        """
        if config.target_params is not None:
            if config.target_params > total_params:
                raise BudgetError(
                    f"target_params is {config.target_params:,}, but the model has only {total_params:,} parameters; "
                    f"ask for fewer."
                )
            remove = total_params - config.target_params
            return cls(total_params, remove, remove / total_params)
        if config.pruning_ratio is not None:
            # Rounded up, so that at least the asked share goes; the slack forgives 0.2 * 5 = 1.0000000000000002.
            remove = -int(-(config.pruning_ratio * total_params - max(1e-6, 4e-16 * total_params)) // 1)
            return cls(total_params, remove, config.pruning_ratio)
        return cls(total_params, None, None)


def round_half_up(value: float) -> int:
    """Nearest integer, halves up (and not to even, so that ratios act the same at every width)."""
    return int(value + 0.5 + 1e-9)


def _kept(width: int, ratio: float, multiple: int) -> int:
    kept = width - round_half_up(width * ratio)
    return width if kept == width else max(min(multiple, width), kept - kept % multiple)


def _kept_groups(groups: int, ratio: float, allowed: Collection[int]) -> int:
    kept = max(1, groups - round_half_up(groups * ratio))
    if ratio > 0 and kept == groups > 1:
        reachable = ", ".join(f"{(groups - n) / groups:.3f}" for n in range(groups, 0, -1))
        raise BudgetError(
            f"attention_ratio is {ratio}, which removes no KV group: the layers have {groups}, of which one must stay, "
            f"so {reachable} can be reached."
        )
    fitting = [n for n in allowed if n <= kept]
    if not fitting:
        raise BudgetError(
            f"attention_ratio {ratio} leaves {kept} of {groups} KV groups, which the stock architecture can't hold; "
            f"it can hold {', '.join(map(str, sorted(allowed)))}. Ask for one of those, or leave out --stock."
        )
    return max(fitting)


def removed_params(dense: Sequence[LayerWidths], widths: Sequence[LayerWidths], costs: Costs) -> int:
    """Parameters that go when the layers shrink from `dense` to `widths`."""
    return sum(
        costs["mlp"] * (a.neurons - b.neurons) + costs["attention"] * (a.kv_groups - b.kv_groups)
        for a, b in zip(dense, widths, strict=True)
    )


def uniform_widths(
    geometry: Geometry, costs: Costs, budget: Budget, config: PrunerConfig, *, stock_groups: Collection[int] = ()
) -> tuple[LayerWidths, ...]:
    """The same share of every layer.

    Args:
        geometry: Sizes of the model.
        costs: Parameters a unit.
        budget: What is asked for.
        config: Ratios and rounding.
        stock_groups: KV groups a layer that the stock architecture accepts; empty where that does not matter.

    Returns:
        Widths, one a layer. A share of all parameters is met or exceeded by less than one step of the widths.

    Raises:
        BudgetError: It can't be reached; names the maximum that can.
    """
    dense, multiple = geometry.layers, config.round_to
    groups = [layer.kv_groups for layer in dense]
    if config.attention_ratio is not None:
        if config.attention_ratio > 0 and max(groups) == 1:
            raise BudgetError(
                f"attention_ratio is {config.attention_ratio}, but every layer has a single KV group, which must stay. "
                f"Leave attention_ratio out; the MLP neurons can go."
            )
        groups = [_kept_groups(n, config.attention_ratio, stock_groups or range(1, n + 1)) for n in groups]
    neurons = [layer.neurons for layer in dense]
    if config.mlp_ratio is not None:
        neurons = [_kept(n, config.mlp_ratio, multiple) for n in neurons]
        if config.mlp_ratio > 0 and neurons == [layer.neurons for layer in dense]:
            widest = max(neurons)
            raise BudgetError(
                f"mlp_ratio is {config.mlp_ratio}, which removes no neuron: the layers have {widest}, and round_to is "
                f"{multiple}. Ask for at least {math.ceil(1e6 / widest) / 1e6}, with round_to below {widest}."
            )
    widths = _zip(neurons, groups)
    if budget.remove_params is None:
        return widths
    if config.mlp_ratio is None:
        widest = max(layer.neurons for layer in dense)
        steps = range(widest, 0, -1)

        def widths_at(step: int) -> tuple[LayerWidths, ...]:
            return _zip([_kept(layer.neurons, 1 - step / widest, multiple) for layer in dense], groups)
    else:
        most = max(layer.kv_groups for layer in dense)
        steps = range(most, 0, -1)
        if stock_groups:
            steps = [step for step in steps if step in {*stock_groups, most}]  # type: ignore[assignment]

        def widths_at(step: int) -> tuple[LayerWidths, ...]:
            kept = [max(1, layer.kv_groups - round_half_up(layer.kv_groups * (1 - step / most))) for layer in dense]
            return _zip(neurons, kept)

    def removed_at(step: int) -> int:
        return removed_params(dense, widths_at(step), costs)

    if removed_at(steps[0]) > budget.remove_params:
        raise BudgetError(
            f"The unit ratio alone removes {removed_at(steps[0]):,} parameters, more than the {budget.remove_params:,} "
            f"asked for by pruning_ratio/target_params. Lower the unit's ratio, or leave one of the two out."
        )
    position = bisect.bisect_left(steps, budget.remove_params, key=removed_at)
    if position == len(steps):
        _refuse(budget, dense, widths_at(steps[-1]), costs, config, min(stock_groups, default=1))
    return widths_at(steps[position])


def _zip(neurons: Sequence[int], groups: Sequence[int]) -> tuple[LayerWidths, ...]:
    return tuple(LayerWidths(a, b) for a, b in zip(neurons, groups, strict=True))


def _refuse(
    budget: Budget,
    dense: Sequence[LayerWidths],
    smallest: Sequence[LayerWidths],
    costs: Costs,
    config: PrunerConfig,
    fewest_groups: int,
) -> None:
    reachable = removed_params(dense, smallest, costs)
    everything = removed_params(
        dense, [LayerWidths(min(config.round_to, w.neurons), min(fewest_groups, w.kv_groups)) for w in dense], costs
    )
    more = (
        f" With --attention-ratio as well, up to {_share_below(everything, budget.total_params)} can."
        if config.mlp_ratio is None and config.attention_ratio is None and everything > reachable
        else ""
    )
    if config.round_to > 1 and config.mlp_ratio is None:
        more += f" MLP widths stay multiples of round_to={config.round_to}; with a smaller one, more can go."
    raise BudgetError(
        f"Asked to remove {budget.remove_params:,} of {budget.total_params:,} parameters "
        f"({(budget.remove_params or 0) / budget.total_params:.4f}); these options can remove at most {reachable:,} "
        f"({_share_below(reachable, budget.total_params)}).{more}"
    )


def _share_below(part: int, total: int) -> str:
    """A share with four digits, rounded down: asking for it must work."""
    return f"{part * 10_000 // total / 10_000:.4f}"


_BETWEEN = 8
"""Widths between two measured ones at which the power law stands in."""


def _densified(curve: Curve) -> Curve:
    """A curve with points between its measured ones, on the power law (loss ~ units gone^p) through neighbours.

    Losses start flat and grow ever faster, so straight lines between few points would call the first units dearer than
    they are, and make every layer end at a measured width.
    """
    total = curve[0][0]
    points = [(total - kept, loss) for kept, loss in curve[1:]]
    result = [curve[0]]
    before = 0
    for index, (gone, loss) in enumerate(points):
        left, right = (points[index - 1], points[index]) if index else (points[0], points[min(1, len(points) - 1)])
        if 0 < left[1] < right[1] and left[0] < right[0]:
            exponent = math.log(right[1] / left[1]) / math.log(right[0] / left[0])
            between = sorted({round(before + (gone - before) * i / (_BETWEEN + 1)) for i in range(1, _BETWEEN + 1)})
            result += [(total - x, loss * (x / gone) ** exponent) for x in between if before < x < gone]
        result.append((total - gone, loss))
        before = gone
    return tuple(result)


def _lower_hull(curve: Curve) -> list[tuple[int, float]]:
    """Lower convex hull of a curve as (units gone, loss increase), widest first; losses below 0 count as free."""
    hull: list[tuple[int, float]] = []
    for kept, increase in _densified(curve):
        point = (curve[0][0] - kept, max(increase, 0.0))
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _steps(curve: Curve, multiple: int) -> list[tuple[float, int]]:
    """Steps from one allowed width to the next on a curve's lower hull, widest first, as (loss, units).

    Allowed are the whole width and the multiples of `multiple` down to the smallest measured width.
    """
    total, smallest = curve[0][0], curve[-1][0]
    gone = [0, *(total - kept for kept in range((total - 1) // multiple * multiple, max(smallest, 1) - 1, -multiple))]
    losses = _on_hull(curve, gone)
    return [(b - a, y - x) for (a, b), (x, y) in zip(pairwise(losses), pairwise(gone), strict=True)]


def _on_hull(curve: Curve, gone: Sequence[int]) -> list[float]:
    """Losses on a curve's lower hull at these numbers of removed units."""
    hull = _lower_hull(curve)
    return list(map(float, np.interp(gone, [units for units, _ in hull], [loss for _, loss in hull])))


def _runs(steps: Sequence[tuple[float, int]]) -> list[tuple[float, int, int]]:
    """Neighbouring steps that are alike but for rounding, as (loss a step, units a step, steps)."""
    runs: list[tuple[float, int, int]] = []
    for loss, units in steps:
        if runs and runs[-1][1] == units and math.isclose(loss, runs[-1][0], rel_tol=1e-9):
            runs[-1] = (runs[-1][0], units, runs[-1][2] + 1)
        else:
            runs.append((loss, units, 1))
    return runs


def _cheapest(steps: Mapping[Key, Sequence[tuple[float, int]]], costs: Costs, remove_params: int) -> dict[Key, int]:
    """How many steps each curve takes, so that at least `remove_params` go for the least sum of losses: exact.

    An integer program with one variable a run of equal steps. Within a curve losses a unit only grow, so its steps are
    taken in order by themselves, but for a first step of another size (a width that is no multiple of `round_to`).
    """
    runs = {key: _runs(own) for key, own in steps.items()}
    flat = [(key, *run) for key, own in runs.items() for run in own]
    if remove_params <= 0 or not flat:
        return dict.fromkeys(steps, 0)
    sizes = [units * costs[key[1]] for key, _, units, _ in flat]
    unit = math.gcd(*sizes)
    counts, losses = np.array([run[3] for run in flat]), np.array([run[1] for run in flat])
    # HiGHS stops at an absolute gap of 1e-6: of a sum of 1e6, that is nothing.
    scale = 1e6 / float(losses @ counts) if losses.any() else 1.0
    rows, lowest = [np.array([size // unit for size in sizes], float)], [float(-(-remove_params // unit))]
    first = 0
    for run in runs.values():
        for later in range(first + 1, first + len(run)) if len(run) > 1 and run[0][1] != run[1][1] else ():
            row = np.zeros(len(flat))
            row[first], row[later] = counts[later], -1.0
            rows.append(row)
            lowest.append(0.0)
        first += len(run)
    result = milp(
        losses * scale,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, counts),
        constraints=LinearConstraint(np.array(rows), lb=lowest),
        options={"mip_rel_gap": 0},
    )
    if result.x is None:
        raise NumericsError(f"The widths could not be solved for: {result.message} Use --allocation uniform.")
    taken = dict.fromkeys(steps, 0)
    for (key, *_), count in zip(flat, np.rint(result.x).astype(int).tolist(), strict=True):
        taken[key] += count
    spare = sum(units * costs[key[1]] for key, own in steps.items() for _, units in own[: taken[key]]) - remove_params
    if spare < 0:  # rounding within the solver's tolerance
        return _cheapest(steps, costs, remove_params - spare)
    for key, own in steps.items():  # steps that cost nothing may have been taken without need
        while taken[key] and (size := own[taken[key] - 1][1] * costs[key[1]]) <= spare:
            taken[key] -= 1
            spare -= size
    return taken


def _allowed_steps(curves: Mapping[Key, Curve], round_to: int) -> dict[Key, list[tuple[float, int]]]:
    return {key: _steps(curve, round_to if key[1] == "mlp" else 1) for key, curve in sorted(curves.items())}


def most_removable(curves: Mapping[Key, Curve], costs: Costs, *, round_to: int = 1) -> int:
    """Parameters that [`adaptive_widths`][] can remove at most with these curves."""
    return sum(
        units * costs[target] for (_, target), own in _allowed_steps(curves, round_to).items() for _, units in own
    )


def adaptive_widths(
    curves: Mapping[Key, Curve], geometry: Geometry, costs: Costs, remove_params: int, *, round_to: int = 1
) -> tuple[LayerWidths, ...]:
    """Spend a budget where it costs the least loss.

    The surrogate is additive over layers and convex within each (lower hull of the measured points, losses below 0
    count as free). The widths are those of its least sum, exactly, although units differ in size.

    Args:
        curves: Measured loss increase by kept units, for every (layer, target) that may lose units.
        geometry: Sizes of the model.
        costs: Parameters a unit.
        remove_params: Parameters to remove at least.
        round_to: MLP widths stay multiples of this number.

    Raises:
        BudgetError: The curves do not reach that far; names the maximum.
    """
    steps = _allowed_steps(curves, round_to)
    most = most_removable(curves, costs, round_to=round_to)
    if remove_params > most:
        raise beyond_probes(remove_params, most)
    taken = _cheapest(steps, costs, remove_params)
    gone = {key: sum(units for _, units in own[: taken[key]]) for key, own in steps.items()}
    return tuple(
        LayerWidths(dense.neurons - gone.get((layer, "mlp"), 0), dense.kv_groups - gone.get((layer, "attention"), 0))
        for layer, dense in enumerate(geometry.layers)
    )


def beyond_probes(remove_params: int, most: int, total: int | None = None) -> BudgetError:
    """The error of a budget that adaptive widths can't reach; with the model's parameters, it names a share that is."""
    share = "" if total is None else f" ({_share_below(most, total)} of all)"
    return BudgetError(
        f"Asked to remove {remove_params:,} parameters; adaptive widths can remove at most {most:,}{share}, since no "
        f"layer is narrowed below its smallest probed width. Ask for less, let tokens go too (--vocab-size), or fix "
        f"both shares (--mlp-ratio, --attention-ratio, --allocation uniform), which reach further."
    )


def predicted_loss(curves: Mapping[Key, Curve], widths: Sequence[LayerWidths]) -> float:
    """What the surrogate of [`adaptive_widths`][] says that these widths cost, in the unit of the curves."""
    kept = {key: widths[key[0]].neurons if key[1] == "mlp" else widths[key[0]].kv_groups for key in curves}
    return sum(_on_hull(curve, [curve[0][0] - kept[key]])[0] for key, curve in curves.items())


def select_units(
    importance: Mapping[Key, torch.Tensor], geometry: Geometry, widths: Sequence[LayerWidths]
) -> tuple[LayerPlan, ...]:
    """Keep the most important units of every layer; of equals, the lower index.

    Args:
        importance: One value a unit, [units], for every (layer, target) that loses units.
        geometry: Sizes of the model.
        widths: Units to keep, one entry a layer.

    Raises:
        NumericsError: An importance is NaN or Inf.
    """
    layers = []
    for index, (dense, width) in enumerate(zip(geometry.layers, widths, strict=True)):
        kept = {}
        for target, total, count in (
            ("mlp", dense.neurons, width.neurons),
            ("attention", dense.kv_groups, width.kv_groups),
        ):
            if count == total:
                kept[target] = tuple(range(total))
                continue
            scores = importance[index, target]
            if not bool(torch.isfinite(scores).all()):
                raise NumericsError(f"The importance of layer {index} ({target}) holds NaN or Inf; nothing was chosen.")
            order = scores.argsort(descending=True, stable=True)[:count]
            kept[target] = tuple(sorted(order.tolist()))
        layers.append(LayerPlan(kept["mlp"], kept["attention"]))
    return tuple(layers)
