"""Reconstruction: the least-squares weights of an output projection after some of its inputs are removed.

Notation: X [tokens, in_features] are the projection's inputs, W [out_features, in_features], K kept and P pruned
features, G = X^T X, mu the mean of x. Pure tensor maths: no module names, no devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hf_context_prune.errors import ConfigError, unknown_name
from hf_context_prune.pruning.calibration.statistics import TargetStatistics
from hf_context_prune.utils.linalg import cholesky_, ridge_diagonal

Reconstruction = Callable[
    [torch.Tensor, torch.Tensor | None, list[int], TargetStatistics, float], tuple[torch.Tensor, torch.Tensor | None]
]
"""(W, bias or None, kept features, statistics, ridge) -> (new W [out, kept], new bias or None)."""


def split_features(features: int, kept: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of kept and of removed features, ascending, int64."""
    mask = torch.zeros(features, dtype=torch.bool)
    mask[torch.tensor(kept)] = True
    return mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)


def solve_ridge(
    second_moment: torch.Tensor, kept: torch.Tensor | None, parts: Sequence[tuple[float, torch.Tensor]]
) -> torch.Tensor:
    """Return the sum of (G_KK + ridge D_KK)^-1 B over parts (ridge, B), one system in memory at a time.

    Args:
        second_moment: G, [features, features], float64; D is its diagonal, see [`ridge_diagonal`][].
        kept: K, int64; None: all features.
        parts: Each B is [kept, outputs], float64.

    Raises:
        NumericsError: A system is singular in spite of the ridge.
    """
    total: torch.Tensor | None = None
    for ridge, target in parts:
        added = ridge_diagonal(second_moment.diagonal(), ridge)
        system = second_moment.clone() if kept is None else second_moment[kept[:, None], kept]
        system.diagonal().add_(added if kept is None else added[kept])
        solved = torch.cholesky_solve(target, cholesky_(system))
        total = solved if total is None else total.add_(solved)
    assert total is not None
    return total


def none(
    weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int], statistics: TargetStatistics, ridge: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return W_K as it is: plain slicing."""
    return weight[:, torch.tensor(kept)], bias


def bias(
    weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int], statistics: TargetStatistics, ridge: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return W_K, and B + W_P mu_P: the removed inputs at their mean (FLAP, arXiv 2312.11983, Eq. 6).

    Adds a bias where there was none: such a model can be measured in memory, but its architecture can't save it.
    """
    K, P = split_features(weight.shape[1], kept)
    if len(P) == 0:
        return weight, bias
    correction = weight[:, P].double() @ statistics.mean[P]
    old = torch.zeros_like(correction) if bias is None else bias.double()
    return weight[:, K], old + correction


def least_squares(
    weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int], statistics: TargetStatistics, ridge: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return W_K + W_P G_PK (G_KK + ridge diag(G_KK))^-1; with a bias on the centred covariance.

    This is the least-squares fit of the old outputs from the kept inputs, with a ridge that pulls towards the old
    weights: the empty plan is the identity. With a bias, C = G/n - mu mu^T takes the place of G, and
    b + W mu - W_K' mu_K that of b.

    Args:
        weight: W, any floating-point dtype.
        bias: [out_features] or None.
        kept: Kept features, ascending.
        statistics: With a Gram matrix.
        ridge: Share of each feature's mean square, above 0; see [`add_ridge_`][].

    Raises:
        NumericsError: The system is singular in spite of the ridge.
    """
    K, P = split_features(weight.shape[1], kept)
    if len(P) == 0:
        return weight, bias
    second_moment = statistics.second_moment(centred=bias is not None)
    mean = statistics.mean
    W = weight.double()
    if not bool(second_moment.any()):  # a layer whose inputs never move needs no correction
        return W[:, K], None if bias is None else bias.double() + W[:, P] @ mean[P]
    update = solve_ridge(second_moment, K, [(ridge, second_moment[K[:, None], P] @ W[:, P].T)]).T
    new_weight = W[:, K] + update
    if bias is None:
        return new_weight, None
    return new_weight, bias.double() + W @ mean - new_weight @ mean[K]


RECONSTRUCTIONS: dict[str, Reconstruction] = {"none": none, "bias": bias, "least_squares": least_squares}
NEEDS_GRAM = frozenset({"least_squares"})


def get_reconstruction(name: str) -> Reconstruction:
    """Look up a reconstruction.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in RECONSTRUCTIONS:
        raise ConfigError(unknown_name("reconstruction", name, RECONSTRUCTIONS))
    return RECONSTRUCTIONS[name]
