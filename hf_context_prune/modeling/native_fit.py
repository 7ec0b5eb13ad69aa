"""The fit of a plan's widths into the native architecture, and the empty model that holds them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from hf_context_prune.utils.compat import copy_attention_implementation

from .configuration_context_pruned import native_class, native_overrides
from .geometry import Geometry, LayerWidths, read_geometry, shared_kv_heads, width_factor
from .registry import build_auto_map, get_config_class, get_model_class
from .specs import ArchSpec, bare_name


@dataclass(frozen=True)
class NativeFit:
    """Whether the native architecture can hold the pruned widths, and the reason."""

    fits: bool
    reason: str


def values_for_another_class(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the values of a config without those that belong to its class, native or of variable width."""
    own = ("model_type", "auto_map", "per_layer_config", "architectures")
    return {name: value for name, value in config.to_dict().items() if name not in own}


def _with_widths(config: PreTrainedConfig, spec: ArchSpec, geometry: Geometry) -> dict[str, Any]:
    values = values_for_another_class(config)
    if spec.native_overrides:
        values["per_layer_config"] = native_overrides(config, spec)
    elif not isinstance(getattr(type(config), "head_dim", None), property):  # Falcon computes it from the dense values
        # Explicit, because hidden_size // num_attention_heads gives another value once heads are removed.
        values["head_dim"] = geometry.head_dim
    if spec.computed_width is not None:
        values |= {spec.computed_width: False, spec.width: max(layer.neurons for layer in geometry.layers)}
    return values


def _head_counts(config: PreTrainedConfig, spec: ArchSpec, geometry: Geometry, kv_groups: int) -> dict[str, int]:
    """Return the config attributes that give a layer its heads; none where its heads can't be removed."""
    if not kv_groups or shared_kv_heads(config, spec) is not None:
        return {}
    counts = {spec.query_heads: kv_groups * geometry.queries_per_group}
    return counts if spec.kv_heads is None else {**counts, spec.kv_heads: kv_groups}


def _common_width(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> dict[str, int] | None:
    """Return the config attributes that give all layers their neurons; None where the neurons vary."""
    factors = [width_factor(config, spec, index) for index in range(len(widths))]
    if max(factors) > 1:
        bases = {divmod(layer.neurons, factor) for layer, factor in zip(widths, factors, strict=True)}
        if len(bases) == 1 and next(iter(bases))[1] == 0:
            return {spec.width: next(iter(bases))[0], str(spec.computed_width): True}
    neurons = {layer.neurons for layer in widths} - ({0} if spec.experts else set())
    return {spec.width: neurons.pop()} if len(neurons) == 1 else None if neurons else {}


def _common_experts(spec: ArchSpec, widths: Sequence[LayerWidths]) -> dict[str, int]:
    """Return the config attribute that gives all layers with experts the same number; none where numbers vary."""
    counts = {layer.experts for layer in widths if layer.experts}
    return {spec.experts.count: counts.pop()} if spec.experts and len(counts) == 1 else {}


def build_native_config(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> PreTrainedConfig:
    """Return the native config with uniform widths; its own validator raises if it refuses them."""
    geometry = read_geometry(config, spec)
    values = _with_widths(config, spec, geometry)
    values |= _common_width(config, spec, widths) or {}
    values |= _head_counts(config, spec, geometry, max(layer.kv_groups for layer in widths))
    values |= _common_experts(spec, widths)
    values["architectures"] = [bare_name(spec.model_class)]
    result: PreTrainedConfig = native_class(spec.config_class).from_dict(values)
    result.validate()
    return result


def build_variable_config(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> PreTrainedConfig:
    """Return the variable-width config: dense values stay global, the widths go to ``per_layer_config``."""
    geometry = read_geometry(config, spec)
    values = _with_widths(config, spec, geometry)
    native, experts = native_overrides(config, spec), _common_experts(spec, widths)
    overrides = {
        index: native.get(index, {})
        | ({spec.width: layer.neurons} if layer.neurons else {})
        | ({spec.experts.count: layer.experts} if spec.experts and layer.experts and not experts else {})
        | _head_counts(config, spec, geometry, layer.kv_groups)
        for index, layer in enumerate(widths)
    }
    variable_class = get_config_class(spec)
    result: PreTrainedConfig = variable_class.from_dict(
        {
            **values,
            **experts,
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
    groups = {layer.kv_groups for layer in widths if layer.kv_groups}
    vary = len({layer.experts for layer in widths if layer.experts}) > 1
    if _common_width(config, spec, widths) is None or len(groups) > 1 or vary:
        return NativeFit(False, f"widths vary from layer to layer, which {spec.config_class} can't express")
    try:
        candidate = build_native_config(config, spec, widths)
    except (ValueError, StrictDataclassError) as error:
        message = " ".join(str(error.__cause__ or error).split())
        return NativeFit(False, f"{spec.config_class} refuses {max(groups, default=0)} KV groups: {message}")
    try:
        native_shapes = _shapes(native_class(spec.model_class), candidate)
    except ValueError as error:
        return NativeFit(False, f"{spec.model_class} refuses {max(groups, default=0)} KV groups: {error}")
    if native_shapes != _shapes(get_model_class(spec), build_variable_config(config, spec, widths)):
        return NativeFit(
            False,
            f"{spec.model_class} derives its head size from the number of heads, so it can't hold "
            f"{max(groups, default=0)} heads of this size",
        )
    return NativeFit(True, f"all layers have the same widths and {spec.config_class} accepts them")


def build_empty_model(config: PreTrainedConfig, spec: ArchSpec, widths: Sequence[LayerWidths]) -> PreTrainedModel:
    """Build a model with these widths on the meta device: of the native class if it fits, else variable-width."""
    if assess_native_fit(config, spec, widths).fits:
        target, model_class = build_native_config(config, spec, widths), native_class(spec.model_class)
    else:
        target, model_class = build_variable_config(config, spec, widths), get_model_class(spec)
    copy_attention_implementation(config, target)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(target)
    return model
