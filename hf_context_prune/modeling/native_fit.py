"""The fit of a plan's widths into the native architecture, and the empty model that holds them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from hf_context_prune.utils.compat import copy_attention_implementation

from .registry import build_auto_map, get_config_class, get_model_class
from .specs import ArchSpec, Geometry, LayerWidths, read_geometry


@dataclass(frozen=True)
class NativeFit:
    """Whether the native architecture can hold the pruned widths, and the reason."""

    fits: bool
    reason: str


def _with_widths(config: PreTrainedConfig, spec: ArchSpec, geometry: Geometry) -> dict[str, Any]:
    values = config.to_dict()
    for key in ("model_type", "auto_map", "per_layer_config", "architectures"):
        values.pop(key, None)
    # Explicit, because hidden_size // num_attention_heads gives another value once heads are removed.
    values["head_dim"] = geometry.head_dim
    return values


def build_native_config(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> PreTrainedConfig:
    """Return the native config with uniform widths; its own validator raises if it refuses them."""
    geometry = read_geometry(config, spec)
    values = _with_widths(config, spec, geometry)
    values[spec.width] = widths[0].neurons
    values[spec.query_heads] = widths[0].kv_groups * geometry.queries_per_group
    if spec.kv_heads is not None:
        values[spec.kv_heads] = widths[0].kv_groups
    native_class = getattr(transformers, spec.config_class)
    result: PreTrainedConfig = native_class.from_dict({**values, "architectures": [spec.model_class]})
    result.validate()
    return result


def build_variable_config(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> PreTrainedConfig:
    """Return the variable-width config: dense values stay global, the widths go to ``per_layer_config``."""
    geometry = read_geometry(config, spec)
    values = _with_widths(config, spec, geometry)
    overrides: dict[int, dict[str, int]] = {}
    for index, layer in enumerate(widths):
        heads = layer.kv_groups * geometry.queries_per_group
        override = {spec.width: layer.neurons, spec.query_heads: heads}
        if spec.kv_heads is not None:
            override[spec.kv_heads] = layer.kv_groups
        overrides[index] = override
    variable_class = get_config_class(spec)
    result: PreTrainedConfig = variable_class.from_dict(
        {
            **values,
            "per_layer_config": overrides,
            "architectures": [get_model_class(spec).__name__],
            "auto_map": build_auto_map(spec),
        }
    )
    return result


def _shapes(model_class: type[Any], config: PreTrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def assess_native_fit(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> NativeFit:
    """Find out whether the native config and class can hold these widths, by building both.

    Args:
        config: Config of the model before pruning.
        spec: The architecture.
        widths: Widths after pruning, one per layer.
    """
    if len(set(widths)) > 1:
        return NativeFit(False, f"widths vary from layer to layer, which {spec.config_class} can't express")
    try:
        candidate = build_native_config(config, spec, widths)
    except (ValueError, StrictDataclassError) as error:
        message = " ".join(str(error.__cause__ or error).split())
        return NativeFit(False, f"{spec.config_class} refuses {widths[0].kv_groups} KV groups: {message}")
    try:
        native_shapes = _shapes(getattr(transformers, spec.model_class), candidate)
    except ValueError as error:
        return NativeFit(False, f"{spec.model_class} refuses {widths[0].kv_groups} KV groups: {error}")
    if native_shapes != _shapes(get_model_class(spec), build_variable_config(config, spec, widths)):
        return NativeFit(
            False,
            f"{spec.model_class} derives its head size from the number of heads, so it can't hold "
            f"{widths[0].kv_groups} heads of this size",
        )
    return NativeFit(True, f"all layers have the same widths and {spec.config_class} accepts them")


def build_empty_model(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> PreTrainedModel:
    """Build a model with these widths on the meta device: of the native class if it fits, else variable-width."""
    if assess_native_fit(config, spec, widths).fits:
        target, model_class = build_native_config(config, spec, widths), getattr(transformers, spec.model_class)
    else:
        target, model_class = build_variable_config(config, spec, widths), get_model_class(spec)
    copy_attention_implementation(config, target)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(target)
    return model
