"""The values between calibration and scoring: per-target weights and streamed statistics.

`TargetWeights` and `TargetStatistics` are all that a criterion or a reconstruction ever sees: plain tensors, without
module names, devices or tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_context_prune.errors import DataError, NumericsError, SaveError
from hf_context_prune.utils.files import open_regular
from hf_context_prune.utils.linalg import RowSystem, add_gram_

Key = tuple[int, str]
"""(layer index, target name)."""


@dataclass(frozen=True)
class TargetWeights:
    """The weights of one target of one layer.

    Attributes:
        output: Weight of the output projection, [out_features, in_features].
        unit_size: Input features per unit, contiguous: unit u owns features u * unit_size to (u + 1) * unit_size.
        input_magnitude: Sum of |w| over each unit's weights in the input projections, [units], float64.
        has_bias: Whether the output projection has a bias, which takes up the mean of the removed inputs.
        channel_scale: Share of each output channel that reaches the residual stream, [out_features, 1]: the gamma of a
            norm behind the projection. None: all of it.
        least_kept: Units that stay in any case: a criterion need not tell the best of so many apart.
    """

    output: torch.Tensor
    unit_size: int
    input_magnitude: torch.Tensor
    has_bias: bool = False
    channel_scale: torch.Tensor | None = None
    least_kept: int = 0

    @property
    def num_units(self) -> int:
        """The number of units."""
        return self.output.shape[1] // self.unit_size

    def cpu(self) -> TargetWeights:
        """Return a copy on the CPU, where scoring runs: not every device has float64, and the matrices are small."""
        scale = None if self.channel_scale is None else self.channel_scale.cpu()
        moved = {"output": self.output.cpu(), "input_magnitude": self.input_magnitude.cpu(), "channel_scale": scale}
        return replace(self, **moved)

    def per_unit(self, per_feature: torch.Tensor) -> torch.Tensor:
        """Sum a per-feature quantity, [in_features], over the features of each unit: [units]."""
        return per_feature.reshape(self.num_units, self.unit_size).sum(dim=1)


@dataclass
class TargetStatistics:
    """Sums over unpadded tokens of the inputs X of one output projection.

    Attributes:
        num_tokens: Tokens counted.
        sum: Sum of x, [in_features], float64.
        sum_abs: Sum of |x|, [in_features], float64.
        sum_squares: Sum of x^2, [in_features], float64.
        gram: (X - pivot)^T (X - pivot), [in_features, in_features], float32; None if not asked for.
        pivot: A point near the mean, [in_features], float64, for statistics from which the covariance is computed. It
            would drown in the float32 rounding of X^T X where the mean is large beside the spread. None: the origin.
        system: The rows of X, in place of the Gram matrix where they are smaller; else None.
        taylor: Sum of |w * dL/dw| over each unit's weights, [units], float64; None if not asked for.
    """

    num_tokens: int
    sum: torch.Tensor
    sum_abs: torch.Tensor
    sum_squares: torch.Tensor
    gram: torch.Tensor | None = None
    taylor: torch.Tensor | None = None
    pivot: torch.Tensor | None = None
    system: RowSystem | None = None

    def cpu(self) -> TargetStatistics:
        """Return a copy on the CPU."""
        moved = {name: value.to("cpu") for name in (*_TENSORS, "system") if (value := getattr(self, name)) is not None}
        return replace(self, **moved)  # type: ignore[arg-type]

    @property
    def mean(self) -> torch.Tensor:
        """Mean of x, [in_features], float64."""
        return self.sum / self.num_tokens

    @property
    def variance(self) -> torch.Tensor:
        """Biased variance of x, [in_features], float64, not below 0."""
        return (self.sum_squares / self.num_tokens - self.mean**2).clamp_min(0)

    def second_moment(self, *, centred: bool = False) -> torch.Tensor:
        """Return X^T X / n, or the covariance of x, [in_features, in_features], float64.

        Args:
            centred: Return the covariance, for a projection whose bias takes up the mean.

        Raises:
            DataError: The Gram matrix was not collected.
        """
        if self.gram is None:
            raise DataError("These statistics hold no Gram matrix; calibrate with statistics={'gram'}.")
        if self.pivot is None and not centred:
            return self.gram.to(torch.float64, copy=True).div_(self.num_tokens)
        pivot = torch.zeros_like(self.sum) if self.pivot is None else self.pivot
        # E[(x - p)(x - p)^T] = Cov + d d^T with d = mean - p, and E[x x^T] = Cov + mean mean^T.
        shift = self.mean - pivot
        covariance = self.gram.to(torch.float64, copy=True).div_(self.num_tokens).addr_(shift, shift, alpha=-1)
        return covariance if centred else covariance.addr_(self.mean, self.mean)

    def check_finite(self, where: str) -> None:
        """Refuse sums that are NaN or Inf (sorting ranks NaN highest, so it would silently choose the survivors).

        Args:
            where: Layer, target and batch, for the message.

        Raises:
            NumericsError: A sum is not finite.
        """
        for name in ("sum_squares", "taylor"):
            value = getattr(self, name)
            if value is not None and not bool(torch.isfinite(value).all()):
                raise NumericsError(
                    f"NaN or Inf in the {name} statistic of {where}. Check the model's weights, or calibrate in "
                    f"float32 (--dtype float32): half precision can overflow."
                )


_TENSORS = ("sum", "sum_abs", "sum_squares", "gram", "taylor", "pivot")


class RegressionMoments:
    """Streamed second moments of x, and of x with a target, over unpadded tokens: float32 products, float64 sums.

    Args:
        features: Features of x.
        outputs: Features of the target.
        device: Where the sums are.
        centre: Take both about a point near their mean, for projections whose bias takes up the mean.
    """

    def __init__(self, features: int, outputs: int, device: torch.device, *, centre: bool) -> None:
        total, absolute, squares = (torch.zeros(features, dtype=torch.float64, device=device) for _ in range(3))
        gram = torch.zeros(features, features, device=device)
        self.statistics = TargetStatistics(0, total, absolute, squares, gram=gram)
        self.cross = torch.zeros(features, outputs, device=device)
        self.sum_target = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.pivot_target: torch.Tensor | None = None
        self.centre = centre

    def add(self, x: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: x [tokens, features], target [tokens, outputs], float32."""
        stats = self.statistics
        stats.num_tokens += len(x)
        stats.sum += x.sum(dim=0)
        stats.sum_abs += x.abs().sum(dim=0)
        stats.sum_squares += x.square().sum(dim=0)
        if self.centre:
            stats.pivot = x.mean(dim=0).double() if stats.pivot is None else stats.pivot
            x = x - stats.pivot.float()
        assert stats.gram is not None
        add_gram_(stats.gram, x)
        self.sum_target += target.sum(dim=0)
        if self.centre:
            self.pivot_target = target.mean(dim=0) if self.pivot_target is None else self.pivot_target
            target = target - self.pivot_target
        self.cross.addmm_(x.T, target)

    def second_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (E[x x^T], E[x t^T]), or the covariances with `centre`; float64."""
        stats = self.statistics
        cross = self.cross.double() / stats.num_tokens
        if self.centre and stats.pivot is not None and self.pivot_target is not None:
            shift = self.sum_target / stats.num_tokens - self.pivot_target.double()
            cross -= torch.outer(stats.mean - stats.pivot, shift)
        return stats.second_moment(centred=self.centre), cross


@dataclass
class CalibrationStats:
    """Everything that calibration measured; a value that can be saved and loaded.

    Attributes:
        targets: Statistics by (layer, target).
        num_samples: Samples used.
        num_tokens: Unpadded tokens used.
    """

    targets: dict[Key, TargetStatistics] = field(default_factory=dict)
    num_samples: int = 0
    num_tokens: int = 0

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file.

        Raises:
            SaveError: The file can't be written.
        """
        tensors = {
            f"{layer}.{target}.{name}": getattr(stats, name).contiguous()
            for (layer, target), stats in self.targets.items()
            for name in _TENSORS
            if getattr(stats, name) is not None
        }
        counts = {f"{layer}.{target}": stats.num_tokens for (layer, target), stats in self.targets.items()}
        header = {"num_samples": self.num_samples, "num_tokens": self.num_tokens, "counts": counts}
        try:
            save_file(tensors, path, metadata={"calibration_stats": json.dumps(header)})
        except (OSError, SafetensorError) as error:
            raise SaveError(
                f"{path} could not be written: {error}. Name a file in a writable folder with free space."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> CalibrationStats:
        """Read a file that [`save`][] wrote.

        Raises:
            DataError: The file is missing or is not a statistics file.
        """
        try:
            open_regular(path).close()  # safe_open would wait for a pipe
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["calibration_stats"])
                # Cloned: they map the file, and saving over it would invalidate them.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
            return cls(_group_by_target(tensors, header["counts"]), header["num_samples"], header["num_tokens"])
        except (OSError, AttributeError, LookupError, TypeError, ValueError, RecursionError, SafetensorError) as error:
            raise DataError(
                f"{path} is not a statistics file ({type(error).__name__}: {error}); write one with "
                f"CalibrationStats.save."
            ) from error


def _group_by_target(tensors: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> dict[Key, TargetStatistics]:
    targets: dict[Key, TargetStatistics] = {}
    for name, count in counts.items():
        layer, target = name.split(".")
        fields = {key: tensors[f"{name}.{key}"] for key in _TENSORS if f"{name}.{key}" in tensors}
        targets[int(layer), target] = TargetStatistics(num_tokens=count, **fields)
    return targets
