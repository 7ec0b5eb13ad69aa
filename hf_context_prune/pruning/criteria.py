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
from hf_context_prune.utils.linalg import add_ridge, cholesky, invert_spd

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
        Rank of each unit, [units], float64: 0 is removed first.

    Raises:
        NumericsError: W is not finite, or G is zero or singular in spite of the ridge.
    """
    size, units = weights.unit_size, weights.num_units
    if not bool(torch.isfinite(weights.output).all()):  # the ranks would be finite, and hide it
        raise NumericsError("The output weight of a layer holds NaN or Inf, so its units can't be ranked.")
    # With a bias the mean of the removed inputs costs nothing, as in the reconstruction.
    inverse = invert_spd(add_ridge(statistics.second_moment(centred=weights.has_bias), DEFAULT_RIDGE))
    output = weights.output.double() * (1.0 if weights.channel_scale is None else weights.channel_scale.double())
    alive = torch.arange(units)
    here = torch.ones(units, dtype=torch.bool)  # which of `alive` are not yet removed
    rank = torch.empty(units, dtype=torch.float64)
    removed = 0
    while removed < units:
        score = _obs_scores(output, inverse, size, here)
        # A sixteenth of the remaining units, at least one: fine where it matters, and few updates in all.
        batch = score.argsort(stable=True)[: max(1, (units - removed) // 16)]
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


def _obs_scores(output: torch.Tensor, inverse: torch.Tensor, size: int, here: torch.Tensor) -> torch.Tensor:
    """Return tr(W_u ([G^-1]_uu)^-1 W_u^T) for every unit of `size` columns, [units]; Inf for units not `here`."""
    if size == 1:
        diagonal = inverse.diagonal().masked_fill(~here, 1.0)
        return (output.square().sum(dim=0) / diagonal).masked_fill(~here, torch.inf)
    units = output.shape[1] // size
    starts = torch.arange(units)
    blocks = inverse.reshape(units, size, units, size)[starts, :, starts, :]
    columns = output.reshape(output.shape[0], units, size).permute(1, 2, 0)
    blocks[~here] = torch.eye(size, dtype=blocks.dtype)  # a removed unit's block is zero
    score = (columns * torch.cholesky_solve(columns, cholesky(blocks))).sum(dim=(1, 2))
    return score.masked_fill(~here, torch.inf)


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
