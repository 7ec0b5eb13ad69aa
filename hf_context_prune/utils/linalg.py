"""Linear algebra that several modules share: ridge and inverse of Gram matrices, in float64."""

from __future__ import annotations

import copy
import math

import torch

from hf_context_prune.errors import NumericsError

from .precision import product_dtype, rounded_product

FLOOR = 1e-3
"""Lower limit of the ridge as a share of the mean diagonal, so that features that never fire stay solvable."""
_BLOCK = 256
"""Rows of a Gram matrix that are computed at once."""
_WIDE_BLOCK = 512
"""The same, for products in bfloat16."""
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


def ridge_diagonal(squares: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return ridge * (g + FLOOR * mean g): a ridge on the scale of each feature.

    This equals ridge * I after the features are scaled to unit size. A few neurons of a language model are thousands of
    times larger than most; a ridge that is a share of the *mean* would not regularise these and would dominate the
    rest.

    Args:
        squares: g, mean square of each feature: the diagonal of a Gram matrix, [features], float64.
        ridge: Share of each feature's mean square, above 0.

    Raises:
        NumericsError: g is all zero (the inputs are zero everywhere) or not finite, so the ridge has no scale.
    """
    scale = float(squares.mean())
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
    return ridge * (squares + FLOOR * scale)


def add_ridge_(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Add the ridge of [`ridge_diagonal`][] to a Gram matrix, [features, features] float64, in place; return it."""
    gram.diagonal().add_(ridge_diagonal(gram.diagonal(), ridge))
    return gram


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Return the lower Cholesky factor of a symmetric positive definite matrix, or of a batch of matrices.

    Raises:
        NumericsError: A matrix is not positive definite.
    """
    return _checked(*torch.linalg.cholesky_ex(matrix))


def cholesky_(matrix: torch.Tensor) -> torch.Tensor:
    """Return the same factor of one matrix, whose memory it takes: no second one of its size exists.

    Raises:
        NumericsError: See [`cholesky`][].
    """
    if matrix.device.type != "cpu":
        return cholesky(matrix)
    own = matrix.mT  # symmetric, and in the order in which LAPACK works in place
    info = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(own, out=(own, info))
    return _checked(own, info)


def _checked(factor: torch.Tensor, info: torch.Tensor) -> torch.Tensor:
    if bool(info.any()):
        raise NumericsError(
            "A Gram matrix is not positive definite even with the ridge. Raise PrunerConfig.ridge (say to 1) or use "
            "more calibration text."
        )
    return factor


def invert_spd_(matrix: torch.Tensor) -> torch.Tensor:
    """Return the inverse of a symmetric positive definite matrix, whose memory it takes; see [`cholesky`][]."""
    factor = cholesky_(matrix)
    return torch.cholesky_inverse(factor, out=factor) if factor.device.type == "cpu" else torch.cholesky_inverse(factor)


class RowSystem:
    """The system X^T X / n + ridge of fewer rows X than features, solved through the small matrix of their products.

    With Delta = diag(g + FLOOR mean g) and Z = X Delta^-1/2 / sqrt(n), the push-through identity gives

        (X^T X / n + ridge Delta)^-1 X^T / sqrt(n) = Delta^-1/2 Z^T (Z Z^T + ridge I)^-1

    Args:
        columns: X^T, [features, tokens], float32; its memory is taken for Z^T.
        pivot: Subtracted from each row of X, [features]; None: nothing.

    Raises:
        NumericsError: See [`ridge_diagonal`][].
    """

    def __init__(self, columns: torch.Tensor, pivot: torch.Tensor | None = None) -> None:
        if pivot is not None:
            columns -= pivot.to(columns)[:, None]
        squares = torch.linalg.vector_norm(columns, dim=1, dtype=torch.float64).square() / columns.shape[1]
        self.count, self.pivot = columns.shape[1], pivot
        self.scale = ridge_diagonal(squares, 1.0).sqrt()  # Delta^1/2
        self.columns = columns.mul_(self._to_rows.reciprocal())  # Z^T
        self.products = _gram(self.columns)

    @property
    def _to_rows(self) -> torch.Tensor:
        """Factor of each row of Z^T that gives X^T, [features, 1], float32."""
        return (self.scale * math.sqrt(self.count)).float()[:, None]

    def about(self, pivot: torch.Tensor | None) -> RowSystem:
        """Return the system of the same rows about another pivot; itself, where that is its own."""
        if (pivot is None) == (self.pivot is None):
            return self
        columns = self.columns * self._to_rows
        return RowSystem(columns if self.pivot is None else columns + self.pivot.to(columns)[:, None], pivot)

    def to(self, device: torch.device | str) -> RowSystem:
        """Return the system on a device."""
        moved = copy.copy(self)
        for name in ("pivot", "scale", "columns", "products"):
            value = getattr(self, name)
            setattr(moved, name, None if value is None else value.to(device))
        return moved

    def without(self, gone: torch.Tensor) -> torch.Tensor:
        """Return Z Z^T of the features that are not gone, [tokens, tokens] float32."""
        return self.products - _gram(self.columns[gone])

    def outputs(self, weight: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return X_f W_f^T of some features, [tokens, outputs] float32; weight: W, [outputs, features]."""
        columns = self.columns[features] * self._to_rows[features]
        return rounded_product(columns.T, weight[:, features].to(columns).T)

    def factor(self, products: torch.Tensor, ridge: float) -> torch.Tensor:
        """Return the Cholesky factor of products + ridge I, [tokens, tokens] float32.

        The products are of unit scale and the ridges a good share of it, so that float32 is enough.
        """
        matrix = products.clone()
        matrix.diagonal().add_(ridge)
        return cholesky_(matrix)

    def solve(self, factor: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return (products + ridge I)^-1 T / sqrt(n), [tokens, outputs], for the targets T of that shape."""
        return torch.cholesky_solve(targets / math.sqrt(self.count), factor)

    def change(self, solved: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Return the ridge regression of targets on features, [outputs, features] float32.

        Args:
            solved: What [`solve`][] returns for the targets, with the products of the features.
            kept: The features; None: all.
        """
        columns, scale = (self.columns, self.scale) if kept is None else (self.columns[kept], self.scale[kept])
        return rounded_product(solved.T, columns.T).div_(scale.to(columns))

    def products_with(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the products of other rows, [rows, features] float32, with those of X: [rows, tokens]."""
        centred = inputs if self.pivot is None else inputs - self.pivot.to(inputs)
        return rounded_product(centred / self.scale.to(inputs), self.columns)

    def predict(self, factor: torch.Tensor, targets: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
        """Return what [`change`][] gives for other rows, [rows, outputs], without forming it; of their products."""
        if len(products) < targets.shape[1]:  # the smaller right-hand side is solved
            return rounded_product(self.solve(factor, products.T).T, targets)
        return rounded_product(products, self.solve(factor, targets))


def _gram(columns: torch.Tensor) -> torch.Tensor:
    """Return A^T A, [columns, columns] float32, of A [features, columns]; rounding is far below the ridge."""
    own = columns.to(product_dtype(columns.device))
    gram = columns.new_zeros(columns.shape[1], columns.shape[1])
    for start in range(0, len(gram), _WIDE_BLOCK):
        stop = start + _WIDE_BLOCK
        gram[start:stop, start:] = own[:, start:stop].T @ own[:, start:]
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram
