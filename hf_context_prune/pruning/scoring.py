"""Importance of units: which statistics a config needs, scores, and the units to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import NumericsError, error_context
from hf_context_prune.modeling.architectures import (
    TARGETS,
    Target,
    channel_scale,
    check_supported,
    input_magnitude,
    layers_of,
    output_projection,
    output_weight,
    unit_size,
)
from hf_context_prune.modeling.plan import LayerPlan
from hf_context_prune.modeling.specs import ArchSpec, Geometry, LayerWidths, read_geometry
from hf_context_prune.pruning.calibration.statistics import CalibrationStats, Key, TargetWeights

from .criteria import get_criterion
from .reconstruction import NEEDS_GRAM


def select_units(
    importance: Mapping[Key, torch.Tensor], geometry: Geometry, widths: Sequence[LayerWidths]
) -> tuple[LayerPlan, ...]:
    """Keep the most important units of every layer; of equals, the lower index.

    Args:
        importance: One value a unit, [units], for every (layer, target) that loses units.
        geometry: Sizes of the model.
        widths: Units to keep, one entry a layer.

    Raises:
        NumericsError: An importance is NaN or Inf.
    """
    layers = []
    for index, (dense, width) in enumerate(zip(geometry.layers, widths, strict=True)):
        kept = {}
        for target, total, count in (
            ("mlp", dense.neurons, width.neurons),
            ("attention", dense.kv_groups, width.kv_groups),
        ):
            if count == total:
                kept[target] = tuple(range(total))
                continue
            scores = importance[index, target]
            if not bool(torch.isfinite(scores).all()):
                raise NumericsError(f"The importance of layer {index} ({target}) holds NaN or Inf; nothing was chosen.")
            order = scores.argsort(descending=True, stable=True)[:count]
            kept[target] = tuple(sorted(order.tolist()))
        layers.append(LayerPlan(kept["mlp"], kept["attention"]))
    return tuple(layers)


def weights_of_layer(
    block: nn.Module, spec: ArchSpec, geometry: Geometry, target: Target, groups: int
) -> TargetWeights:
    """The weights of one target of a block, as a criterion sees them (the output weight is a view).

    Args:
        block: One transformer block.
        spec: The architecture.
        geometry: Sizes of the model.
        target: Which units.
        groups: KV groups of this block.
    """
    projection = output_projection(block, spec, target)
    return TargetWeights(
        output=output_weight(projection),
        unit_size=unit_size(geometry, target),
        input_magnitude=input_magnitude(block, spec, geometry, target, groups),
        has_bias=projection.bias is not None,
        channel_scale=channel_scale(block, spec, target),
    )


def needed_targets(config: PrunerConfig) -> tuple[Target, ...]:
    """Which units a config may remove."""
    total = config.has_total_budget
    if config.allocation == "adaptive" and total and config.mlp_ratio is None and config.attention_ratio is None:
        return TARGETS
    wanted: dict[Target, bool] = {
        "mlp": bool(config.mlp_ratio) or (total and config.mlp_ratio is None),
        "attention": bool(config.attention_ratio) or (total and config.mlp_ratio is not None),
    }
    return tuple(target for target in TARGETS if wanted[target])


def needed_statistics(config: PrunerConfig) -> frozenset[str]:
    """Which optional statistics a config's criterion and reconstruction read."""
    needs = set(get_criterion(config.criterion).needs)
    if config.reconstruction in NEEDS_GRAM or config.reconstruction == "sequential":
        needs.add("gram")
    return frozenset(needs)


def score_units(
    model: PreTrainedModel, stats: CalibrationStats, criterion: str, *, seed: int = 0
) -> dict[Key, torch.Tensor]:
    """Importance of every unit that the statistics cover.

    Args:
        model: The dense model.
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
    spec = check_supported(model)
    geometry, layers = read_geometry(model.config, spec), layers_of(model, spec)
    function = get_criterion(criterion).function
    importance = {}
    for (layer, target), statistics in stats.targets.items():
        groups = geometry.layers[layer].kv_groups
        weights = weights_of_layer(layers[layer], spec, geometry, target, groups)  # type: ignore[arg-type]
        with error_context(f"layer {layer} ({target})"):
            importance[layer, target] = function(weights.cpu(), statistics, generator)
    return importance
