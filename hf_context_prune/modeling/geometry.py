"""Sizes of a model, read from its config alone: neurons and KV groups of every layer, and the features of each unit.

This file travels with every saved variable-width model, so it imports nothing but the standard library and the table of
architectures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .spec_parts import Projection
from .specs import ArchSpec

UNIT_NAMES = {"mlp": "neurons", "attention": "kv_groups"}
"""The units of a target, by the name that plans, widths and messages use."""
ALL_UNITS = {**UNIT_NAMES, "experts": "experts"}
"""The same, with experts, which are no target: no output projection reads them together."""


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one decoder layer; a layer that is removed as a whole has none (`gone`).

    Attributes:
        neurons: MLP neurons; 0 in a layer with experts, whose inner neurons all stay.
        kv_groups: Attention KV groups (a key/value head with its query heads); 0 in a layer without heads that can be
            removed.
        experts: Experts that a router chooses from; 0 in a layer with an MLP.
    """

    neurons: int
    kv_groups: int
    experts: int = 0

    def of(self, target: str) -> int:
        """Return the number of units of ``"mlp"`` (neurons), ``"attention"`` (KV groups) or ``"experts"``."""
        width: int = getattr(self, ALL_UNITS[target])
        return width

    @property
    def gone(self) -> bool:
        """Whether the layer is removed as a whole."""
        return not (self.neurons or self.kv_groups or self.experts)

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that have units in this layer."""
        return tuple(target for target in UNIT_NAMES if self.of(target))


GONE = LayerWidths(0, 0)
"""Widths of a layer that is removed as a whole."""


def widths_vary(layers: Sequence[LayerWidths]) -> bool:
    """Return whether layers that have neurons, KV groups or experts differ in their number."""
    return any(len({layer.of(target) for layer in layers} - {0}) > 1 for target in ALL_UNITS)


def units_of(layers: Sequence[LayerWidths]) -> tuple[str, ...]:
    """Return the names of the units that any of the layers has."""
    return tuple(name for target, name in ALL_UNITS.items() if any(layer.of(target) for layer in layers))


@dataclass(frozen=True)
class Geometry:
    """Sizes of a whole model, read from its config alone.

    Attributes:
        hidden_size: Width of the residual stream.
        head_dim: Features of one head.
        queries_per_group: Query heads that share one key/value head.
        layers: One [`LayerWidths`][] per decoder layer.
        heads_stay: Why no attention head can be removed; None where heads can.
    """

    hidden_size: int
    head_dim: int
    queries_per_group: int
    layers: tuple[LayerWidths, ...]
    heads_stay: str | None = None

    def head_range(self, group: int, role: str) -> range:
        """Return the heads of one KV group: its query heads, or the group's own head for key and value."""
        if role == "query":
            return range(group * self.queries_per_group, (group + 1) * self.queries_per_group)
        return range(group, group + 1)

    def query_features(self, groups: Sequence[int]) -> list[int]:
        """Return the output projection's input features of these KV groups, ascending within each group."""
        return [
            head * self.head_dim + feature
            for group in groups
            for head in self.head_range(group, "query")
            for feature in range(self.head_dim)
        ]

    def features_per_group(self, projection: Projection) -> int:
        """Return how many output features of an input projection belong to one KV group."""
        heads = (self.queries_per_group if role == "query" else 1 for role in projection.roles)
        return self.head_dim * projection.blocks * sum(heads)

    def projection_features(self, projection: Projection, groups: Sequence[int], total_groups: int) -> list[int]:
        """Return the output features of an input projection that belong to these KV groups.

        Args:
            projection: The projection.
            groups: Kept KV groups, ascending.
            total_groups: KV groups that the projection has now.
        """
        if projection.interleaved:  # all heads of a group lie together
            size = self.features_per_group(projection)
            return [group * size + feature for group in groups for feature in range(size)]
        dim = self.head_dim * projection.blocks
        features: list[int] = []
        offset = 0
        for role in projection.roles:
            for group in groups:
                for head in self.head_range(group, role):
                    features.extend(range(offset + head * dim, offset + (head + 1) * dim))
            per_group = self.queries_per_group if role == "query" else 1
            offset += total_groups * per_group * dim
        return features


WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba")
"""Values of ``config.layer_types`` of layers that mix tokens by something else: a recurrence or a convolution."""


def width_factor(config: Any, spec: ArchSpec, layer: int) -> int:  # noqa: ANN401
    """Return how many times `width` a layer has in neurons: 2 in the doubled layers of Gemma 4, else 1."""
    if spec.computed_width != "use_double_wide_mlp" or not config.use_double_wide_mlp:
        return 1
    return 2 if config.kv_sharing_modes[layer] == "reuse" else 1


def has_experts(config: Any, spec: ArchSpec, layer: int) -> bool:  # noqa: ANN401
    """Return whether a layer has a mixture of experts in place of the MLP, by the model's config or the layer's."""
    if (experts := spec.experts) is None or not getattr(config, experts.count):
        return False

    def value(name: str | None, default: int) -> int:
        return default if name is None else getattr(config, name)

    return (
        value(experts.first, 0) <= layer <= value(experts.last, layer)
        and (layer + 1) % value(experts.interval, 1) == 0
        and layer not in (() if experts.dense_layers is None else getattr(config, experts.dense_layers))
    )


def experts_of(config: Any, spec: ArchSpec, layer: int) -> int:  # noqa: ANN401
    """Return the number of experts that the config of a layer asks for; 0 where the layer has an MLP."""
    return getattr(config, spec.experts.count) if spec.experts and has_experts(config, spec, layer) else 0


def neurons_of(config: Any, spec: ArchSpec, layer: int) -> int:  # noqa: ANN401
    """Return the number of MLP neurons that the config of a layer asks for; 0 where the layer has experts."""
    if has_experts(config, spec, layer):
        return 0
    width = getattr(config, spec.width, None)
    if width is None:  # GPT-2 writes None for its default, four times the hidden size.
        return 4 * config.hidden_size
    if spec.computed_width is None or not getattr(config, spec.computed_width):
        return width
    if spec.computed_width == "use_double_wide_mlp":
        return width * width_factor(config, spec, layer)
    width = 2 * width // 3  # as LFM2 does it
    if config.block_ffn_dim_multiplier is None:
        return width
    multiple = config.block_multiple_of
    return -(-int(config.block_ffn_dim_multiplier * width) // multiple) * multiple


def shared_kv_heads(config: Any, spec: ArchSpec) -> int | None:  # noqa: ANN401
    """Return the number of key/value heads that the config has whatever `kv_heads` says; None where that decides."""
    shared = spec.multi_query and all(bool(getattr(config, name)) == value for name, value in spec.multi_query)
    return 1 if shared else None


def kv_groups_of(config: Any, spec: ArchSpec) -> int:  # noqa: ANN401
    """Return the number of KV groups that a (layer) config asks for."""
    if (shared := shared_kv_heads(config, spec)) is not None:
        return shared
    return getattr(config, spec.query_heads if spec.kv_heads is None else spec.kv_heads)


def read_head_dim(config: Any) -> int | None:  # noqa: ANN401
    """Return the features of a head that a config gives, in its first layer; None where it gives none."""
    computed = isinstance(getattr(type(config), "head_dim", None), property)  # in Falcon, from the global head count
    return getattr(config if computed else config.per_layer_config[0], "head_dim", None)


def why_heads_stay(config: Any, spec: ArchSpec) -> str | None:  # noqa: ANN401
    """Return why no attention head of a model can be removed; None where heads can."""
    return next((why for name, why in spec.fixed_heads if name is None or getattr(config, name)), None)


def read_geometry(config: Any, spec: ArchSpec) -> Geometry:  # noqa: ANN401
    """Read all sizes from a config, native or variable-width.

    Args:
        config: A `PreTrainedConfig`.
        spec: Its table entry.
    """
    layers = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    first, heads_stay = layers[0], why_heads_stay(config, spec)
    heads = getattr(first, spec.query_heads)
    return Geometry(
        hidden_size=config.hidden_size,
        head_dim=read_head_dim(config) or config.hidden_size // heads,
        queries_per_group=heads // kv_groups_of(first, spec),
        layers=tuple(
            LayerWidths(
                neurons_of(layer, spec, index),
                0 if heads_stay or kind in WITHOUT_ATTENTION else kv_groups_of(layer, spec),
                experts_of(layer, spec, index),
            )
            for index, (layer, kind) in enumerate(zip(layers, types, strict=True))
        ),
        heads_stay=heads_stay,
    )
