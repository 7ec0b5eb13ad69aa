"""Linear algebra that several modules share: ridge and inverse of Gram matrices, in float64, and fast products."""

from __future__ import annotations

import math

import torch

from hf_context_prune.errors import NumericsError

FLOOR = 1e-3
"""Share of the mean diagonal that the ridge never falls below: features that never fire stay solvable."""


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf, in one reading: `isfinite` and a sum in float64 make copies."""
    return not values.numel() or all(map(math.isfinite, map(float, values.aminmax())))


def add_ridge(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """G + ridge * diag(g), g_j = G_jj + FLOOR * mean diag(G): a ridge in every feature's own scale.

    The same as ridge * I after scaling the features to unit size. A few neurons of a language model are thousands of
    times larger than most; a ridge that is a share of the *mean* would be nothing to them and would drown the others.

    Args:
        gram: Symmetric, [features, features], float64.
        ridge: Share of each feature's mean square, above 0.

    Raises:
        NumericsError: G is all zero (the inputs never fire), so there is nothing to scale the ridge by.
    """
    scale = float(gram.diagonal().mean())
    if not scale > 0:
        raise NumericsError(
            "The Gram matrix of a layer is zero or not finite: its inputs never fire on this text. Use more or other "
            "calibration text."
        )
    result = gram.clone()
    result.diagonal().mul_(1 + ridge).add_(ridge * FLOOR * scale)
    return result


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor of a symmetric positive definite matrix, or of a batch of them.

    Raises:
        NumericsError: It is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        raise NumericsError(
            "A Gram matrix is not positive definite even with the ridge. Raise PrunerConfig.ridge (say to 1) or use "
            "more calibration text."
        )
    return factor


def invert_spd(matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of a symmetric positive definite matrix through its Cholesky factor."""
    return torch.cholesky_inverse(cholesky(matrix))
