"""Whether the native architecture can hold the widths of a plan, and the empty model that can."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from hf_context_prune import modeling

from .specs import ArchSpec, Geometry, LayerWidths, read_geometry


@dataclass(frozen=True)
class NativeFit:
    """Whether the native architecture can hold the pruned widths, and why or why not."""

    fits: bool
    reason: str


def _with_widths(config: PreTrainedConfig, spec: ArchSpec, geometry: Geometry) -> dict[str, Any]:
    values = config.to_dict()
    for key in ("model_type", "auto_map", "per_layer_config", "architectures"):
        values.pop(key, None)
    # Explicit, since hidden_size // num_attention_heads no longer gives it once heads are removed.
    values["head_dim"] = geometry.head_dim
    return values


def build_native_config(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> PreTrainedConfig:
    """The native config with uniform widths; its own validator may refuse them by raising."""
    geometry = read_geometry(config, spec)
    values = _with_widths(config, spec, geometry)
    values[spec.width] = widths[0].neurons
    values[spec.query_heads] = widths[0].kv_groups * geometry.queries_per_group
    if spec.kv_heads is not None:
        values[spec.kv_heads] = widths[0].kv_groups
    stock_class = getattr(transformers, spec.config_class)
    result: PreTrainedConfig = stock_class.from_dict({**values, "architectures": [spec.model_class]})
    result.validate()
    return result


def build_variable_config(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> PreTrainedConfig:
    """The variable-width config: dense values stay global, widths that differ go to ``per_layer_config``."""
    geometry = read_geometry(config, spec)
    values = _with_widths(config, spec, geometry)
    overrides: dict[int, dict[str, int]] = {}
    for index, layer in enumerate(widths):
        heads = layer.kv_groups * geometry.queries_per_group
        override = {spec.width: layer.neurons, spec.query_heads: heads}
        if spec.kv_heads is not None:
            override[spec.kv_heads] = layer.kv_groups
        overrides[index] = override
    variable_class = modeling.config_class(spec)
    result: PreTrainedConfig = variable_class.from_dict(
        {
            **values,
            "per_layer_config": overrides,
            "architectures": [modeling.model_class(spec).__name__],
            "auto_map": modeling.auto_map(spec),
        }
    )
    return result


def _shapes(model_class: type[Any], config: PreTrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def assess_native_fit(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> NativeFit:
    """Ask the native config and class themselves whether they can hold these widths.

    Args:
        config: Config of the model to be pruned.
        spec: Its table entry.
        widths: Widths after pruning, one a layer.
    """
    if len(set(widths)) > 1:
        return NativeFit(False, f"widths vary from layer to layer, which {spec.config_class} can't express")
    try:
        candidate = build_native_config(config, spec, widths)
    except (ValueError, StrictDataclassError) as error:
        message = " ".join(str(error.__cause__ or error).split())
        return NativeFit(False, f"{spec.config_class} refuses {widths[0].kv_groups} KV groups: {message}")
    try:
        stock_shapes = _shapes(getattr(transformers, spec.model_class), candidate)
    except ValueError as error:
        return NativeFit(False, f"{spec.model_class} refuses {widths[0].kv_groups} KV groups: {error}")
    if stock_shapes != _shapes(modeling.model_class(spec), build_variable_config(config, spec, widths)):
        return NativeFit(
            False,
            f"{spec.model_class} derives its head size from the number of heads, so it can't hold "
            f"{widths[0].kv_groups} heads of this size",
        )
    return NativeFit(True, f"all layers have the same widths and {spec.config_class} accepts them")


def build_empty_model(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> PreTrainedModel:
    """A model with these widths on the meta device: the native class where it fits, else the variable-width class."""
    if assess_native_fit(config, spec, widths).fits:
        target, model_class = build_native_config(config, spec, widths), getattr(transformers, spec.model_class)
    else:
        target, model_class = build_variable_config(config, spec, widths), modeling.model_class(spec)
    target._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        model: PreTrainedModel = model_class(target)
    return model
