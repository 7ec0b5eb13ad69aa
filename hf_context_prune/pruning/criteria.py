"""Importance criteria: pure functions from (weights, statistics, generator) to one score per unit; higher is kept.

To add one, write a function here and decorate it with `@criterion(name, needs=...)`; CONTRIBUTING.md has the recipe.
Scores are compared within a layer; the allocation compares layers.

Notation: X [tokens, in_features] are the inputs of the output projection W [out_features, in_features], G = X^T X.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_context_prune.config import DEFAULT_RIDGE
from hf_context_prune.errors import ConfigError, NumericsError, unknown_name
from hf_context_prune.pruning.calibration.statistics import TargetStatistics, TargetWeights
from hf_context_prune.utils.linalg import RowSystem, add_ridge_, cholesky, invert_spd_

_LEAST_SHARE = 1e-5
"""Least share of a feature that others don't predict, where it is a difference of float32 sums."""
CriterionFunction = Callable[[TargetWeights, TargetStatistics, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Criterion:
    """A named criterion.

    Attributes:
        name: Its name in options and tables.
        function: (weights, statistics, generator) to importance [units], float64.
        needs: Optional statistics that it reads: ``"gram"``, ``"taylor"``.
    """

    name: str
    function: CriterionFunction
    needs: frozenset[str]


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, *, needs: frozenset[str] = frozenset()) -> Callable[[CriterionFunction], CriterionFunction]:
    """Register a criterion under a name."""

    def register(function: CriterionFunction) -> CriterionFunction:
        CRITERIA[name] = Criterion(name, function, needs)
        return function

    return register


def get_criterion(name: str) -> Criterion:
    """Look up a criterion.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in CRITERIA:
        raise ConfigError(unknown_name("criterion", name, CRITERIA))
    return CRITERIA[name]


@criterion("random")
def random(weights: TargetWeights, statistics: TargetStatistics, generator: torch.Generator) -> torch.Tensor:
    """Return uniform random scores: the floor that every criterion must beat."""
    return torch.rand(weights.num_units, generator=generator, dtype=torch.float64)


@criterion("magnitude")
def magnitude(weights: TargetWeights, statistics: TargetStatistics, generator: torch.Generator) -> torch.Tensor:
    """Return the sum of |w| over all weights of the unit, in input and output projections alike; sees no data."""
    return weights.input_magnitude + weights.per_unit(weights.output.double().abs().sum(dim=0))


@criterion("l1")
def l1(weights: TargetWeights, statistics: TargetStatistics, generator: torch.Generator) -> torch.Tensor:
    """Return mean |x| over tokens: the rule of contextual pruning (Mini-GPTs, arXiv 2312.12682)."""
    return weights.per_unit(statistics.sum_abs / statistics.num_tokens) / weights.unit_size


@criterion("wanda")
def wanda(weights: TargetWeights, statistics: TargetStatistics, generator: torch.Generator) -> torch.Tensor:
    """Return sqrt(sum x_j^2) * |W_:,j|_2, summed over the unit: Wanda (arXiv 2306.11695, Eq. 1) on whole columns."""
    norms = statistics.sum_squares.clamp_min(0).sqrt()
    return weights.per_unit(norms * weights.output.double().norm(dim=0))


@criterion("flap")
def flap(weights: TargetWeights, statistics: TargetStatistics, generator: torch.Generator) -> torch.Tensor:
    """Return Var(x_j) * |W_:,j|_2^2, summed over the unit: FLAP (arXiv 2312.11983, Eq. 4)."""
    return weights.per_unit(statistics.variance * weights.output.double().square().sum(dim=0))


@criterion("taylor", needs=frozenset({"taylor"}))
def taylor(weights: TargetWeights, statistics: TargetStatistics, generator: torch.Generator) -> torch.Tensor:
    """Return the sum of |w * dL/dw| over the unit: element-wise Taylor of LLM-Pruner (arXiv 2305.11627, Eq. 4)."""
    if statistics.taylor is None:
        raise ConfigError("The taylor criterion needs gradients; calibrate with statistics={'taylor'}.")
    return statistics.taylor


@criterion("obs", needs=frozenset({"gram"}))
def obs(weights: TargetWeights, statistics: TargetStatistics, generator: torch.Generator) -> torch.Tensor:
    """Return the removal order of the structured optimal brain surgeon (Hassibi & Stork 1993, columns, in batches).

    The unit with the least error after an optimal update of all other columns is removed first. The error is
    tr(W_u ([G^-1]_uu)^-1 W_u^T), with the rows of W as they reach the residual stream (times gamma where a norm is
    behind the projection). After every batch the weights and G^-1 are updated, so later scores see earlier removals.
    The result is the rank of removal, not an error: one order serves every budget.

    Returns:
        Rank of each unit, [units], float64: 0 is removed first. Of the `least_kept` best, some share the last rank.

    Raises:
        NumericsError: W is not finite, or G is zero or singular in spite of the ridge.
    """
    size, units = weights.unit_size, weights.num_units
    if not bool(torch.isfinite(weights.output).all()):  # the ranks would be finite, and hide it
        raise NumericsError("The output weight of a layer holds NaN or Inf, so its units can't be ranked.")
    # With a bias the mean of the removed inputs costs nothing, as in the reconstruction.
    output = weights.output.double() * (1.0 if weights.channel_scale is None else weights.channel_scale.double())
    if statistics.rows is not None:
        return _obs_by_rows(weights, output, statistics.rows, statistics.mean if weights.has_bias else None)
    inverse = invert_spd_(add_ridge_(statistics.second_moment(centred=weights.has_bias), DEFAULT_RIDGE))
    alive = torch.arange(units)
    here = torch.ones(units, dtype=torch.bool)  # which of `alive` are not yet removed
    rank = torch.full((units,), units, dtype=torch.float64)
    removed = 0
    while removed < units - weights.least_kept:
        score = _obs_scores(output, inverse, size, here)
        batch = score.argsort(stable=True)[: _batch_size(units - removed)]
        rank[alive[batch]] = torch.arange(removed, removed + len(batch), dtype=torch.float64)
        removed += len(batch)
        here[batch] = False
        _obs_remove(output, inverse, (batch[:, None] * size + torch.arange(size)).flatten())
        if 2 * (units - removed) <= len(alive):  # compact now and then: at every step, the copies would cost the most
            features = here.nonzero() * size + torch.arange(size)
            output = output.index_select(1, features.flatten())
            inverse = inverse.index_select(0, features.flatten()).index_select(1, features.flatten())
            alive, here = alive[here], here[here]
    return rank


def _batch_size(left: int) -> int:
    """Return a sixteenth of the remaining units, at least one: fine where it matters, and few updates in all."""
    return max(1, left // 16)


def _obs_by_rows(
    weights: TargetWeights, output: torch.Tensor, rows: torch.Tensor, mean: torch.Tensor | None
) -> torch.Tensor:
    """Return what [`obs`][] does, for fewer rows X of inputs than features: no matrix has the size of G.

    With Z and Delta of [`RowSystem`][], lambda the ridge, L L^T = Z Z^T + lambda I over the remaining features and
    V = L^-1 Z, the blocks of the inverse are [G^-1]_uu = Delta_u^-1/2 (I - V_u^T V_u) Delta_u^-1/2 / lambda. By the
    block inverse, the update of the other columns is the regression of X_P W_P^T on them.

    Args:
        weights: The units.
        output: W as it reaches the residual stream, [out_features, in_features], float64; changes.
        rows: X, [tokens, in_features], float32.
        mean: Of X, where a bias takes it up; else None.
    """
    size, units = weights.unit_size, weights.num_units
    system = RowSystem(rows, mean)
    scaled = system.scale * DEFAULT_RIDGE**0.5
    here, products = torch.ones(units, dtype=torch.bool), system.products
    rank = torch.full((units,), units, dtype=torch.float64)
    removed = 0
    factor = system.factor(products, DEFAULT_RIDGE)
    while removed < units - weights.least_kept:
        alive = here.nonzero().squeeze(1)
        features = (alive[:, None] * size + torch.arange(size)).flatten()
        narrow = torch.linalg.solve_triangular(factor.float(), system.rows[:, features], upper=False)
        parts = narrow.view(len(narrow), len(alive), size).transpose(0, 1)
        blocks = torch.eye(size, dtype=torch.float64) - (parts.mT @ parts).double()
        blocks.diagonal(dim1=1, dim2=2).clamp_min_(_LEAST_SHARE)
        score = _score_blocks((output * scaled)[:, features], blocks)
        batch = alive[score.argsort(stable=True)[: _batch_size(units - removed)]]
        rank[batch] = torch.arange(removed, removed + len(batch), dtype=torch.float64)
        removed += len(batch)
        here[batch] = False
        if removed == units:
            break
        gone = (batch[:, None] * size + torch.arange(size)).flatten()
        left = (here.nonzero() * size + torch.arange(size)).flatten()
        targets = system.outputs(output, gone)
        products = products - system.products_of(gone)
        factor = system.factor(products, DEFAULT_RIDGE)
        output[:, left] += system.change(factor, targets, left)
    return rank


def _score_blocks(columns: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return tr(W_u B_u^-1 W_u^T) for every unit, [units].

    Args:
        columns: W, [out_features, units * size], float64.
        blocks: B, [units, size, size], float64.
    """
    units, size, _ = blocks.shape
    if size == 1:
        return columns.square().sum(dim=0) / blocks.flatten()
    parts = columns.reshape(len(columns), units, size).permute(1, 2, 0)
    return (parts * torch.cholesky_solve(parts, cholesky(blocks))).sum(dim=(1, 2))


def _obs_scores(output: torch.Tensor, inverse: torch.Tensor, size: int, here: torch.Tensor) -> torch.Tensor:
    """Return tr(W_u ([G^-1]_uu)^-1 W_u^T) for every unit of `size` columns, [units]; Inf for units not `here`."""
    units = output.shape[1] // size
    starts = torch.arange(units)
    blocks = inverse.reshape(units, size, units, size)[starts, :, starts, :]
    blocks[~here] = torch.eye(size, dtype=blocks.dtype)  # a removed unit's block is zero
    return _score_blocks(output, blocks).masked_fill(~here, torch.inf)


def _obs_remove(output: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> None:
    """Update in place: W -= W_P ([G^-1]_PP)^-1 [G^-1]_P,: and G^-1 -= [G^-1]_:,P ([G^-1]_PP)^-1 [G^-1]_P,:.

    The columns of P in W, and its rows and columns in G^-1, are then zero.
    """
    rows = inverse.index_select(0, gone)
    solved = torch.cholesky_solve(rows, cholesky(rows.index_select(1, gone)))
    output.addmm_(output.index_select(1, gone), solved, alpha=-1)
    inverse.addmm_(rows.T, solved, alpha=-1)
    for matrix in (output.T, inverse, inverse.T):
        matrix[gone] = 0
