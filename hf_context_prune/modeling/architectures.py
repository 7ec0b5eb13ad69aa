"""The prunable parts of a model, found through the [`ArchSpec`][] table.

Only this module and `modeling_context_pruned.py` turn a table entry into modules. All other code works on *targets*:
``"mlp"`` (units are neurons) and ``"attention"`` (units are KV groups), each with one output projection whose input
features belong to the units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_context_prune.errors import UnsupportedArchitectureError

from .experts import check_experts_plain, expert_cost
from .geometry import Geometry, LayerWidths, read_geometry
from .left_out import LEFT_OUT
from .modeling_context_pruned import is_transposed
from .paths import check_paths
from .specs import BUILT_IN, SPECS, ArchSpec, bare_name, base_model_type
from .wrapper_specs import WRAPPERS

Target = Literal["mlp", "attention"]
TARGETS: tuple[Target, ...] = ("mlp", "attention")
QUANTISED = (
    "Quantised weights can't be sliced exactly. Take the model that it was quantised from (a .gguf file is dequantised "
    "on loading), prune it, and quantise the result."
)
"""What a message says of a quantised model."""
Gradients = Mapping[int, torch.Tensor]
"""dL/dw by the id of the parameter, in float32 or better."""

UnitCosts = dict[str, int]
"""Parameters per unit, by target."""


def spec_of(config: PreTrainedConfig) -> ArchSpec:
    """Return the table entry of a config.

    Raises:
        UnsupportedArchitectureError: The table has no entry for ``config.model_type``, or one of a model of images and
            text, which is more than a causal LM.
    """
    spec = SPECS.get(base_model_type(config.model_type))
    if spec is None and base_model_type(config.model_type) in WRAPPERS:
        raise UnsupportedArchitectureError(
            f"A {config.model_type} model reads images beside text, and a causal LM is needed here. `prune` takes such "
            f"a model by its folder; code takes its text part out and puts it back by text_model and with_text of "
            f"hf_context_prune.modeling.wrappers."
        )
    if spec is None and (why := LEFT_OUT.get(config.model_type)) is not None:
        raise UnsupportedArchitectureError(f"The model type {config.model_type!r} is not supported: {why}.")
    if spec is None:
        raise UnsupportedArchitectureError(
            f"The model type {config.model_type!r} is not supported. Supported are: "
            f"{', '.join(sorted([*SPECS, *WRAPPERS]))}. `hf-context-prune check MODEL` looks whether it can be, and "
            f"prints the entry for register_architecture."
        )
    return spec


def check_supported(model: nn.Module) -> ArchSpec:
    """Return the table entry of a model, and refuse a model that can't be pruned in its present form.

    Args:
        model: A causal LM of `transformers` or of this package, with plain floating-point weights in memory.

    Raises:
        UnsupportedArchitectureError: The class is unknown or wrapped, or the weights are quantised, replaced by an
            adapter, on the meta device or shared by two layers.
        ConfigError: A registered entry has a path that the model lacks.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedArchitectureError(
            f"The model is a {type(model).__name__}, not a PreTrainedModel of transformers. Pass the model itself: "
            f"unwrap it first (model.module for DDP, model.merge_and_unload() for PEFT)."
        )
    spec = spec_of(model.config)
    if type(model).__name__.removeprefix("ContextPruned") != (expected := bare_name(spec.model_class)):
        raise UnsupportedArchitectureError(
            f"The model is a {type(model).__name__}; a {spec.model_type} model must be a {expected}. Load it "
            f"with AutoModelForCausalLM."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedArchitectureError(f"The model is quantised. {QUANTISED}")
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise UnsupportedArchitectureError(
                f"The weight {name} is on the meta device, which holds no numbers. Load the model with its weights; of "
                f"one that accelerate offloaded (device_map), prune, evaluate and recover read them from the disk."
            )
        if type(parameter) is not nn.Parameter:
            raise UnsupportedArchitectureError(
                f"The weight {name} is a {type(parameter).__name__}, not a plain parameter: a quantiser or a sharding "
                f"has replaced it. Load the model without a quantiser or sharding, prune, and quantise the result."
            )
        if not parameter.is_floating_point():
            raise UnsupportedArchitectureError(
                f"The weight {name} has dtype {parameter.dtype}; only floating-point weights can be pruned."
            )
    refuse_switches(model.config, spec)
    if spec.model_type not in BUILT_IN:
        check_paths(model, spec)
    widths = read_geometry(model.config, spec).layers
    owners: dict[int, int] = {}
    for index, layer in enumerate(layers_of(model, spec)):
        for name, parameter in layer.named_parameters():
            if (owner := owners.setdefault(id(parameter), index)) != index:
                raise UnsupportedArchitectureError(
                    f"Layers {owner} and {index} share the weight {spec.layers}.{index}.{name}, so neither can be "
                    f"pruned without the other. Give each a copy of its own first (copy.deepcopy of the module)."
                )
        modules = dict(layer.named_modules())
        for path in _projection_paths(spec, widths[index]):
            module = modules.get(path)
            if module is None:
                raise UnsupportedArchitectureError(
                    f"{spec.layers}.{index} has no {path}, so this layer is of another kind than those of "
                    f"{spec.model_type} that can be pruned."
                )
            if not _is_plain(module):
                raise UnsupportedArchitectureError(
                    f"{spec.layers}.{index}.{path} is of class {_qualified_name(module)}, no plain projection: an "
                    f"adapter or a quantiser has replaced it. Merge or unload it first (merge_and_unload() for PEFT), "
                    f"or load the model without a quantiser."
                )
        if widths[index].experts:
            check_experts_plain(layer, spec, widths[index].experts, f"{spec.layers}.{index}")
    return spec


def refuse_switches(config: PreTrainedConfig, spec: ArchSpec) -> None:
    """Refuse a model of a supported family by what its config switches on.

    Raises:
        UnsupportedArchitectureError: Names the attribute and the reason.
    """
    for name, why in spec.refused:
        if getattr(config, name):
            raise UnsupportedArchitectureError(
                f"This {spec.model_type} model has {name}={getattr(config, name)!r}: {why}, and only dense layers can "
                f"be pruned. Take a model of the family without."
            )


def _qualified_name(module: nn.Module) -> str:
    """Return a class with its module: adapters and quantisers have a Linear too."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_plain(module: nn.Module) -> bool:
    """Return whether a projection is what the model's own code builds; quantisers and adapters derive from Linear."""
    kind = type(module)
    native = issubclass(kind, nn.Linear) and kind.__module__.startswith("transformers.models.")  # Falcon has its own
    return kind is nn.Linear or native or is_transposed(module)


def _projection_paths(spec: ArchSpec, widths: LayerWidths) -> tuple[str, ...]:
    attention = (*(projection.path for projection in spec.attention_inputs), spec.attention_output)
    mlp = (*spec.mlp_inputs, spec.mlp_output) if widths.neurons else ()
    return (*mlp, *(attention if widths.kv_groups else ()))


def layers_of(model: nn.Module, spec: ArchSpec) -> list[nn.Module]:
    """Return the decoder layers of a causal LM, in order."""
    return list(model.get_submodule(spec.layers))  # type: ignore[arg-type]


def output_projection(layer: nn.Module, spec: ArchSpec, target: Target) -> nn.Module:
    """Return the projection that reads a target's units, such as ``down_proj`` or ``o_proj``."""
    return layer.get_submodule(spec.output_path(target))


def activation_of(layer: nn.Module, spec: ArchSpec) -> nn.Module:
    """Return the activation function of a layer's MLP.

    Raises:
        UnsupportedArchitectureError: The MLP calls a function, so there is no module to measure behind.
    """
    if spec.activation is None:
        raise UnsupportedArchitectureError(
            f"The MLP of a {spec.model_type} model calls its activation function without a module, so what it returns "
            f"can't be averaged. Thresholds can't be used; prune by a size (--pruning-ratio) instead."
        )
    return layer.get_submodule(spec.activation)


def output_weight(projection: nn.Module) -> torch.Tensor:
    """Return the weight of a projection as [out_features, in_features]; a view if it is stored transposed."""
    weight: torch.Tensor = projection.weight.detach()  # type: ignore[union-attr,operator,assignment]
    return weight.T if is_transposed(projection) else weight


def post_norm(layer: nn.Module, spec: ArchSpec, target: Target) -> nn.Module | None:
    """Return the norm between a target's output projection and the residual stream (Gemma 2 and 3), or None."""
    path = dict(spec.post_norms).get(target)
    module = None if path is None else getattr(layer, path, None)
    return None if isinstance(module, nn.Identity) else module


def norm_epsilon(norm: nn.Module) -> float:
    """Return what a norm adds to the mean square; families name it differently."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]


def channel_scale(layer: nn.Module, spec: ArchSpec, target: Target) -> torch.Tensor:
    """Return the output of [`post_norm`][] for a vector of ones (its gamma), or ones without one: [out_features, 1]."""
    ones = torch.ones_like(output_weight(output_projection(layer, spec, target))[:, :1])
    norm = post_norm(layer, spec, target)
    return ones if norm is None else norm(ones.T).detach().T


def is_parallel(config: PreTrainedConfig, spec: ArchSpec) -> bool:
    """Return whether attention and MLP of a layer both read the layer's input."""
    if isinstance(spec.parallel, bool):
        return spec.parallel
    return any(getattr(config, name) for name in spec.parallel)


def residual_scale(config: PreTrainedConfig, spec: ArchSpec) -> float:
    """Return the factor that scales a sub-layer's output before it is added to the residual stream."""
    return 1.0 if spec.residual_multiplier is None else float(getattr(config, spec.residual_multiplier))


def output_scale(layer: nn.Module) -> float:
    """Return the factor that scales a whole layer's output (Gemma 4)."""
    scalar = getattr(layer, "layer_scalar", None)
    return 1.0 if scalar is None else float(scalar)


def unit_size(geometry: Geometry, target: Target) -> int:
    """Return the number of input features of the output projection that belong to one unit."""
    return 1 if target == "mlp" else geometry.queries_per_group * geometry.head_dim


def _input_rows(
    layer: nn.Module, spec: ArchSpec, geometry: Geometry, target: Target, groups: int
) -> Iterator[tuple[nn.Module, list[list[int]] | None]]:
    """Yield each input projection with the output features of every unit (None: feature j is unit j)."""
    if target == "mlp":
        for path in spec.mlp_inputs:
            module = layer.get_submodule(path)
            rows = output_weight(module).shape[0]
            neurons = rows // spec.mlp_blocks
            yield module, None if rows == neurons else [list(range(unit, rows, neurons)) for unit in range(neurons)]
    else:
        for projection in spec.attention_inputs:
            rows = [geometry.projection_features(projection, [group], groups) for group in range(groups)]
            yield layer.get_submodule(projection.path), rows


def input_magnitude(
    layer: nn.Module,
    spec: ArchSpec,
    geometry: Geometry,
    target: Target,
    groups: int,
    gradients: Gradients | None = None,
) -> torch.Tensor:
    """Return the sum of |w| (or |w * grad|) over each unit's weights in the input projections, [units], float64.

    Args:
        layer: One decoder layer.
        spec: The architecture.
        geometry: Sizes of the model.
        target: Which units.
        groups: KV groups of this layer.
        gradients: dL/dw by the id of the weight; if given, |w * dL/dw| is summed instead of |w|.
    """
    total: torch.Tensor | None = None
    for module, rows in _input_rows(layer, spec, geometry, target, groups):
        per_feature = absolute_weight(module, gradients).sum(dim=1, dtype=torch.float64)
        part = per_feature if rows is None else per_feature[torch.tensor(rows)].sum(dim=1)
        total = part if total is None else total + part
    assert total is not None  # every ArchSpec has input projections
    return total


def absolute_weight(module: nn.Module, gradients: Gradients | None = None) -> torch.Tensor:
    """Return |w| (in the dtype of the weight) or |w * dL/dw| (float64) of a projection, [out_features, in_features]."""
    weight = output_weight(module)
    if gradients is None:
        return weight.abs()
    gradient = gradients[id(module.weight)]
    return (weight.double() * (gradient.T if is_transposed(module) else gradient).double()).abs()


def unit_costs(model: nn.Module, spec: ArchSpec, geometry: Geometry) -> UnitCosts:
    """Return the parameters removed with one neuron and with one KV group, from the shapes of the first such layer.

    Args:
        model: The model; its weights may be on the meta device.
        spec: The architecture.
        geometry: Sizes of the model.

    Returns:
        Parameters by target, and of a family with experts by ``"experts"``; 0 where no layer has such units.
    """
    costs: UnitCosts = {}
    for target in TARGETS:
        first = next((index for index, widths in enumerate(geometry.layers) if widths.of(target)), None)
        if first is None:
            costs[target] = 0
            continue
        layer = layers_of(model, spec)[first]
        total = unit_size(geometry, target) * output_weight(output_projection(layer, spec, target)).shape[0]
        inputs = (
            [(path, spec.mlp_blocks) for path in spec.mlp_inputs]
            if target == "mlp"
            else [(p.path, geometry.features_per_group(p)) for p in spec.attention_inputs]
        )
        if target == "attention":
            total += len(spec.head_parameters) * geometry.queries_per_group
        for path, features in inputs:
            module = layer.get_submodule(path)
            total += features * (output_weight(module).shape[1] + (module.bias is not None))
        costs[target] = total
    if spec.experts is not None:
        costs["experts"] = expert_cost(model, spec, geometry)
    return costs
