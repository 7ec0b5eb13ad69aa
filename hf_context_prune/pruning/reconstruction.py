"""Reconstruction: the least-squares weights of an output projection after some of its inputs are removed.

Notation: X [tokens, in_features] are the projection's inputs, W [out_features, in_features], K kept and P pruned
features, G = X^T X, mu the mean of x. Pure tensor maths: no module names, no devices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_context_prune.errors import ConfigError, unknown_name
from hf_context_prune.pruning.calibration.statistics import TargetStatistics
from hf_context_prune.utils.linalg import add_ridge, cholesky

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
    """Return W_K as it is: plain slicing."""
    return weight[:, torch.tensor(kept)], bias


def bias(
    weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int], statistics: TargetStatistics, ridge: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return W_K, and B + W_P mu_P: the removed inputs at their mean (FLAP, arXiv 2312.11983, Eq. 6).

    Adds a bias where there was none: such a model can be measured in memory, but its architecture can't save it.
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
    """Return W_K + W_P G_PK (G_KK + ridge diag(G_KK))^-1; with a bias on the centred covariance.

    This is the least-squares fit of the old outputs from the kept inputs, with a ridge that pulls towards the old
    weights: the empty plan is the identity. With a bias, C = G/n - mu mu^T takes the place of G, and
    b + W mu - W_K' mu_K that of b.

    Args:
        weight: W, any floating-point dtype.
        bias: [out_features] or None.
        kept: Kept features, ascending.
        statistics: With a Gram matrix.
        ridge: Share of each feature's mean square, above 0; see [`add_ridge`][].

    Raises:
        NumericsError: The system is singular in spite of the ridge.
    """
    K, P = _split(weight, kept)
    if len(P) == 0:
        return weight, bias
    second_moment = statistics.second_moment(centred=bias is not None)
    mean = statistics.mean
    W = weight.double()
    if not bool(second_moment.any()):  # a layer whose inputs never move needs no correction
        return W[:, K], None if bias is None else bias.double() + W[:, P] @ mean[P]
    system = add_ridge(second_moment, ridge)[K][:, K]
    update = torch.cholesky_solve(second_moment[K][:, P] @ W[:, P].T, cholesky(system)).T
    new_weight = W[:, K] + update
    if bias is None:
        return new_weight, None
    return new_weight, bias.double() + W @ mean - new_weight @ mean[K]


def regress(
    weight: torch.Tensor,
    second_moment: torch.Tensor,
    lacking: torch.Tensor,
    kept: list[int] | None,
    ridge: float,
    correction_ridge: float | None = None,
) -> torch.Tensor:
    """Return the regression of W x + e on the kept inputs, with ridges that pull towards the old weights.

    For sequential reconstruction. W x is the projection's own output, which x predicts exactly. e is what the residual
    stream lacks beside it, which x predicts only in part, so a few tokens are enough to overfit it. Each part has its
    own ridge (G = E[x x^T], D = diag G):

        W_K' = W_K + W_P G_PK (G_KK + ridge D_KK)^-1 + E[e x^T]_K (G_KK + correction_ridge D_KK)^-1

    Args:
        weight: Old W, [outputs, features], float64.
        second_moment: E[x x^T], [features, features], float64.
        lacking: E[x e^T], [features, outputs], float64.
        kept: Features to keep, ascending; None keeps all.
        ridge: Share of each feature's mean square, for W x.
        correction_ridge: The same for e; None: as `ridge`.

    Returns:
        New W, [outputs, kept], float64.
    """
    correction_ridge = ridge if correction_ridge is None else correction_ridge
    # With all features kept, W x needs no change, and its system is not solved.
    shares = {correction_ridge} if kept is None else {ridge, correction_ridge}
    # Features that never fire have nothing that they could be fitted to.
    systems = {share: add_ridge(second_moment, share) for share in shares} if bool(second_moment.any()) else {}
    changes: dict[float, torch.Tensor] = {}
    if kept is not None:
        index = torch.tensor(kept, device=weight.device)
        own = second_moment[index] @ weight.T
        weight, lacking, second_moment = weight[:, index], lacking[index], second_moment[index][:, index]
        systems = {share: system[index][:, index] for share, system in systems.items()}
        # Solving for the changes keeps the old weights exact where nothing has to change.
        changes[ridge] = own - second_moment @ weight.T
    changes[correction_ridge] = changes.get(correction_ridge, 0) + lacking
    for share, system in systems.items():
        weight = weight + torch.cholesky_solve(changes[share], cholesky(system)).T
    return weight


def squared_error(change: torch.Tensor, second_moment: torch.Tensor, lacking: torch.Tensor) -> float:
    """Return E|e - C x|^2 - E|e|^2: how much a change C of the weights changes the remaining error.

    Args:
        change: C, [outputs, features], float64.
        second_moment: E[x x^T], [features, features], float64.
        lacking: E[x e^T], [features, outputs], float64.
    """
    return float((change @ second_moment * change).sum() - 2 * (change * lacking.T).sum())


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
