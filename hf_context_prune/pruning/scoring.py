"""Importance of units: which statistics a config needs, scores, and the units to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import NumericsError, error_context
from hf_context_prune.modeling.architectures import (
    TARGETS,
    Target,
    channel_scale,
    input_magnitude,
    output_projection,
    output_weight,
    unit_size,
)
from hf_context_prune.modeling.geometry import Geometry, LayerWidths
from hf_context_prune.modeling.plan import LayerPlan
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.statistics import CalibrationStats, Key, TargetWeights

from .criteria import Criterion, get_criterion
from .reconstruction import NEEDS_GRAM, Reconstruction, get_reconstruction


def top_units(scores: torch.Tensor, count: int, where: str) -> tuple[int, ...]:
    """Return the `count` units with the highest scores, ascending; of equals, the lower index.

    Args:
        scores: Importance, [units].
        count: How many units stay.
        where: Layer and target, for the message.

    Raises:
        NumericsError: A score is NaN or Inf.
    """
    if not bool(torch.isfinite(scores).all()):
        raise NumericsError(f"The importance of {where} holds NaN or Inf; nothing was chosen.")
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


def select_units(
    importance: Mapping[Key, torch.Tensor], geometry: Geometry, widths: Sequence[LayerWidths]
) -> tuple[LayerPlan, ...]:
    """Keep the most important units of every layer; of equals, the lower index.

    Args:
        importance: One value per unit, [units], for every (layer, target) that loses units.
        geometry: Sizes of the model.
        widths: Units to keep, one entry per layer.

    Raises:
        NumericsError: An importance is NaN or Inf.
    """

    def kept(index: int, base: LayerWidths, width: LayerWidths, target: Target) -> tuple[int, ...]:
        total, count = base.of(target), width.of(target)
        if count == total:
            return tuple(range(total))
        return top_units(importance[index, target], count, f"layer {index} ({target})")

    return tuple(
        LayerPlan(kept(index, base, width, "mlp"), kept(index, base, width, "attention"), tuple(range(base.experts)))
        for index, (base, width) in enumerate(zip(geometry.layers, widths, strict=True))
    )


def weights_of_layer(view: ModelView, index: int, target: Target, layer: nn.Module | None = None) -> TargetWeights:
    """Return the weights of one target of a layer, as a criterion sees them (the output weight is a view).

    Args:
        view: The model.
        index: Which layer.
        target: Which units.
        layer: A copy of the layer with other weights; None: the model's own.
    """
    layer, spec, groups = layer or view.layers[index], view.spec, view.widths[index].kv_groups
    projection = output_projection(layer, spec, target)
    return TargetWeights(
        output=output_weight(projection),
        unit_size=unit_size(view.geometry, target),
        input_magnitude=input_magnitude(layer, spec, view.geometry, target, groups),
        has_bias=projection.bias is not None,
        channel_scale=channel_scale(layer, spec, target),
    )


@dataclass(frozen=True)
class Requirements:
    """What a config needs of the calibration, and what it chooses and reconstructs with.

    Attributes:
        targets: Units that the config may remove.
        statistics: Optional statistics that the criterion and the reconstruction read.
        criterion: Ranks the units.
        reconstruction: Refits the output projections from the statistics of one pass. For `sequential`, which has no
            such function, it is `least_squares`: the first approximation where widths or a size are searched.
    """

    targets: tuple[Target, ...]
    statistics: frozenset[str]
    criterion: Criterion
    reconstruction: Reconstruction

    @classmethod
    def of(cls, config: PrunerConfig) -> Requirements:
        """Read the requirements of a config."""
        criterion, sequential = get_criterion(config.criterion), config.reconstruction == "sequential"
        name = "least_squares" if sequential else config.reconstruction
        gram = frozenset({"gram"}) if name in NEEDS_GRAM else frozenset()
        return cls(_targets(config), criterion.needs | gram, criterion, get_reconstruction(name))


def _targets(config: PrunerConfig) -> tuple[Target, ...]:
    total = config.has_total_budget
    if config.shares_budget:
        listed: dict[Target, bool] = {"mlp": config.lists("neurons"), "attention": config.lists("kv_groups")}
        return tuple(target for target in TARGETS if listed[target])
    wanted: dict[Target, bool] = {
        "mlp": bool(config.mlp_ratio) or (total and config.mlp_ratio is None),
        "attention": bool(config.attention_ratio) or (total and config.mlp_ratio is not None),
    }
    return tuple(target for target in TARGETS if wanted[target])


def score_units(
    model: PreTrainedModel, stats: CalibrationStats, criterion: str, *, seed: int = 0
) -> dict[Key, torch.Tensor]:
    """Return the importance of every unit that the statistics cover.

    Args:
        model: The base model.
        stats: From [`calibrate`][], with what the criterion needs.
        criterion: A name of `CRITERIA`.
        seed: For the `random` criterion.

    Returns:
        [units] float64 on the CPU, by (layer, target); higher is kept.
    """
    return score_with(model, stats, criterion, torch.Generator().manual_seed(seed))


def score_with(
    model: PreTrainedModel, stats: CalibrationStats, criterion: str, generator: torch.Generator
) -> dict[Key, torch.Tensor]:
    """Score units as [`score_units`][] does, with a random generator that the caller keeps."""
    view, function = ModelView.of(model), get_criterion(criterion).function
    importance = {}
    for (layer, target), statistics in stats.targets.items():
        weights = weights_of_layer(view, layer, target)  # type: ignore[arg-type]
        with error_context(f"layer {layer} ({target})"):
            importance[layer, target] = function(weights.cpu(), statistics, generator)
    return importance
