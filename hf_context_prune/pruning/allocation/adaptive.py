"""Adaptive widths: measured curves + budget -> widths. Pure and deterministic: no model, no data, no randomness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from hf_context_prune.errors import NumericsError
from hf_context_prune.modeling.geometry import Geometry, LayerWidths
from hf_context_prune.pruning.calibration.statistics import Key

from .budget import Costs, Curve, beyond_probes

Multiples = Mapping[str, int]
"""What counts stay multiples of, by target."""
_GAP = 1e-4
"""Share of the predicted loss by which sizes may miss the optimum. To prove the last digits, the solver needed minutes
and gigabytes for some curves; predictions are far less exact than this."""
_BETWEEN = 8
"""Number of widths between two measured ones that the power law fills in."""


def _densify(curve: Curve) -> Curve:
    """Add points between the measured ones of a curve, on the power law (loss ~ units gone^p) through neighbours.

    Losses start flat and grow ever faster, so straight lines between few points would overestimate the cost of the
    first units, and make every layer end at a measured width.
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
    """Return the lower convex hull of a curve as (units gone, loss increase), widest first; losses below 0 are free."""
    hull: list[tuple[int, float]] = []
    for kept, increase in _densify(curve):
        point = (curve[0][0] - kept, max(increase, 0.0))
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _steps(curve: Curve, multiple: int) -> list[tuple[float, int]]:
    """Return the steps from one allowed width to the next on a curve's lower hull, widest first, as (loss, units).

    Allowed are the whole width and the multiples of `multiple` down to the smallest measured width.
    """
    total, smallest = curve[0][0], curve[-1][0]
    gone = [0, *(total - kept for kept in range((total - 1) // multiple * multiple, max(smallest, 1) - 1, -multiple))]
    losses = loss_on_hull(curve, gone)
    return [(b - a, y - x) for (a, b), (x, y) in zip(pairwise(losses), pairwise(gone), strict=True)]


def loss_on_hull(curve: Curve, gone: Sequence[int]) -> list[float]:
    """Return the losses on a curve's lower hull at these numbers of removed units."""
    hull = _lower_hull(curve)
    return list(map(float, np.interp(gone, [units for units, _ in hull], [loss for _, loss in hull])))


def _runs(steps: Sequence[tuple[float, int]]) -> list[tuple[float, int, int]]:
    """Group neighbouring steps that are equal up to rounding, as (loss per step, units per step, steps)."""
    runs: list[tuple[float, int, int]] = []
    for loss, units in steps:
        if runs and runs[-1][1] == units and math.isclose(loss, runs[-1][0], rel_tol=1e-9):
            runs[-1] = (runs[-1][0], units, runs[-1][2] + 1)
        else:
            runs.append((loss, units, 1))
    return runs


def _take_cheapest(
    steps: Mapping[Key, Sequence[tuple[float, int]]], costs: Costs, remove_params: int
) -> dict[Key, int]:
    """Return how many steps each curve takes to remove at least `remove_params` for the least loss, up to `_GAP`.

    An integer program with one variable per run of equal steps. Within a curve the loss per unit only grows, so steps
    are taken in order without a constraint, except for a first step of another size (a width that is no multiple of
    `round_to`).
    """
    runs = {key: _runs(own) for key, own in steps.items()}
    flat = [(key, *run) for key, own in runs.items() for run in own]
    if remove_params <= 0 or not flat:
        return dict.fromkeys(steps, 0)
    sizes = [units * costs[key[1]] for key, _, units, _ in flat]
    unit = math.gcd(*sizes)
    counts, losses = np.array([run[3] for run in flat]), np.array([run[1] for run in flat])
    # HiGHS stops at an absolute gap of 1e-6, which is negligible in a sum of 1e6.
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
        options={"mip_rel_gap": _GAP},
    )
    if result.x is None:
        raise NumericsError(f"The widths could not be solved for: {result.message} Use --allocation uniform.")
    taken = dict.fromkeys(steps, 0)
    for (key, *_), count in zip(flat, np.rint(result.x).astype(int).tolist(), strict=True):
        taken[key] += count
    spare = sum(units * costs[key[1]] for key, own in steps.items() for _, units in own[: taken[key]]) - remove_params
    if spare < 0:  # rounding within the solver's tolerance
        return _take_cheapest(steps, costs, remove_params - spare)
    for key, own in steps.items():  # steps without loss may have been taken without need
        while taken[key] and (size := own[taken[key] - 1][1] * costs[key[1]]) <= spare:
            taken[key] -= 1
            spare -= size
    return taken


def most_removable(curves: Mapping[Key, Curve], costs: Costs, multiples: Multiples) -> int:
    """Return the most parameters that [`cheapest_counts`][] can remove with these curves."""
    total = 0
    for (_, target), curve in curves.items():
        multiple, dense = multiples.get(target, 1), curve[0][0]
        narrowest = -(-max(curve[-1][0], 1) // multiple) * multiple
        total += max(0, dense - narrowest) * costs[target]
    return total


def cheapest_counts(
    curves: Mapping[Key, Curve], costs: Costs, multiples: Multiples, remove_params: int
) -> dict[Key, int]:
    """Return how many units to keep of each curve to remove a budget for the least predicted loss.

    The surrogate is additive over curves and convex within each (lower hull of the measured points, losses below 0 are
    free). The counts minimise its sum up to a share of `_GAP`, although units differ in size.

    Args:
        curves: Measured loss increase by kept units.
        costs: Parameters per unit, by target.
        multiples: Counts below the whole stay multiples of these, by target; 1 where a target is missing.
        remove_params: Parameters to remove at least.

    Raises:
        BudgetError: The curves do not reach that far; the message names the maximum.
    """
    most = most_removable(curves, costs, multiples)
    if remove_params > most:
        raise beyond_probes(remove_params, most)
    steps = {key: _steps(curve, multiples.get(key[1], 1)) for key, curve in sorted(curves.items())}
    taken = _take_cheapest(steps, costs, remove_params)
    return {key: curves[key][0][0] - sum(units for _, units in own[: taken[key]]) for key, own in steps.items()}


def adaptive_widths(
    curves: Mapping[Key, Curve], geometry: Geometry, costs: Costs, remove_params: int, *, round_to: int = 1
) -> tuple[LayerWidths, ...]:
    """Return the widths that remove a budget for the least predicted loss; see [`cheapest_counts`][].

    Args:
        curves: Measured loss increase by kept units, for every (layer, target) that may lose units.
        geometry: Sizes of the model.
        costs: Parameters per unit, by target.
        remove_params: Parameters to remove at least.
        round_to: MLP widths stay multiples of this number.

    Raises:
        BudgetError: The curves do not reach that far; the message names the maximum.
    """
    return widths_of(cheapest_counts(curves, costs, {"mlp": round_to}, remove_params), geometry)


def widths_of(counts: Mapping[Key, int], geometry: Geometry) -> tuple[LayerWidths, ...]:
    """Return kept units by (layer, target) as widths; units without a count all stay."""
    return tuple(
        replace(
            base,
            neurons=counts.get((layer, "mlp"), base.neurons),
            kv_groups=counts.get((layer, "attention"), base.kv_groups),
        )
        for layer, base in enumerate(geometry.layers)
    )


def predicted_loss(curves: Mapping[Key, Curve], widths: Sequence[LayerWidths]) -> float:
    """Return the loss that the surrogate of [`adaptive_widths`][] predicts for these widths, in the curves' unit."""
    return sum(
        loss_on_hull(curve, [curve[0][0] - widths[layer].of(target)])[0] for (layer, target), curve in curves.items()
    )
