"""The module paths of a table entry, looked up in a model; a wrong one is named with the nearest that exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import ConfigError

from .configuration_context_pruned import native_class
from .geometry import WITHOUT_ATTENTION
from .specs import ArchSpec


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a sentence with the nearest of some names; empty where none is near."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def build_default(spec: ArchSpec) -> PreTrainedModel | None:
    """Build an entry's model on the meta device, by the defaults of its config class.

    Returns:
        The model; None where the config class has no defaults that make one.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = native_class(spec.model_class)(native_class(spec.config_class)())
    except Exception:  # the code of any family; the paths are looked up in its first model then
        return None
    return model


def check_paths(model: nn.Module, spec: ArchSpec) -> None:
    """Refuse an entry with a path that does not exist in a model, or a config attribute that its config lacks.

    A path must exist in one layer at least: of a hybrid model, some layers have no attention.

    Args:
        model: A model of the entry's class, on any device.
        spec: The entry.

    Raises:
        ConfigError: Names the path or the attribute, and the nearest existing ones.
    """
    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    layers = modules.get(spec.layers)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise _wrong(spec, "layers", spec.layers, lists, "no list of layers")
    inside = {name for layer in layers for name, _ in layer.named_modules() if name}
    projections: list[tuple[str, str]] = []
    places: list[tuple[str, str | None]] = []
    if spec.experts is not None and all(_has(layer, spec.experts.block, spec.experts.experts) for layer in layers):
        places += [("experts", f"{spec.experts.block}.{spec.experts.router}")]
    else:  # some layer has an MLP
        projections += [*(("mlp_inputs", path) for path in spec.mlp_inputs), ("mlp_output", spec.mlp_output)]
        places += [("activation", spec.activation)]
    if set(getattr(model.config, "layer_types", None) or [None]) - set(WITHOUT_ATTENTION):
        projections += [("attention_inputs", projection.path) for projection in spec.attention_inputs]
        projections += [("attention_output", spec.attention_output)]
        places += [("attention", spec.attention)]
    weighted = {name for layer in layers for name, module in layer.named_modules() if _has_matrix(module)}
    for field, path in projections:
        if path not in weighted:
            raise _wrong(spec, field, path, weighted, "a projection")
    for field, place in places:
        if place is not None and place not in inside:
            raise _wrong(spec, field, place, inside, "a module")
    for layer in layers:
        _check_neurons(layer, spec)
    if spec.attention in inside:
        for attribute, _ in spec.attention_attributes:
            _check_attribute(layers, spec, attribute)
    parameters = {name for layer in layers for name, _ in layer.named_parameters()}
    for path in spec.head_parameters:
        if path not in parameters:
            raise _wrong(spec, "head_parameters", path, parameters, "a parameter")
    names = [("width", spec.width), ("query_heads", spec.query_heads), ("kv_heads", spec.kv_heads)]
    names += [("computed_width", spec.computed_width), ("residual_multiplier", spec.residual_multiplier)]
    switches: dict[str, Iterable[str | None]] = {
        "fixed_heads": [name for name, _ in spec.fixed_heads],
        "refused": [name for name, _ in spec.refused],
        "multi_query": [name for name, _ in spec.multi_query],
        "parallel": () if isinstance(spec.parallel, bool) else spec.parallel,
    }
    names += [(field, name) for field, listed in switches.items() for name in listed]
    for field, name in names:
        if name is not None and not hasattr(model.config.per_layer_config[0], name):
            known = [key for key in model.config.to_dict() if not key.startswith("_")]
            raise ConfigError(
                f"The entry of {spec.model_type!r} has {field}={name!r}, but {type(model.config).__name__} has no such "
                f"attribute.{did_you_mean(name, known)}"
            )


def _check_neurons(layer: nn.Module, spec: ArchSpec) -> None:
    """Refuse an MLP whose output projection reads another number of neurons than its input projections write."""
    modules = dict(layer.named_modules())
    if not all(_has_matrix(modules.get(path)) for path in (*spec.mlp_inputs, spec.mlp_output)):
        return  # a layer of another kind
    rows, columns = (1, 0) if spec.transposed else (0, 1)
    reads = modules[spec.mlp_output].weight.shape[columns]
    for path in spec.mlp_inputs:
        writes = modules[path].weight.shape[rows]
        if writes != spec.mlp_blocks * reads:
            raise ConfigError(
                f"The entry of {spec.model_type!r} has mlp_inputs={path!r}, which writes {writes:,} features, and "
                f"mlp_output={spec.mlp_output!r}, which reads {reads:,}; with mlp_blocks={spec.mlp_blocks} it must "
                f"read {writes // spec.mlp_blocks:,}. Name other projections, or other blocks."
            )


def _check_attribute(layers: Iterable[nn.Module], spec: ArchSpec, name: str) -> None:
    """Refuse the name of an attribute that the attention of no layer has."""
    found = [dict(layer.named_modules()).get(spec.attention) for layer in layers]
    modules = [module for module in found if module is not None]
    owner, _, attribute = name.rpartition(".")
    places = [dict(module.named_modules()).get(owner) for module in modules]
    if not any(hasattr(place, attribute) for place in places if place is not None):
        known = [key for key in vars(modules[0]) if not key.startswith("_")]
        raise ConfigError(
            f"The entry of {spec.model_type!r} has attention_attributes with {name!r}, which {spec.attention!r} of no "
            f"layer has.{did_you_mean(name, known)}"
        )


def _has(layer: nn.Module, *path: str) -> bool:
    return ".".join(path) in dict(layer.named_modules())


def _has_matrix(module: nn.Module | None) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2


def _wrong(spec: ArchSpec, field: str, path: str, existing: Iterable[str], what: str) -> ConfigError:
    names = sorted(existing)
    near = did_you_mean(path, names) or f" Existing are {', '.join(names[:9])}{' and more' if names[9:] else ''}."
    where = spec.model_class if field == "layers" else f"no layer of {spec.model_class} ({spec.layers})"
    return ConfigError(f"The entry of {spec.model_type!r} has {field}={path!r}, but {where} has {what} there.{near}")
