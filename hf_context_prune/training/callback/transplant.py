"""A narrower model into the body of a wide one: in place, so that whoever holds the model keeps a valid reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan


def check_modules(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Refuse a model with other modules or weights than its class makes: a narrower one could not be put into it.

    Args:
        model: As the Trainer holds it.
        smaller: Built anew with any widths; may be on the meta device.

    Raises:
        ConfigError: Names the first that differs.
    """
    old, new = ({name: type(module) for name, module in each.named_modules() if name} for each in (model, smaller))
    for name in [*old, *new]:
        if old.get(name) is not new.get(name):
            has, makes = (kinds[name].__name__ if name in kinds else "nothing" for kinds in (old, new))
            raise ConfigError(
                f"The module {name} of the model is {has}, where {type(smaller).__name__} has {makes}: what was added "
                f"to a model, or replaced in it (Liger kernels, say), can't be narrowed. Train without it."
            )
    own, made = _sharing(model), _sharing(smaller)
    for name in [*own, *made]:
        if own.get(name) != made.get(name):
            raise ConfigError(
                f"The weight {name} of the model is {_shared_with(name, own)}, where {type(smaller).__name__} has it "
                f"{_shared_with(name, made)}: weights that were added, tied or renamed (weight_norm, "
                f"torch.nn.utils.prune) can't be narrowed. Train without them."
            )


def _sharing(model: PreTrainedModel) -> dict[str, str]:
    """Every name of a weight -> the first name of that weight."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def _shared_with(name: str, sharing: dict[str, str]) -> str:
    if name not in sharing:
        return "missing"
    return "a weight of its own" if sharing[name] == name else f"the same as {sharing[name]}"


def transplant(model: PreTrainedModel, smaller: PreTrainedModel) -> dict[nn.Parameter, nn.Parameter]:
    """Make `model` what `smaller` is: class, config, sizes and weights. Hooks and what else was set on modules stay.

    Args:
        model: Changed in place.
        smaller: From `apply_plan` of `model`, of the same modules; not to be used afterwards.

    Returns:
        The new parameter of every old one that got narrower; the others are written into, and keep their hooks.
    """
    old, new = dict(model.named_modules()), dict(smaller.named_modules())
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in old.items():
        twin = new[name]
        for key, value in twin.__dict__.items():
            size = isinstance(value, int) and not isinstance(value, bool)
            # A twin is made from the config, into which a Trainer writes its tokenizer's padding token: `padding_idx`
            # would then freeze a row that has been trained so far.
            if not key.startswith("_") and key != "padding_idx" and (size or isinstance(value, PreTrainedConfig)):
                module.__dict__[key] = value
        for key, parameter in module._parameters.items():
            counterpart = twin._parameters[key]
            if parameter is None or counterpart is None:
                continue
            if parameter.shape == counterpart.shape:
                parameter.data.copy_(counterpart.detach())
            else:
                replaced[parameter] = counterpart
                module._parameters[key] = counterpart
    model.__class__ = type(smaller)
    return replaced


def scatter(parameter: nn.Parameter, narrow: torch.Tensor, places: torch.Tensor) -> None:
    """Write a narrow weight into its places in the wide one, and zero all others.

    Args:
        parameter: The wide weight, changed in place.
        narrow: The narrow one.
        places: Flat indices into the wide weight, in the shape of the narrow one.
    """
    parameter.data.zero_()
    parameter.data.view(-1)[places.to(parameter.device).flatten()] = narrow.to(parameter).flatten()


def compose_plans(first: PruningPlan | None, second: PruningPlan, **changes: Any) -> PruningPlan:  # noqa: ANN401
    """One plan for two prunings in a row, in the units of the model before the first."""
    layers = second.layers
    dense = second.dense
    if first is not None:
        dense = first.dense
        layers = tuple(
            LayerPlan(
                tuple(a.neurons[index] for index in b.neurons), tuple(a.kv_groups[index] for index in b.kv_groups)
            )
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
