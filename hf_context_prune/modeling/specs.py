"""The table of supported architectures: the only place that knows module paths and config attribute names.

An architecture is one [`ArchSpec`][]: where the decoder layers are, which projections read and write the MLP neurons
and the attention heads, and how the config names their counts. Everything else (surgery, the model class, calibration)
follows from the entry. To add an architecture, add an entry here and one line to ``tests/support/tiny.py``.

This file travels with every saved variable-width model, so it imports nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

PREFIX = "context_pruned_"
"""Begins the ``model_type`` of every variable-width model."""
UNIT_NAMES = {"mlp": "neurons", "attention": "kv_groups"}
"""The units of a target, by the name that plans, widths and messages use."""


@dataclass(frozen=True)
class Projection:
    """An input projection of the attention, and the layout of its output features.

    Attributes:
        path: Module path relative to the layer.
        roles: ``"query"``, ``"key"`` and/or ``"value"``, in the order in which they are stacked.
        interleaved: False: all heads of the first role, then all of the second (GPT-2). True: head by head, each
            with all roles (GPT-NeoX).
    """

    path: str
    roles: tuple[str, ...]
    interleaved: bool = False


def _separate(prefix: str) -> tuple[Projection, ...]:
    return tuple(Projection(f"{prefix}.{role[0]}_proj", (role,)) for role in ("query", "key", "value"))


@dataclass(frozen=True)
class ArchSpec:
    """The places of the prunable units of one architecture.

    Attributes:
        model_type: ``config.model_type`` of the native architecture.
        config_class: Name of the config class in `transformers`.
        model_class: Name of the causal-LM class in `transformers`.
        headless_class: Name of the class without an LM head; None: that of the causal LM with ``Model`` at its end.
        layers: Module path of the list of decoder layers, from the causal-LM model.
        mlp_inputs: Projections whose output features are the neurons (gate and up, or one), relative to the layer.
        mlp_output: Projection whose input features are the neurons.
        activation: The MLP's activation function; its input is the output of the first of `mlp_inputs`.
        attention_inputs: Projections whose output features are query, key and value heads.
        attention_output: Projection whose input features are the query heads.
        attention: The attention module, relative to the layer.
        width: Config attribute with the number of neurons.
        query_heads: Config attribute with the number of query heads.
        kv_heads: Config attribute with the number of key/value heads; None where every query head has its own.
        attention_attributes: Attributes of the attention module that hold a size, with ``"heads"`` (query heads) or
            ``"features"`` (query heads x head_dim); updated when heads are removed.
        post_norms: (target, module path) of the norms between a projection and the residual stream (Gemma 2 and 3).
        residual_multiplier: Config attribute that scales a sub-layer's output before it is added (Granite).
        parallel: Whether attention and MLP both read the layer's input; or the config attribute that says so.
        transposed: Whether projections store their weight as [in_features, out_features] (`Conv1D` of GPT-2).
    """

    model_type: str
    config_class: str
    model_class: str
    headless_class: str | None = None
    layers: str = "model.layers"
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    attention_inputs: tuple[Projection, ...] = _separate("self_attn")
    attention_output: str = "self_attn.o_proj"
    attention: str = "self_attn"
    width: str = "intermediate_size"
    query_heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    attention_attributes: tuple[tuple[str, str], ...] = ()
    post_norms: tuple[tuple[str, str], ...] = ()
    residual_multiplier: str | None = None
    parallel: bool | str = False
    transposed: bool = False

    def output_path(self, target: str) -> str:
        """Return the path of the projection that reads the units of ``"mlp"`` or ``"attention"``."""
        return self.mlp_output if target == "mlp" else self.attention_output

    def headless(self) -> ArchSpec:
        """Return the entry of the class without an LM head, whose paths begin behind the first module."""
        name = self.headless_class or self.model_class.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")
        return replace(self, model_class=name, layers=self.layers.partition(".")[2])


def _llama_like(model_type: str, name: str, config_class: str | None = None, **differences: Any) -> ArchSpec:  # noqa: ANN401
    return ArchSpec(model_type, config_class or f"{name}Config", f"{name}ForCausalLM", **differences)


_SANDWICH = (("attention", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm"))


SPECS: dict[str, ArchSpec] = {
    spec.model_type: spec
    for spec in (
        _llama_like("llama", "Llama"),
        _llama_like("qwen2", "Qwen2"),
        _llama_like("qwen3", "Qwen3"),
        _llama_like("mistral", "Mistral"),
        _llama_like("smollm3", "SmolLM3"),
        _llama_like("gemma", "Gemma"),
        _llama_like("gemma2", "Gemma2", post_norms=_SANDWICH),
        _llama_like(
            "gemma3_text", "Gemma3", "Gemma3TextConfig", headless_class="Gemma3TextModel", post_norms=_SANDWICH
        ),
        _llama_like("granite", "Granite", residual_multiplier="residual_multiplier"),
        ArchSpec(
            "phi",
            "PhiConfig",
            "PhiForCausalLM",
            mlp_inputs=("mlp.fc1",),
            mlp_output="mlp.fc2",
            activation="mlp.activation_fn",
            attention_output="self_attn.dense",
            parallel=True,
        ),
        ArchSpec(
            "gpt_neox",
            "GPTNeoXConfig",
            "GPTNeoXForCausalLM",
            layers="gpt_neox.layers",
            mlp_inputs=("mlp.dense_h_to_4h",),
            mlp_output="mlp.dense_4h_to_h",
            activation="mlp.act",
            attention_inputs=(Projection("attention.query_key_value", ("query", "key", "value"), interleaved=True),),
            attention_output="attention.dense",
            attention="attention",
            kv_heads=None,
            parallel="use_parallel_residual",
        ),
        ArchSpec(
            "opt",
            "OPTConfig",
            "OPTForCausalLM",
            layers="model.decoder.layers",
            mlp_inputs=("fc1",),
            mlp_output="fc2",
            activation="activation_fn",
            attention_output="self_attn.out_proj",
            width="ffn_dim",
            kv_heads=None,
            attention_attributes=(("num_heads", "heads"),),
        ),
        ArchSpec(
            "gpt2",
            "GPT2Config",
            "GPT2LMHeadModel",
            layers="transformer.h",
            mlp_inputs=("mlp.c_fc",),
            mlp_output="mlp.c_proj",
            activation="mlp.act",
            attention_inputs=(Projection("attn.c_attn", ("query", "key", "value")),),
            attention_output="attn.c_proj",
            attention="attn",
            width="n_inner",
            query_heads="n_head",
            kv_heads=None,
            attention_attributes=(("num_heads", "heads"), ("split_size", "features")),
            transposed=True,
        ),
    )
}


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one decoder layer.

    Attributes:
        neurons: MLP neurons.
        kv_groups: Attention KV groups (a key/value head with its query heads).
    """

    neurons: int
    kv_groups: int

    def of(self, target: str) -> int:
        """Return the number of units of ``"mlp"`` (neurons) or ``"attention"`` (KV groups)."""
        width: int = getattr(self, UNIT_NAMES[target])
        return width


@dataclass(frozen=True)
class Geometry:
    """Sizes of a whole model, read from its config alone.

    Attributes:
        hidden_size: Width of the residual stream.
        head_dim: Features of one head.
        queries_per_group: Query heads that share one key/value head.
        layers: One [`LayerWidths`][] per decoder layer.
    """

    hidden_size: int
    head_dim: int
    queries_per_group: int
    layers: tuple[LayerWidths, ...]

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
        return self.head_dim * sum(heads)

    def projection_features(self, projection: Projection, groups: Sequence[int], total_groups: int) -> list[int]:
        """Return the output features of an input projection that belong to these KV groups.

        Args:
            projection: The projection.
            groups: Kept KV groups, ascending.
            total_groups: KV groups that the projection has now.
        """
        dim = self.head_dim
        if projection.interleaved:  # all roles of a head lie together; such models have one query head per group
            size = dim * len(projection.roles)
            return [group * size + feature for group in groups for feature in range(size)]
        features: list[int] = []
        offset = 0
        for role in projection.roles:
            for group in groups:
                for head in self.head_range(group, role):
                    features.extend(range(offset + head * dim, offset + (head + 1) * dim))
            per_group = self.queries_per_group if role == "query" else 1
            offset += total_groups * per_group * dim
        return features


def classes_on_demand(
    module: str, specs: Mapping[str, ArchSpec], make: Callable[[ArchSpec], type]
) -> Callable[[str], type]:
    """Return a module-level ``__getattr__`` (PEP 562) that makes an architecture's class on first access to its name.

    Args:
        module: Name of the module, for the error.
        specs: Table entries by class name.
        make: Makes the class of an entry; called once per entry.
    """
    made: dict[str, type] = {}

    def get(name: str) -> type:
        if name not in specs:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if name not in made:
            made[name] = make(specs[name])
        return made[name]

    return get


def base_model_type(model_type: str) -> str:
    """Return the native model type behind ``context_pruned_<base>``; any other type is returned unchanged."""
    return model_type.removeprefix(PREFIX)


def neurons_of(config: Any, spec: ArchSpec) -> int:  # noqa: ANN401
    """Return the number of MLP neurons that a (layer) config asks for."""
    width = getattr(config, spec.width, None)
    # GPT-2 writes None for its default, four times the hidden size.
    return 4 * config.hidden_size if width is None else width


def kv_groups_of(config: Any, spec: ArchSpec) -> int:  # noqa: ANN401
    """Return the number of KV groups that a (layer) config asks for."""
    attribute = spec.query_heads if spec.kv_heads is None else spec.kv_heads
    return getattr(config, attribute)


def read_geometry(config: Any, spec: ArchSpec) -> Geometry:  # noqa: ANN401
    """Read all sizes from a config, native or variable-width.

    Args:
        config: A `PreTrainedConfig`.
        spec: Its table entry.
    """
    layers = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
    first = layers[0]
    heads = getattr(first, spec.query_heads)
    return Geometry(
        hidden_size=config.hidden_size,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        queries_per_group=heads // kv_groups_of(first, spec),
        layers=tuple(LayerWidths(neurons_of(layer, spec), kv_groups_of(layer, spec)) for layer in layers),
    )
