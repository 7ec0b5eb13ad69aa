"""Table entries that may be right for an unknown model, from the shapes, names and calls of its tiny copy.

Names alone don't tell everything: in which order a stacked projection holds its heads, say. So several entries are
proposed, the most plausible first, and the tests of `contract.py` choose.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import UnsupportedArchitectureError
from hf_context_prune.modeling.geometry import WITHOUT_ATTENTION
from hf_context_prune.modeling.spec_parts import Projection
from hf_context_prune.modeling.specs import NORM_OVER_HEADS, ArchSpec, bare_name

from .observe import Observed, find_layers, is_fed_by_attention, is_projection, observe
from .places import Attention, Mlp, attention_of, mlp_of
from .tiny_copy import HEADS, TinyCopy, own_name

_IDLE_NAMES = ("layer_idx", "layer_id", "head_dim", "num_key_value_groups", "hidden_size", "embed_dim", "embedding_dim")
"""Attributes of attention modules that hold no size which changes with the heads."""
_MULTIPLIERS = ("residual_multiplier",)


def reference(owner: type[Any]) -> str:
    """Return a class as an entry names it: by its name if `transformers` has it, else with its module."""
    own = getattr(sys.modules["transformers"], owner.__name__, None)
    return owner.__name__ if own is owner else f"{owner.__module__}:{owner.__name__}"


def propose(tiny: TinyCopy) -> list[ArchSpec]:
    """Return the entries that may be right for a model, the most plausible first.

    Args:
        tiny: Its tiny copy.

    Raises:
        UnsupportedArchitectureError: A part that every entry needs was not found; the message says which.
    """
    model = tiny.model
    layers = find_layers(model)
    if layers is None:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no list of {model.config.num_hidden_layers} layers with projections, so there "
            f"is nothing that an ArchSpec could describe."
        )
    observed, attention = _layer_with_attention(tiny, list(model.get_submodule(layers)))
    mlp = mlp_of(observed, model.config)
    module = observed.layer.get_submodule(attention.path)
    per_head, fixed = _head_parts(observed.layer, attention, tiny)
    base = ArchSpec(
        model.config.model_type,
        reference(type(model.config)),
        reference(type(model)),
        layers=layers,
        mlp_inputs=mlp.inputs,
        mlp_blocks=mlp.blocks,
        mlp_output=mlp.output,
        activation=mlp.activation,
        attention_inputs=attention.inputs,
        attention_output=attention.output,
        attention=attention.path,
        width=mlp.width,
        query_heads=own_name(model.config, HEADS) or HEADS[0],
        kv_heads=attention.kv_heads,
        multi_query=attention.multi_query,
        head_parameters=per_head,
        fixed_heads=fixed,
        post_norms=tuple(_post_norms(observed, attention, mlp)),
        residual_multiplier=own_name(model.config, _MULTIPLIERS),
        parallel=not is_fed_by_attention(model, observed.layer, attention.output, mlp.inputs[0]),
        transposed=not isinstance(observed.layer.get_submodule(mlp.output), nn.Linear),
    )
    base = replace(base, headless_class=_headless(base, model))
    variants = list(product(_layouts(attention.inputs), _attributes(module, tiny, base)))
    proposed = [replace(base, attention_inputs=inputs, attention_attributes=sizes) for inputs, sizes in variants]
    if not fixed:
        proposed.append(replace(base, fixed_heads=((None, "without one of them the others give something else"),)))
    return list(dict.fromkeys(proposed))


def _layer_with_attention(tiny: TinyCopy, layers: list[nn.Module]) -> tuple[Observed, Attention]:
    """Return the first layer whose attention is understood: in a hybrid model, others mix tokens in another way."""
    kinds = getattr(tiny.model.config, "layer_types", None) or [None] * len(layers)
    failures: list[UnsupportedArchitectureError] = []
    for layer, kind in zip(layers, kinds, strict=False):
        if kind in WITHOUT_ATTENTION:
            continue
        observed = observe(tiny.model, layer)
        try:
            return observed, attention_of(observed, tiny)
        except UnsupportedArchitectureError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    raise UnsupportedArchitectureError(f"No layer of {type(tiny.model).__name__} has attention.")


def _layouts(inputs: tuple[Projection, ...]) -> Iterator[tuple[Projection, ...]]:
    """Yield the orders in which stacked projections may hold their heads, the usual one of the name first."""
    stacked = any(len(projection.roles) > 1 for projection in inputs)
    first = any("query_key_value" in projection.path for projection in inputs)
    for interleaved in (first, not first) if stacked else (False,):
        yield tuple(replace(one, interleaved=interleaved and len(one.roles) > 1) for one in inputs)


def _attributes(module: nn.Module, tiny: TinyCopy, spec: ArchSpec) -> Iterator[tuple[tuple[str, str], ...]]:
    """Yield the sizes that the attention module may keep for itself: head counts, then the product, then its config."""
    counts, products = [], []
    for path, part in module.named_modules():
        if is_projection(part):
            continue
        for name, value in vars(part).items():
            if type(value) is not int or name in _IDLE_NAMES:
                continue
            place = f"{path}.{name}".removeprefix(".")
            of_keys = re.search(r"kv|key", name) is not None
            if value == tiny.heads and not (of_keys and tiny.groups == tiny.heads and spec.kv_heads):
                counts.append((place, "heads"))
            elif value == tiny.groups and (tiny.groups > 1 or of_keys):
                counts.append((place, "groups"))
            elif value == tiny.heads * tiny.head_dim:
                products.append((place, "features"))
    reads_config = re.search(
        rf"config\.({spec.query_heads}|{spec.kv_heads or spec.query_heads})\b", inspect.getsource(type(module).forward)
    )
    config = [("config", "config")] if reads_config and hasattr(module, "config") else []
    yield (*config, *counts)
    if products:
        yield (*config, *counts, *products)
    if hasattr(module, "config") and not config:
        yield (("config", "config"), *counts)


def _head_parts(
    layer: nn.Module, attention: Attention, tiny: TinyCopy
) -> tuple[tuple[str, ...], tuple[tuple[str | None, str], ...]]:
    """Return the parameters with a value per query head, and why no head can be removed, if so."""
    heads, groups, dim = tiny.heads, tiny.groups, tiny.head_dim
    projections = (*(one.path for one in attention.inputs), attention.output)
    own, sizes = [], {heads, heads * dim} | ({groups, groups * dim} if groups > 1 else set())
    for path, module in layer.get_submodule(attention.path).named_modules():
        place = f"{attention.path}.{path}".removesuffix(".")
        if isinstance(module, nn.ModuleList) and len(module) == heads:
            return (), ((None, f"every head has a module of its own in {place}"),)
        if place in projections:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if tuple(parameter.shape) == (heads,):
                own.append(f"{place}.{name}")
            elif parameter.shape[0] in sizes:
                over_all = parameter.ndim == 1
                return (), ((None, NORM_OVER_HEADS if over_all else f"every head has values in {place}.{name}"),)
    return tuple(own), ()


def _post_norms(observed: Observed, attention: Attention, mlp: Mlp) -> Iterator[tuple[str, str]]:
    for target, path in (("attention", attention.output), ("mlp", mlp.output)):
        added = observed.output(path)
        for norm in observed.norms():
            if observed.reads(norm, added):
                yield target, norm


def _headless(spec: ArchSpec, model: PreTrainedModel) -> str | None:
    """Return the class without a head, where it is not named as usual."""
    own = reference(type(model.base_model))
    usual = spec.headless().model_class
    return None if bare_name(usual) == bare_name(own) else own
