"""Put a narrower model into a wide one, in place: every reference to the model and its optimizer stays valid."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel

from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.geometry import ALL_UNITS
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan
from hf_context_prune.modeling.tying import first_names
from hf_context_prune.pruning.surgery import kept_entries

from .optimizer import clear_entries, map_state, replace_parameters


def check_modules(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Refuse a model with other modules or weights than its class makes: a narrower model could not be put into it.

    Args:
        model: The model that the Trainer holds.
        smaller: A model of the same class, just built, of any widths; may be on the meta device.

    Raises:
        ConfigError: Names the first module or weight that differs.
    """
    old, new = ({name: type(module) for name, module in each.named_modules() if name} for each in (model, smaller))
    for name in [*old, *new]:
        if old.get(name) is not new.get(name):
            has, makes = (kinds[name].__name__ if name in kinds else "nothing" for kinds in (old, new))
            raise ConfigError(
                f"The module {name} of the model is {has}, where {type(smaller).__name__} has {makes}: modules that "
                f"were added or replaced (such as Liger kernels) can't be narrowed. Train without them."
            )
    own, made = first_names(model), first_names(smaller)
    for name in [*own, *made]:
        if own.get(name) != made.get(name):
            raise ConfigError(
                f"The weight {name} of the model is {_describe_sharing(name, own)}, where {type(smaller).__name__} has "
                f"it {_describe_sharing(name, made)}: weights that were added, tied or renamed (weight_norm, "
                f"torch.nn.utils.prune) can't be narrowed. Train without them."
            )


def _describe_sharing(name: str, sharing: dict[str, str]) -> str:
    if name not in sharing:
        return "missing"
    return "a weight of its own" if sharing[name] == name else f"the same as {sharing[name]}"


def transplant(model: PreTrainedModel, smaller: PreTrainedModel) -> dict[nn.Parameter, nn.Parameter]:
    """Give `model` the class, config, sizes and weights of `smaller`. Hooks and other attributes of modules stay.

    Args:
        model: Changed in place.
        smaller: From `apply_plan` of `model`, of the same modules; not to be used afterwards.

    Returns:
        {old parameter: new parameter} of the weights that got narrower; all other weights are written into, and keep
        their hooks.
    """
    old, new = dict(model.named_modules()), dict(smaller.named_modules())
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in old.items():
        twin = new[name]
        for key, value in twin.__dict__.items():
            size = isinstance(value, int) and not isinstance(value, bool)
            # The twin is built from the config, into which a Trainer writes its tokenizer's padding token: its
            # `padding_idx` would then freeze a row that has been trained until now.
            if not key.startswith("_") and key != "padding_idx" and (size or isinstance(value, PreTrainedConfig)):
                module.__dict__[key] = value
        for key, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            counterpart = twin.get_parameter(key)
            if parameter.shape == counterpart.shape:
                parameter.data.copy_(counterpart.detach())
            else:
                replaced[parameter] = counterpart
                setattr(module, key, counterpart)
    model.__class__ = type(smaller)
    return replaced


def scatter(parameter: nn.Parameter, narrow: torch.Tensor, places: torch.Tensor) -> None:
    """Write a narrow weight into its places in the wide weight, and zero all other entries.

    Args:
        parameter: The wide weight, changed in place.
        narrow: The narrow weight.
        places: Flat indices into the wide weight, int64 in the shape of the narrow weight.
    """
    parameter.data.zero_()
    parameter.data.view(-1)[places.to(parameter.device).flatten()] = narrow.to(parameter).flatten()


def narrow_in_place(model: PreTrainedModel, optimizer: Optimizer, plan: PruningPlan, smaller: PreTrainedModel) -> None:
    """Cut the removed units out of a model and of the state of its optimizer.

    Args:
        model: Changed in place.
        optimizer: Trains `model`; changed in place.
        plan: Made for `model`.
        smaller: From `apply_plan` of `model` and `plan`; not to be used afterwards.
    """
    check_modules(model, smaller)
    own = dict(model.named_parameters())
    map_state(optimizer, ((own[name], places) for name, places in kept_entries(model, plan)))
    replace_parameters(optimizer, transplant(model, smaller))


def zero_in_place(model: PreTrainedModel, optimizer: Optimizer, plan: PruningPlan, smaller: PreTrainedModel) -> None:
    """Zero the removed units of a model, on both sides: no gradient reaches them, and nothing moves them.

    Args:
        model: Changed in place.
        optimizer: Trains `model`; its state of the removed entries is zeroed.
        plan: Made for `model`.
        smaller: The model after pruning, whose weights are written into `model`.
    """
    narrow, wide = dict(smaller.named_parameters()), dict(model.named_parameters())
    for name, places in kept_entries(model, plan):
        scatter(wide[name], narrow[name].detach(), places)
        clear_entries(optimizer, wide[name], places)
    for name, parameter in wide.items():
        if parameter.shape == narrow[name].shape:
            parameter.data.copy_(narrow[name].detach())


def compose_plans(first: PruningPlan | None, second: PruningPlan, **changes: Any) -> PruningPlan:  # noqa: ANN401
    """Return one plan for two prunings in a row, counted in the units of the model before the first."""
    layers = second.layers
    dense = second.dense
    if first is not None:
        dense = first.dense
        layers = tuple(
            LayerPlan(*(tuple(a.kept(target)[index] for index in b.kept(target)) for target in ALL_UNITS))
            for a, b in zip(first.layers, second.layers, strict=True)
        )
    values = {
        "model_type": second.model_type,
        "dense": dense,
        "layers": layers,
        "model_fingerprint": (first or second).model_fingerprint,
        "provenance": second.provenance,
    }
    return PruningPlan(**(values | changes))
