"""Linear algebra that several modules share: ridge and inverse of Gram matrices, in float64."""

from __future__ import annotations

import math

import torch

from hf_context_prune.errors import NumericsError

FLOOR = 1e-3
"""Lower limit of the ridge as a share of the mean diagonal, so that features that never fire stay solvable."""
_BLOCK = 256
"""Rows of a Gram matrix that are computed at once."""
_DAMAGED = "The checkpoint is damaged or was never trained: download or save the model again."


def all_finite(values: torch.Tensor) -> bool:
    """Return whether no value is NaN or Inf; one pass without a copy, which `isfinite` and a float64 sum would make."""
    return not values.numel() or all(map(math.isfinite, map(float, values.aminmax())))


def add_gram_(gram: torch.Tensor, x: torch.Tensor) -> None:
    """Add X^T X to a Gram matrix, in place: the blocks on and above the diagonal are computed, the rest is mirrored.

    Args:
        gram: Symmetric, [features, features].
        x: X, [tokens, features], in the same dtype.
    """
    for start in range(0, len(gram), _BLOCK):
        stop = start + _BLOCK
        gram[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        gram[stop:, start:stop] = gram[start:stop, stop:].T


def add_ridge(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return G + ridge * diag(g), g_j = G_jj + FLOOR * mean diag(G): a ridge on the scale of each feature.

    This equals ridge * I after the features are scaled to unit size. A few neurons of a language model are thousands of
    times larger than most; a ridge that is a share of the *mean* would not regularise these and would dominate the
    rest.

    Args:
        gram: Symmetric, [features, features], float64.
        ridge: Share of each feature's mean square, above 0.

    Raises:
        NumericsError: G is all zero (the inputs are zero everywhere) or not finite, so the ridge has no scale.
    """
    scale = float(gram.diagonal().mean())
    if not math.isfinite(scale):
        raise NumericsError(
            "The inputs of an output projection are NaN, or too large to be squared: the weights before it are far "
            f"from those of a trained model. {_DAMAGED}"
        )
    if not scale > 0:
        raise NumericsError(
            "The inputs of an output projection are zero at every token of the text: the weights before it are zero, "
            f"or so large that a norm overflows. {_DAMAGED}"
        )
    result = gram.clone()
    result.diagonal().mul_(1 + ridge).add_(ridge * FLOOR * scale)
    return result


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Return the lower Cholesky factor of a symmetric positive definite matrix, or of a batch of matrices.

    Raises:
        NumericsError: A matrix is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        raise NumericsError(
            "A Gram matrix is not positive definite even with the ridge. Raise PrunerConfig.ridge (say to 1) or use "
            "more calibration text."
        )
    return factor


def invert_spd(matrix: torch.Tensor) -> torch.Tensor:
    """Return the inverse of a symmetric positive definite matrix, computed from its Cholesky factor."""
    return torch.cholesky_inverse(cholesky(matrix))
