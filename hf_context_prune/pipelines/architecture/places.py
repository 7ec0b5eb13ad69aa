"""The projections of the MLP and of the attention in a layer that was observed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedConfig

from hf_context_prune.errors import UnsupportedArchitectureError
from hf_context_prune.modeling.spec_parts import Projection

from .observe import Observed, Shape, is_in_attention
from .tiny_copy import GROUPS, TINY_HIDDEN, WIDTHS, TinyCopy, own_name

_ROLES = {
    "query": re.compile(r"(^|_)w?q(_|$)|query"),
    "key": re.compile(r"(^|_)w?k(_|$)|key"),
    "value": re.compile(r"(^|_)w?v(_|$)|value"),
}
_MULTI_QUERY = re.compile(r"multi_query|mqa")


@dataclass(frozen=True)
class Mlp:
    """The MLP of a layer, in the words of an `ArchSpec`."""

    inputs: tuple[str, ...]
    blocks: int
    output: str
    activation: str | None
    width: str


@dataclass(frozen=True)
class Attention:
    """The attention of a layer, in the words of an `ArchSpec`."""

    path: str
    inputs: tuple[Projection, ...]
    output: str
    kv_heads: str | None
    multi_query: tuple[tuple[str, bool], ...] = ()


def mlp_of(observed: Observed, config: PreTrainedConfig) -> Mlp:
    """Return the MLP: projections from the hidden states to the neurons, and the one from the neurons back.

    Raises:
        UnsupportedArchitectureError: There is none, there are several (experts), or no config attribute is its width.
    """
    shapes = [shape for shape in observed.shapes if not is_in_attention(observed.layer, shape.path)]
    found: list[tuple[list[Shape], Shape]] = []
    for output in (shape for shape in shapes if shape.outputs == TINY_HIDDEN):
        sizes = (output.inputs, 2 * output.inputs)
        inputs = [
            shape
            for shape in shapes
            if shape.parent == output.parent
            and shape != output
            and shape.outputs in sizes
            and shape.inputs == TINY_HIDDEN
        ]
        if inputs and len({shape.outputs for shape in inputs}) == 1:
            found.append((inputs, output))
    experts = [name for name, parameter in observed.layer.named_parameters() if parameter.ndim == 3]
    experts += [name for name, _ in observed.layer.named_modules() if re.search(r"experts?$", name)]
    if len(found) != 1 or experts:
        seen = f"experts ({experts[0]})" if experts else f"{len(found)} MLPs" if found else "no MLP"
        raise UnsupportedArchitectureError(
            f"Its layers have {seen}; an ArchSpec describes layers with one dense MLP: one or two projections from the "
            f"hidden states to the neurons, and one back. Projections that ran: {_listed(shapes)}."
        )
    inputs, output = found[0]
    _refuse_shared_neurons(observed, inputs, output)
    blocks = inputs[0].outputs // output.inputs
    activation, first = _activation(observed, inputs, blocks)
    ordered = sorted(inputs, key=lambda shape: shape != first)
    return Mlp(
        tuple(shape.path for shape in ordered), blocks, output.path, activation, _width_name(config, output.inputs)
    )


def _refuse_shared_neurons(observed: Observed, inputs: list[Shape], output: Shape) -> None:
    """Refuse an MLP with a norm over all neurons, which changes for the others when one is removed."""
    projections = {shape.path for shape in (*inputs, output)}
    for path, parameter in observed.layer.named_parameters():
        owner = path.rpartition(".")[0]
        inside = not output.parent or owner.startswith(f"{output.parent}.")
        if inside and owner not in projections and parameter.shape[0] == output.inputs:
            raise UnsupportedArchitectureError(
                f"{path} has a value for each neuron of the MLP (a norm over all of them): removing neurons would "
                f"change what the others give, and an ArchSpec has no field for such a parameter."
            )


def _activation(observed: Observed, inputs: list[Shape], blocks: int) -> tuple[str | None, Shape]:
    """Return the activation module, and the projection whose output it reads: the gate, where there is one."""
    for path in observed.functions():
        for shape in inputs:
            if observed.reads(path, observed.output(shape.path).chunk(blocks, dim=-1)[0]):
                return path, shape
    named = [shape for shape in inputs if re.search(r"gate|w1$", shape.name)]
    return None, (named or inputs)[0]


def _width_name(config: PreTrainedConfig, neurons: int) -> str:
    stored = config.to_dict()
    named = [name for name in WIDTHS if stored.get(name) == neurons]
    others = [name for name, value in stored.items() if type(value) is int and value == neurons]
    if not (named or others):
        raise UnsupportedArchitectureError(
            f"The MLP of its tiny copy has {neurons} neurons at a hidden size of {TINY_HIDDEN}, and no config "
            f"attribute holds that number, so the width is computed. An ArchSpec needs an attribute that is the number "
            f"of neurons (width; computed_width knows the formula of LFM2 alone)."
        )
    return (named or others)[0]


def attention_of(observed: Observed, tiny: TinyCopy) -> Attention:
    """Return the attention: the last projection that ran there, and those that read the hidden states.

    Raises:
        UnsupportedArchitectureError: There is none, or its projections have no known layout.
    """
    shapes = [shape for shape in observed.shapes if is_in_attention(observed.layer, shape.path)]
    width = tiny.heads * tiny.head_dim
    if not shapes:
        raise UnsupportedArchitectureError("Its layers have no module with 'attn' or 'attention' in its name or class.")
    output = shapes[-1]
    inputs = [shape for shape in shapes[:-1] if shape.parent == output.parent]
    known = (
        output.outputs == TINY_HIDDEN and output.inputs == width and all(one.inputs == TINY_HIDDEN for one in inputs)
    )
    if not known or not 1 <= len(inputs) <= 3 or len(inputs) != len(shapes) - 1:
        raise UnsupportedArchitectureError(
            f"The projections of its attention have no layout that an ArchSpec can describe: query, key and value from "
            f"the hidden states, separate or stacked, and one output that reads {tiny.heads} heads of {tiny.head_dim} "
            f"features. Projections that ran: {_listed(shapes)}."
        )
    projections = _roles(inputs, tiny)
    total = sum(
        shape.outputs for shape, one in zip(inputs, projections, strict=True) if set(one.roles) & {"key", "value"}
    )
    queries = width if any(len(one.roles) > 1 and "query" in one.roles for one in projections) else 0
    groups, rest = divmod(total - queries, 2 * tiny.head_dim)
    if rest or groups < 1:
        raise UnsupportedArchitectureError(
            f"Keys and values of its attention are no whole number of heads of {tiny.head_dim} features, or not of the "
            f"same size. Projections that ran: {_listed(shapes)}."
        )
    ordered = sorted(projections, key=lambda one: tuple(_ROLES).index(one.roles[0]))
    kv_heads, multi_query = _groups_name(tiny, groups)
    return Attention(output.parent, tuple(ordered), output.path, kv_heads, multi_query)


def _roles(inputs: list[Shape], tiny: TinyCopy) -> list[Projection]:
    if len(inputs) == 1:
        return [Projection(inputs[0].path, tuple(_ROLES))]
    if len(inputs) == 2:
        roles = [("query",), ("key", "value")]
        order = sorted(inputs, key=lambda shape: not _ROLES["query"].search(shape.name))
        return [Projection(shape.path, roles[order.index(shape)]) for shape in inputs]
    named = {role: shape for role, pattern in _ROLES.items() for shape in inputs if pattern.search(shape.name)}
    by_role = named if len({*named.values()}) == len(_ROLES) else dict(zip(_ROLES, inputs, strict=True))
    blocks = max(1, by_role["query"].outputs // (tiny.heads * tiny.head_dim))
    roles_of = {shape: role for role, shape in by_role.items()}
    return [
        Projection(shape.path, (roles_of[shape],), blocks=blocks if roles_of[shape] == "query" else 1)
        for shape in inputs
    ]


def _groups_name(tiny: TinyCopy, groups: int) -> tuple[str | None, tuple[tuple[str, bool], ...]]:
    """Return the config attribute with the number of KV groups, and those by which all heads share one group."""
    config = tiny.model.config
    name = own_name(config, GROUPS)
    if name is not None and getattr(config, name) == groups:
        return name, ()
    shared = tuple((key, True) for key, value in config.to_dict().items() if value is True and _MULTI_QUERY.search(key))
    if groups == 1 and shared:
        return name, shared
    if groups == tiny.heads:
        return None, ()
    raise UnsupportedArchitectureError(
        f"Its attention has {groups} key/value heads where its config has {tiny.heads} heads, and no config attribute "
        f"holds that number ({', '.join(GROUPS)} are looked for)."
    )


def _listed(shapes: list[Shape]) -> str:
    return ", ".join(f"{one.path} ({one.inputs} to {one.outputs})" for one in shapes) or "none"
