"""Build the smaller model of a plan by exact slicing; why a unit was chosen does not matter here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import SaveError
from hf_context_prune.modeling.architectures import TARGETS, Target, layers_of, output_projection, unit_size
from hf_context_prune.modeling.buffers import fill_buffers
from hf_context_prune.modeling.configuration_context_pruned import has_tied_head
from hf_context_prune.modeling.depth import new_name, shorten_config
from hf_context_prune.modeling.expert_neurons import narrow_config, narrow_experts
from hf_context_prune.modeling.experts import check_experts_of_plan, expert_slices, experts_spec
from hf_context_prune.modeling.geometry import Geometry
from hf_context_prune.modeling.layer_device import run_layers_alike
from hf_context_prune.modeling.modeling_context_pruned import is_transposed
from hf_context_prune.modeling.native_fit import build_empty_model
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.specs import ArchSpec
from hf_context_prune.modeling.token_rows import build_vocabulary_config, renumber_token_ids, token_rows
from hf_context_prune.modeling.tying import config_as_tied, head_weight_name
from hf_context_prune.modeling.view import ModelView

State = dict[str, torch.Tensor]
"""Tensors of a model by name."""

ReconstructFn = Callable[
    [int, str, torch.Tensor, torch.Tensor | None, list[int]], tuple[torch.Tensor, torch.Tensor | None]
]
"""(layer, target, W [out, in], bias [out] or None, kept features) -> (new W [out, kept], new bias or None)."""
KeepFn = Callable[[int, State], State]
"""(layer, its tensors by their names in the smaller model) -> the same tensors, in memory or mapped from a file."""


def apply_plan(
    model: PreTrainedModel,
    plan: PruningPlan,
    *,
    reconstruct: ReconstructFn | None = None,
    keep: KeepFn | None = None,
    share: bool = False,
) -> PreTrainedModel:
    """Build the smaller model that a plan describes; the given model is unchanged.

    Args:
        model: The base (or an already pruned) model, on any device and in any floating-point dtype.
        plan: The kept units, made for this model.
        reconstruct: Called for every output projection that loses features, and for that of the MLP before removed
            layers; returns its new weight and bias. None: slice.
        keep: Called for every layer once it is narrowed, so that no more than one lies in memory; see [`KeepFn`][].
            None: all lie in memory.
        share: Let the new model share the tensors that do not change. Neither may then be changed in place.

    Returns:
        A new model, with tensors of its own, of the native class where its config can express the widths, else of the
        variable-width class. Same dtype, device, training mode and generation config. Its LM head is tied to the
        embedding where the given model's is tied in memory, and its config says so.

    Raises:
        PlanError: The plan was made for another model, or leaves a layer too few experts.
        UnsupportedArchitectureError: See [`check_supported`][]; or the plan removes whole layers of a model that needs
            them all.
    """
    view = ModelView.of(model)
    plan.check_fits(model, model.config.model_type, view.geometry)
    check_experts_of_plan(model.config, view.spec, plan)
    config = config_as_tied(model)
    if plan.expert_neurons is not None:
        inside = plan.expert_neurons
        config = narrow_config(config, experts_spec(view.spec), (inside.width, inside.shared_width))
    if plan.removed_layers:
        config = shorten_config(config, view.spec, plan.kept_layers)
    if plan.vocabulary is not None:
        config = build_vocabulary_config(config, plan.vocabulary.kept)
    smaller = build_empty_model(config, view.spec, plan.kept_widths)
    state = _sliced_state(view, plan, reconstruct, keep, share=share)
    unsavable = _add_missing_biases(smaller, state, view.spec)
    smaller.load_state_dict(state, strict=False, assign=True)
    smaller.tie_weights()
    fill_buffers(model, smaller, partial(new_name, layers=view.spec.layers, kept=plan.kept_layers))
    left = [name for name, tensor in [*smaller.named_parameters(), *smaller.named_buffers()] if tensor.is_meta]
    assert not left, f"not filled: {left}"
    _copy_settings(view, smaller, plan)
    if unsavable is not None:
        smaller._context_prune_unsavable = unsavable
        smaller.save_pretrained = partial(_refuse_to_save, unsavable)  # type: ignore[method-assign]
    return smaller.train(model.training)


def _sliced_state(
    view: ModelView, plan: PruningPlan, reconstruct: ReconstructFn | None, keep: KeepFn | None, *, share: bool
) -> State:
    """Return the tensors of the smaller model; a tied head is left to `tie_weights`."""
    model = view.model
    rest = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    originals = {tensor.untyped_storage().data_ptr() for tensor in rest.values()}

    def own(state: State) -> State:
        # A tensor may be unchanged, or `reconstruct` may have returned a view of the old one.
        return {
            name: tensor if share or tensor.untyped_storage().data_ptr() not in originals else tensor.clone()
            for name, tensor in state.items()
        }

    if has_tied_head(model):
        del rest[head_weight_name(model)]
    if plan.vocabulary is not None:
        for name in token_rows(model).keys() & rest.keys():
            rest[name] = rest[name][torch.tensor(plan.vocabulary.kept, device=rest[name].device)]
    finished: State = {}
    for index, layer in enumerate(view.layers):
        prefix = f"{view.spec.layers}.{index}"
        state = {name: rest.pop(name) for name in [f"{prefix}.{name}" for name in layer.state_dict()]}
        if (new := new_name(prefix, view.spec.layers, plan.kept_layers)) is None:
            continue
        _prune_layer(view, index, state, plan, reconstruct)
        state = own({f"{new}{name.removeprefix(prefix)}": tensor for name, tensor in state.items()})
        finished |= state if keep is None else keep(index, state)
    return {**own(rest), **finished}


def _prune_layer(
    view: ModelView, index: int, state: State, plan: PruningPlan, reconstruct: ReconstructFn | None
) -> None:
    """Narrow the tensors of one layer in `state`; of one before removed layers, have the MLP reconstructed anyway."""
    spec, geometry, layer = view.spec, view.geometry, view.layers[index]
    prefix, kept = f"{spec.layers}.{index}", plan.layers[index]
    repaired = reconstruct is not None and index + 1 in plan.removed_layers and bool(view.widths[index].neurons)
    if spec.experts is not None and len(kept.experts) < view.widths[index].experts:
        for name, tensor, dimension in expert_slices(layer, spec.experts):
            if (full := f"{prefix}.{name}") in state:
                state[full] = state[full].index_select(dimension, torch.tensor(kept.experts, device=tensor.device))
    if plan.expert_neurons is not None:
        narrow_experts(state, prefix, experts_spec(spec), plan.expert_neurons, index)
    for target in TARGETS:
        units = kept.kept(target)
        if len(units) == view.num_units(index, target) and not (repaired and target == "mlp"):
            continue
        if target == "mlp":
            neurons = view.num_units(index, target)
            rows = [block * neurons + unit for block in range(spec.mlp_blocks) for unit in units]
            inputs = [(path, rows) for path in spec.mlp_inputs]
        else:
            groups = view.widths[index].kv_groups
            inputs = [(p.path, geometry.projection_features(p, units, groups)) for p in spec.attention_inputs]
            heads = torch.tensor([head for group in units for head in geometry.head_range(group, "query")])
            for path in spec.head_parameters:
                state[f"{prefix}.{path}"] = state[f"{prefix}.{path}"][heads.to(state[f"{prefix}.{path}"].device)]
        for path, rows in inputs:
            _slice_projection(layer.get_submodule(path), state, f"{prefix}.{path}", rows=rows, columns=None)
        name, module = f"{prefix}.{spec.output_path(target)}", view.output_projection(index, target)
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


def _slice_projection(
    module: nn.Module, state: State, name: str, *, rows: list[int] | None, columns: list[int] | None
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
    """Return the input features of the output projection that belong to the kept units, ascending."""
    size = unit_size(geometry, target)
    return [unit * size + feature for unit in units for feature in range(size)]


def kept_entries(model: PreTrainedModel, plan: PruningPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield, layer by layer, where the entries of every narrower weight come from: for states that belong to weights.

    Args:
        model: The model before the plan is applied.
        plan: A plan for this model; its vocabulary is ignored.

    Yields:
        (name of the parameter, flat indices into the parameter, int64, in its shape after the plan).
    """
    view = ModelView.of(model)
    for index, layer in enumerate(view.layers):
        if plan.layers[index].gone:
            continue
        places = {
            f"{view.spec.layers}.{index}.{name}": torch.arange(parameter.numel()).view(parameter.shape)
            for name, parameter in layer.named_parameters()
        }
        shapes = {name: tensor.shape for name, tensor in places.items()}
        _prune_layer(view, index, places, plan, None)
        for name, tensor in places.items():
            if tensor.shape != shapes[name]:
                yield name, tensor


def _add_missing_biases(model: nn.Module, state: State, spec: ArchSpec) -> str | None:
    """Give output projections the biases that a reconstruction added although the architecture has none.

    Returns:
        Why the model can't be saved; None if no bias was added.
    """
    added = 0
    for index, layer in enumerate(layers_of(model, spec)):
        for target in TARGETS:
            if f"{spec.layers}.{index}.{spec.output_path(target)}.bias" not in state:
                continue
            module = output_projection(layer, spec, target)
            if module.bias is None:
                module.bias = nn.Parameter(torch.empty(module.weight.shape[0], device="meta"))  # type: ignore[union-attr,index]
                added += 1
    if not added:
        return None
    return (
        f"{added} output projections carry a bias that {spec.config_class} has no field for, so it would vanish on "
        f"reload. Prune with reconstruction='least_squares' (or 'none') to save; 'bias' on this architecture is for "
        f"measuring in memory."
    )


def _copy_settings(view: ModelView, smaller: PreTrainedModel, plan: PruningPlan) -> None:
    """Copy frozen flags, generation config (with new token ids) and name."""
    model, layers, kept = view.model, view.spec.layers, plan.kept_layers
    frozen = {
        new_name(name, layers, kept) for name, parameter in model.named_parameters() if not parameter.requires_grad
    }
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(name not in frozen)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    run_layers_alike(model, smaller)
    if plan.vocabulary is not None and smaller.generation_config is not None:
        renumber_token_ids(smaller.generation_config, plan.vocabulary.new_ids)
    smaller.config.name_or_path = model.config.name_or_path


def _refuse_to_save(reason: str, *_: object, **__: object) -> None:
    """Replace `save_pretrained` (also of the Trainer and `push_to_hub`) where something would vanish on reload.

    Raises:
        SaveError: Always.
    """
    raise SaveError(f"This model can't be saved so that it reloads as it is: {reason}")
