"""Model + plan -> smaller model, by exact slicing. Does not know why a unit was chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import SaveError
from hf_context_prune.modeling.architectures import (
    TARGETS,
    Target,
    check_supported,
    layers_of,
    output_projection,
    unit_size,
)
from hf_context_prune.modeling.modeling_context_pruned import is_transposed
from hf_context_prune.modeling.native_fit import build_empty
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.specs import ArchSpec, Geometry, read_geometry
from hf_context_prune.modeling.token_rows import renumber, token_rows, with_vocabulary


def _slice_projection(
    module: nn.Module, state: dict[str, torch.Tensor], name: str, *, rows: list[int] | None, columns: list[int] | None
) -> None:
    """Put the kept output features (rows) and input features (columns) of one projection into `state`."""
    weight = state[f"{name}.weight"]
    if is_transposed(module):
        rows_of_storage, columns_of_storage = columns, rows
    else:
        rows_of_storage, columns_of_storage = rows, columns
    if rows_of_storage is not None:
        weight = weight[torch.tensor(rows_of_storage, device=weight.device)]
    if columns_of_storage is not None:
        weight = weight[:, torch.tensor(columns_of_storage, device=weight.device)]
    state[f"{name}.weight"] = weight
    if rows is not None and f"{name}.bias" in state:
        bias = state[f"{name}.bias"]
        state[f"{name}.bias"] = bias[torch.tensor(rows, device=bias.device)]


def kept_features(geometry: Geometry, target: Target, units: Sequence[int]) -> list[int]:
    """Input features of the output projection that belong to the kept units, ascending."""
    size = unit_size(geometry, target)
    return [unit * size + feature for unit in units for feature in range(size)]


def _prune_layer(
    index: int,
    block: nn.Module,
    prefix: str,
    state: dict[str, torch.Tensor],
    spec: ArchSpec,
    geometry: Geometry,
    plan: PruningPlan,
    reconstruct: ReconstructFn | None,
) -> None:
    dense, kept = geometry.layers[index], plan.layers[index]
    for target in TARGETS:
        units = kept.kept(target)
        if len(units) == (dense.neurons if target == "mlp" else dense.kv_groups):
            continue
        if target == "mlp":
            for path in spec.mlp_inputs:
                _slice_projection(block.get_submodule(path), state, f"{prefix}.{path}", rows=list(units), columns=None)
        else:
            for projection in spec.attention_inputs:
                rows = geometry.projection_features(projection, units, dense.kv_groups)
                _slice_projection(
                    block.get_submodule(projection.path), state, f"{prefix}.{projection.path}", rows=rows, columns=None
                )
        path = spec.mlp_output if target == "mlp" else spec.attention_output
        name, module = f"{prefix}.{path}", output_projection(block, spec, target)
        features = kept_features(geometry, target, units)
        if reconstruct is None:
            _slice_projection(module, state, name, rows=None, columns=features)
            continue
        stored, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        weight, new_bias = reconstruct(index, target, stored.T if is_transposed(module) else stored, bias, features)
        weight = weight.to(stored.dtype)
        state[f"{name}.weight"] = weight.T.contiguous() if is_transposed(module) else weight.contiguous()
        if new_bias is not None:
            state[f"{name}.bias"] = new_bias.to(stored.dtype)


def _add_missing_biases(model: nn.Module, state: dict[str, torch.Tensor], spec: ArchSpec) -> str | None:
    """Give output projections the bias that a repair made although the architecture has none."""
    added = 0
    for index, block in enumerate(layers_of(model, spec)):
        for target in TARGETS:
            path = spec.mlp_output if target == "mlp" else spec.attention_output
            module = output_projection(block, spec, target)
            if module.bias is None and f"{spec.layers}.{index}.{path}.bias" in state:
                module.bias = nn.Parameter(torch.empty(module.weight.shape[0], device="meta"))  # type: ignore[union-attr,index]
                added += 1
    if not added:
        return None
    return (
        f"{added} output projections carry a bias that {spec.config_class} has no field for, so it would vanish on "
        f"reload. Prune with reconstruction='least_squares' (or 'none') to save; 'bias' on this architecture is for "
        f"measuring in memory."
    )


def apply_plan(
    model: PreTrainedModel, plan: PruningPlan, *, reconstruct: ReconstructFn | None = None
) -> PreTrainedModel:
    """Build the smaller model that a plan describes; the given model is left as it is.

    Args:
        model: The dense (or already pruned) model, on any device and in any floating-point dtype.
        plan: The kept units, made for this model.
        reconstruct: Called for every output projection that loses features; gives its new weight and bias. None: slice.

    Returns:
        A new model, with tensors of its own, of the native class where its config can express the widths, else of the
        variable-width class. Same dtype, device, training mode and generation config.

    Raises:
        PlanError: The plan was made for another model.
        UnsupportedArchitectureError: See [`check_supported`][].
    """
    spec = check_supported(model)
    geometry = read_geometry(model.config, spec)
    plan.check_fits(model, model.config.model_type, geometry)
    config = model.config
    if plan.vocabulary is not None:
        config = with_vocabulary(config, plan.vocabulary.kept)
    smaller = build_empty(config, spec, plan.widths)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tied = {name for name in (model.all_tied_weights_keys or {}) if name in state}
    for name in tied:
        del state[name]  # tied again below, so that the tensor exists once
    if plan.vocabulary is not None:
        for name in token_rows(model).keys() & state.keys():
            state[name] = state[name][torch.tensor(plan.vocabulary.kept, device=state[name].device)]
    for index, block in enumerate(layers_of(model, spec)):
        _prune_layer(index, block, f"{spec.layers}.{index}", state, spec, geometry, plan, reconstruct)
    unsavable = _add_missing_biases(smaller, state, spec)
    originals = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    for name, tensor in state.items():
        if tensor.untyped_storage().data_ptr() in originals:  # as it was, or a repair gave a view of it
            state[name] = tensor.clone()
    smaller.load_state_dict(state, strict=False, assign=True)
    smaller.tie_weights()
    _fill_buffers(model, smaller)
    left = [name for name, tensor in [*smaller.named_parameters(), *smaller.named_buffers()] if tensor.is_meta]
    assert not left, f"not filled: {left}"
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(name not in frozen)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    if plan.vocabulary is not None and smaller.generation_config is not None:
        renumber(smaller.generation_config, plan.vocabulary.new_ids)
    smaller.config.name_or_path = model.config.name_or_path
    if unsavable is not None:
        smaller._context_prune_unsavable = unsavable
        smaller.save_pretrained = partial(_refuse_to_save, unsavable)  # type: ignore[method-assign]
    return smaller.train(model.training)


def kept_entries(model: PreTrainedModel, plan: PruningPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """Where the entries of every narrower weight come from, block by block: for states that belong to weights.

    Args:
        model: As it is before the plan is applied.
        plan: Made for it; its vocabulary is not looked at.

    Yields:
        (name of the parameter, flat indices into it, int64 in the shape that it has after the plan).
    """
    spec = check_supported(model)
    geometry = read_geometry(model.config, spec)
    for index, block in enumerate(layers_of(model, spec)):
        prefix = f"{spec.layers}.{index}"
        places = {
            f"{prefix}.{name}": torch.arange(parameter.numel()).view(parameter.shape)
            for name, parameter in block.named_parameters()
        }
        shapes = {name: tensor.shape for name, tensor in places.items()}
        _prune_layer(index, block, prefix, places, spec, geometry, plan, None)
        for name, tensor in places.items():
            if tensor.shape != shapes[name]:
                yield name, tensor


def _refuse_to_save(reason: str, *_: object, **__: object) -> None:
    """Stands in for `save_pretrained` (also of the Trainer and `push_to_hub`) where something would vanish on reload.

    Raises:
        SaveError: Always.
    """
    raise SaveError(f"This model can't be saved so that it reloads as it is: {reason}")


def _fill_buffers(source: nn.Module, target: PreTrainedModel) -> None:
    """Buffers depend on head_dim and hidden size alone, so they carry over.

    Those that are computed and never saved (rotary tables) are computed anew, as `from_pretrained` does, in float32:
    a source that was cast with `.to(bfloat16)` has them rounded, and a copy would not be what the folder reloads to.
    """
    modules = dict(target.named_modules())
    for path, module in source.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        if not buffers:
            continue
        mirror, computed = modules[path], module._non_persistent_buffers_set
        if set(buffers) <= computed and not list(module.parameters(recurse=False)):
            mirror.to_empty(device=next(iter(buffers.values())).device)
            target._init_weights(mirror)
            continue
        for name, buffer in buffers.items():
            mirror.register_buffer(name, buffer.clone(), persistent=name not in computed)


ReconstructFn = Callable[
    [int, str, torch.Tensor, torch.Tensor | None, list[int]], tuple[torch.Tensor, torch.Tensor | None]
]
"""(layer, target, W [out, in], bias [out] or None, kept features) -> (new W [out, kept], new bias or None)."""
