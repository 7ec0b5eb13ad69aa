"""Linear algebra shared by criteria and reconstruction: ridge and inverse of Gram matrices, all in float64."""

from __future__ import annotations

import torch

from .errors import NumericsError


def regularized(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """G + ridge * mean(diag G) * I.

    Args:
        gram: Symmetric, [features, features], float64.
        ridge: Share of the mean diagonal, above 0.

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
    result.diagonal().add_(ridge * scale)
    return result


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor of a symmetric positive definite matrix, or of a batch of them.

    Raises:
        NumericsError: It is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        raise NumericsError(
            "A Gram matrix is not positive definite even with the ridge. Raise PrunerConfig.ridge (say to 0.1) or use "
            "more calibration text."
        )
    return factor


def inverse_spd(matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of a symmetric positive definite matrix through its Cholesky factor."""
    return torch.cholesky_inverse(cholesky(matrix))
