"""Small random regression problems, and statistics summed up by hand."""

from __future__ import annotations

import torch

from hf_context_prune.pruning.calibration.statistics import TargetStatistics, TargetWeights


def statistics_of(X: torch.Tensor, *, taylor: torch.Tensor | None = None) -> TargetStatistics:
    """The statistics of inputs X [tokens, features], all in float64."""
    X = X.double()
    return TargetStatistics(
        num_tokens=len(X),
        sum=X.sum(dim=0),
        sum_abs=X.abs().sum(dim=0),
        sum_squares=(X * X).sum(dim=0),
        gram=X.T @ X,
        taylor=taylor,
    )


def inputs(features: int, *, tokens: int = 200, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with means and scales of their own: X [tokens, features], float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    scale = torch.rand(features, generator=generator, dtype=torch.float64) + 0.2
    mean = torch.randn(features, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mix * scale + mean


def matrix(rows: int, columns: int, *, seed: int = 1) -> torch.Tensor:
    """A random weight, float64."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(units: int, unit_size: int = 1, *, out: int = 7, seed: int = 1) -> TargetWeights:
    """Random weights of one target."""
    magnitudes = torch.rand(units, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return TargetWeights(matrix(out, units * unit_size, seed=seed), unit_size, magnitudes)
