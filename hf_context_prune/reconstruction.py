"""Reconstruction (compensation): closed-form refit of an output projection after some of its inputs are removed.

Notation: X [tokens, in_features] are the projection's inputs, W [out_features, in_features], K kept and P pruned
features, G = X^T X, mu the mean of x. Pure tensor maths: no module names, no devices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .errors import ConfigError, unknown
from .linalg import cholesky
from .stats import TargetStatistics

Reconstruction = Callable[
    [torch.Tensor, torch.Tensor | None, list[int], TargetStatistics, float], tuple[torch.Tensor, torch.Tensor | None]
]
"""(W, bias or None, kept features, statistics, ridge) -> (new W [out, kept], new bias or None)."""


def _split(weight: torch.Tensor, kept: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(weight.shape[1], dtype=torch.bool)
    mask[torch.tensor(kept)] = True
    return mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)


def none(
    weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int], statistics: TargetStatistics, ridge: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W_K as it is."""
    return weight[:, torch.tensor(kept)], bias


def bias(
    weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int], statistics: TargetStatistics, ridge: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """B + W_P mu_P: the removed inputs at their mean (FLAP, arXiv 2312.11983, Eq. 6).

    Adds a bias where there was none; such a model measures in memory but its architecture can't save it.
    """
    K, P = _split(weight, kept)
    if len(P) == 0:
        return weight, bias
    correction = weight[:, P].double() @ statistics.mean[P]
    old = torch.zeros_like(correction) if bias is None else bias.double()
    return weight[:, K], old + correction


def least_squares(
    weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int], statistics: TargetStatistics, ridge: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W_K + W_P G_PK (G_KK + lambda I)^-1, lambda = ridge * mean diag(G); with a bias on the centred covariance.

    The least-squares fit of the old outputs from the kept inputs, with a ridge that pulls towards the old weights:
    the empty plan is the identity. With a bias, C = G/n - mu mu^T stands for G, and b + W mu - W_K' mu_K for b.

    Args:
        weight: W, any floating-point dtype.
        bias: [out_features] or None.
        kept: Kept features, ascending.
        statistics: With a Gram matrix.
        ridge: Share of the mean diagonal, above 0.

    Raises:
        NumericsError: The system is singular in spite of the ridge.
    """
    K, P = _split(weight, kept)
    if len(P) == 0:
        return weight, bias
    second_moment = statistics.second_moment(centred=bias is not None)
    mean = statistics.mean
    W = weight.double()
    # A layer whose inputs never move needs no correction; the floor only keeps the system solvable then.
    scale = max(float(second_moment.diagonal().mean()), torch.finfo(torch.float64).tiny)
    system = second_moment[K][:, K]
    system.diagonal().add_(ridge * scale)
    update = torch.cholesky_solve(second_moment[K][:, P] @ W[:, P].T, cholesky(system)).T
    new_weight = W[:, K] + update
    if bias is None:
        return new_weight, None
    return new_weight, bias.double() + W @ mean - new_weight @ mean[K]


def refit(
    weight: torch.Tensor, second_moment: torch.Tensor, cross: torch.Tensor, kept: list[int] | None, ridge: float
) -> torch.Tensor:
    """W_K with (E[x x^T]_KK + lambda I) W_K^T = E[x t^T]_K + lambda W_K^T: regression on a target, for `sequential.py`.

    lambda = ridge * mean diag(E[x x^T]); the ridge pulls towards the old weights.

    Args:
        weight: Old W, [outputs, features], float64.
        second_moment: E[x x^T], [features, features], float64.
        cross: E[x t^T], [features, outputs], float64.
        kept: Features to keep, ascending; None keeps all.
        ridge: Share of the mean diagonal.

    Returns:
        New W, [outputs, kept], float64.
    """
    scale = max(float(second_moment.diagonal().mean()), torch.finfo(torch.float64).tiny)
    if kept is not None:
        index = torch.tensor(kept, device=weight.device)
        weight, cross, second_moment = weight[:, index], cross[index], second_moment[index][:, index]
    system = second_moment.clone()
    system.diagonal().add_(ridge * scale)
    # Solving for the change keeps the old weights exact where nothing has to change.
    change = torch.cholesky_solve(cross - second_moment @ weight.T, cholesky(system)).T
    return weight + change


RECONSTRUCTIONS: dict[str, Reconstruction] = {"none": none, "bias": bias, "least_squares": least_squares}
NEEDS_GRAM = frozenset({"least_squares"})


def get_reconstruction(name: str) -> Reconstruction:
    """Look a reconstruction up.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in RECONSTRUCTIONS:
        raise ConfigError(unknown("reconstruction", name, RECONSTRUCTIONS))
    return RECONSTRUCTIONS[name]
