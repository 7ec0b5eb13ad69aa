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
from hf_context_prune.utils.linalg import RowSystem, add_ridge_, cholesky, invert_spd_, ridge_diagonal
from hf_context_prune.utils.precision import rounded_product

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
    squares = statistics.variance if weights.has_bias else statistics.sum_squares / statistics.num_tokens
    ridge_diagonal(squares, DEFAULT_RIDGE)  # inputs that are zero everywhere have no system
    if statistics.system is not None:
        return _obs_by_rows(weights, statistics.system.about(statistics.mean if weights.has_bias else None))
    output = weights.output.double() * (1.0 if weights.channel_scale is None else weights.channel_scale.double())
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


def _obs_by_rows(weights: TargetWeights, system: RowSystem) -> torch.Tensor:
    """Return what [`obs`][] does, for fewer rows X of inputs than features: no matrix has the size of G.

    With Z and Delta of [`RowSystem`][], lambda the ridge and M = (Z Z^T + lambda I)^-1,

        G^-1 = Delta^-1/2 N Delta^-1/2 / lambda    N = I - Z^T M Z

    so W Delta^1/2 and N are updated in place of W and G^-1. Of N, the diagonal blocks and M are held. After the removal
    of P, M grows by M Z_P (N_PP)^-1 Z_P^T M, and N_P,: is all that the other updates need.
    """
    size, units, Z = weights.unit_size, weights.num_units, system.columns.T
    columns = (weights.output.float() * system.scale.float()).T.contiguous()  # features first: units are contiguous
    if weights.channel_scale is not None:
        columns *= weights.channel_scale.float().T
    matrix = torch.cholesky_inverse(system.factor(system.products, DEFAULT_RIDGE))
    blocks = _unit_blocks(system.columns, rounded_product(system.columns, matrix), size).neg_()
    blocks.diagonal(dim1=1, dim2=2).add_(1)
    here = torch.ones(units, dtype=torch.bool)
    rank = torch.full((units,), units, dtype=torch.float64)
    removed = 0
    while removed < units - weights.least_kept:
        blocks.diagonal(dim1=1, dim2=2).clamp_min_(_LEAST_SHARE)
        score = _score_blocks(columns, blocks).masked_fill(~here, torch.inf)
        batch = score.argsort(stable=True)[: _batch_size(units - removed)]
        rank[batch] = torch.arange(removed, removed + len(batch), dtype=torch.float64)
        removed += len(batch)
        gone = (batch[:, None] * size + torch.arange(size)).flatten()
        half = system.columns[gone] @ matrix
        own = torch.eye(len(gone), dtype=torch.float64) - half @ Z[:, gone]
        own.diagonal().clamp_min_(_LEAST_SHARE)
        factor = cholesky(own).float()
        step = torch.linalg.solve_triangular(factor, half, upper=False)
        others = rounded_product(step, Z).neg_()
        others[:, gone] = torch.linalg.solve_triangular(factor, own.float(), upper=False)
        others[:, ~here.repeat_interleave(size)] = 0  # what went before
        here[batch] = False
        columns -= rounded_product(others.T, torch.linalg.solve_triangular(factor, columns[gone], upper=False))
        blocks -= _unit_blocks(others.T, others.T, size)
        blocks[~here] = torch.eye(size, dtype=blocks.dtype)
        matrix += step.T @ step
    return rank


def _unit_blocks(first: torch.Tensor, second: torch.Tensor, size: int) -> torch.Tensor:
    """Return A_u B_u^T of the rows of every unit, [units, size, size] float64; A and B are [units * size, columns]."""
    if size == 1:
        return (first * second).sum(dim=1, dtype=torch.float64).view(-1, 1, 1)
    one, other = (values.reshape(-1, size, values.shape[1]) for values in (first, second))
    return (one @ other.mT).double()


def _score_blocks(columns: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return tr(W_u B_u^-1 W_u^T) for every unit, [units].

    Args:
        columns: W^T, [units * size, out_features].
        blocks: B, [units, size, size], float64.
    """
    units, size, _ = blocks.shape
    if size == 1:
        return torch.linalg.vector_norm(columns, dim=1, dtype=torch.float64).square() / blocks.flatten()
    parts = columns.double().view(units, size, -1)
    return (parts * torch.cholesky_solve(parts, cholesky(blocks))).sum(dim=(1, 2))


def _obs_scores(output: torch.Tensor, inverse: torch.Tensor, size: int, here: torch.Tensor) -> torch.Tensor:
    """Return tr(W_u ([G^-1]_uu)^-1 W_u^T) for every unit of `size` columns, [units]; Inf for units not `here`."""
    units = output.shape[1] // size
    starts = torch.arange(units)
    blocks = inverse.reshape(units, size, units, size)[starts, :, starts, :]
    blocks[~here] = torch.eye(size, dtype=blocks.dtype)  # a removed unit's block is zero
    return _score_blocks(output.T, blocks).masked_fill(~here, torch.inf)


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
