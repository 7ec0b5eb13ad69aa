"""The table of supported architectures: the only place that knows module paths and config attribute names.

An architecture is one [`ArchSpec`][]: where the decoder layers are, which projections read and write the MLP neurons
and the attention heads, and how the config names their counts. Everything else (surgery, the model class, calibration)
follows from the entry. To add an architecture, add an entry here and one line to ``tests/support/tiny.py``; programs
add one by `register_architecture`, and ``registered.py`` brings it along with a saved model.

Entries with experts are in ``moe_specs.py``. This file travels with every saved variable-width model, so it imports
nothing of the package but such files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .moe_specs import MOE_ENTRIES
from .registered import ENTRIES
from .spec_parts import Experts, Projection, separate

PREFIX = "context_pruned_"
"""Begins the ``model_type`` of every variable-width model."""


@dataclass(frozen=True)
class ArchSpec:
    """The places of the prunable units of one architecture.

    Attributes:
        model_type: ``config.model_type`` of the native architecture.
        config_class: Name of the config class in `transformers`; of another package, ``"package.module:Class"``.
        model_class: Name of the causal-LM class, in the same form.
        headless_class: Name of the class without an LM head; None: that of the causal LM with ``Model`` at its end.
        layers: Module path of the list of decoder layers, from the causal-LM model.
        mlp_inputs: Projections whose output features are the neurons (gate and up, or one), relative to the layer.
        mlp_blocks: Blocks of neurons in each of them: 2 where one projection holds gate and up, one after the other.
        mlp_output: Projection whose input features are the neurons.
        activation: The MLP's activation function, whose input is the output of the first of `mlp_inputs`; None where
            the MLP calls a function.
        attention_inputs: Projections whose output features are query, key and value heads.
        attention_output: Projection whose input features are the query heads.
        attention: The attention module, relative to the layer.
        width: Config attribute with the number of neurons.
        computed_width: Config attribute that, where true, has the model compute its width from `width` (LFM2), or
            double it in some layers (Gemma 4).
        native_overrides: Attributes that the native config itself may set layer by layer (Gemma 4).
        query_heads: Config attribute with the number of query heads.
        kv_heads: Config attribute with the number of key/value heads; None where every query head has its own.
        multi_query: Config attributes and the values with which all query heads share one key/value head, whatever
            `kv_heads` says; empty: that never is.
        attention_attributes: Attributes of the attention module that hold a size, with ``"heads"`` (query heads),
            ``"groups"`` (KV groups), ``"features"`` (query heads x head_dim) or ``"config"`` (the layer's config);
            updated when heads are removed.
        head_parameters: Parameters of the layer with one value per query head.
        fixed_heads: (config attribute or None, why attention heads can't be removed where it is true, or ever).
        fixed_layers, refused: (config attribute, why no whole layer, or nothing, can be removed where it is true).
        post_norms: (target, module path) of the norms between a projection and the residual stream (Gemma 2 and 3).
            A layer without the module, or with an `Identity` there, has no such norm.
        residual_multiplier: Config attribute that scales a sub-layer's output before it is added (Granite).
        parallel: Whether attention and MLP both read the layer's input; or the config attributes that say so, of
            which one must be true.
        layer_outputs: Length of the tuple that a layer returns, hidden states first; 0 where it returns those alone.
        transposed: Whether projections store their weight as [in_features, out_features] (`Conv1D` of GPT-2).
        experts: The mixture of experts that some or all layers have in place of the MLP; None: none has.
    """

    model_type: str
    config_class: str
    model_class: str
    headless_class: str | None = None
    layers: str = "model.layers"
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_blocks: int = 1
    mlp_output: str = "mlp.down_proj"
    activation: str | None = "mlp.act_fn"
    attention_inputs: tuple[Projection, ...] = separate("self_attn")
    attention_output: str = "self_attn.o_proj"
    attention: str = "self_attn"
    width: str = "intermediate_size"
    computed_width: str | None = None
    native_overrides: tuple[str, ...] = ()
    query_heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    multi_query: tuple[tuple[str, bool], ...] = ()
    attention_attributes: tuple[tuple[str, str], ...] = ()
    head_parameters: tuple[str, ...] = ()
    fixed_heads: tuple[tuple[str | None, str], ...] = ()
    fixed_layers: tuple[tuple[str, str], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    post_norms: tuple[tuple[str, str], ...] = ()
    residual_multiplier: str | None = None
    parallel: bool | tuple[str, ...] = False
    layer_outputs: int = 0
    transposed: bool = False
    experts: Experts | None = None

    @property
    def saved_layers(self) -> tuple[str, ...]:
        """The names of the list of layers in a file: without the head's prefix, too, as the first GPT-2 was saved."""
        return self.layers, self.layers.partition(".")[2]

    def output_path(self, target: str) -> str:
        """Return the path of the projection that reads the units of ``"mlp"`` or ``"attention"``."""
        return self.mlp_output if target == "mlp" else self.attention_output

    def headless(self) -> ArchSpec:
        """Return the entry of the class without an LM head, whose paths begin behind the first module."""
        own = bare_name(self.model_class)
        name = own.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")
        name = self.headless_class or self.model_class.removesuffix(own) + name
        return replace(self, model_class=name, layers=self.layers.partition(".")[2])


def _llama_like(model_type: str, name: str, config_class: str | None = None, **differences: Any) -> ArchSpec:  # noqa: ANN401
    return ArchSpec(model_type, config_class or f"{name}Config", f"{name}ForCausalLM", **differences)


_LIKE_LLAMA = {
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "ministral3": "Ministral3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "gemma": "Gemma",
    "vaultgemma": "VaultGemma",
    "olmo": "Olmo",
    "ernie4_5": "Ernie4_5",
    "hunyuan_v1_dense": "HunYuanDenseV1",
    "seed_oss": "SeedOss",
    "helium": "Helium",
    "cwm": "Cwm",
}
"""Names of classes, by model type: families whose modules and config attributes are named as Llama's."""
_QKV = ("query", "key", "value")
_SANDWICH = (("attention", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm"))
NORM_OVER_HEADS = "a norm over all heads together reads them"
_OLMO: dict[str, Any] = {
    "post_norms": _SANDWICH,
    "fixed_heads": ((None, NORM_OVER_HEADS),),
}
_STACKED_GATE: dict[str, Any] = {
    "mlp_inputs": ("mlp.gate_up_proj",),
    "mlp_blocks": 2,
    "activation": "mlp.activation_fn",
}
_UP_ALONE: dict[str, Any] = {"mlp_inputs": ("mlp.up_proj",)}
_FC: dict[str, Any] = {"mlp_inputs": ("mlp.fc1",), "mlp_output": "mlp.fc2", "activation": "mlp.activation_fn"}
_SCALED: dict[str, Any] = {"residual_multiplier": "residual_multiplier"}
_GPT: dict[str, Any] = {
    "layers": "transformer.h",
    "mlp_inputs": ("mlp.c_fc",),
    "mlp_output": "mlp.c_proj",
    "activation": "mlp.act",
    "attention_inputs": (Projection("attn.c_attn", _QKV),),
    "attention_output": "attn.c_proj",
    "attention": "attn",
    "width": "n_inner",
    "query_heads": "n_head",
    "kv_heads": None,
    "attention_attributes": (("num_heads", "heads"),),
}

SPECS: dict[str, ArchSpec] = {
    spec.model_type: spec
    for spec in (
        *(_llama_like(model_type, name) for model_type, name in _LIKE_LLAMA.items()),
        _llama_like("gemma2", "Gemma2", post_norms=_SANDWICH),
        _llama_like(
            "gemma3_text", "Gemma3", "Gemma3TextConfig", headless_class="Gemma3TextModel", post_norms=_SANDWICH
        ),
        _llama_like(
            "gemma4_text",
            "Gemma4",
            "Gemma4TextConfig",
            headless_class="Gemma4TextModel",
            post_norms=_SANDWICH,
            computed_width="use_double_wide_mlp",
            native_overrides=("head_dim", "num_key_value_heads"),
            fixed_heads=((None, "its layers have heads of two sizes, and later ones read keys of earlier ones"),),
            fixed_layers=(
                ("hidden_size_per_layer_input", "one table of embeddings holds a part for every layer"),
                ("num_kv_shared_layers", "the last layers read keys and values of earlier ones"),
            ),
            refused=(("enable_moe_block", "its layers have experts beside the MLP"),),
        ),
        _llama_like("exaone4", "Exaone4", post_norms=_SANDWICH),
        _llama_like("olmo2", "Olmo2", **_OLMO),
        _llama_like("olmo3", "Olmo3", **_OLMO),
        _llama_like("olmo_hybrid", "OlmoHybrid", **_OLMO),
        _llama_like("granite", "Granite", **_SCALED),
        _llama_like("granite_swa", "GraniteSWA", head_parameters=("self_attn.sinks",), **_SCALED),
        _llama_like(
            "granitemoehybrid",
            "GraniteMoeHybrid",
            mlp_inputs=("shared_mlp.input_linear",),
            mlp_blocks=2,
            mlp_output="shared_mlp.output_linear",
            activation="shared_mlp.activation",
            width="shared_intermediate_size",
            refused=(("num_local_experts", "its layers have experts beside the shared MLP"),),
            **_SCALED,
        ),
        _llama_like(
            "hyperclovax",
            "HyperCLOVAX",
            post_norms=(("attention", "post_norm1"), ("mlp", "post_norm2")),
            **_SCALED,
        ),
        _llama_like("cohere", "Cohere", parallel=True, fixed_heads=(("use_qk_norm", "every head has norm weights"),)),
        _llama_like("cohere2", "Cohere2", parallel=True),
        _llama_like(
            "stablelm",
            "StableLm",
            parallel=("use_parallel_residual",),
            attention_attributes=(("num_heads", "heads"), ("num_key_value_heads", "groups")),
            fixed_heads=(("qk_layernorm", "every head has a norm of its own"),),
        ),
        *(_llama_like(name.lower(), name, **_UP_ALONE) for name in ("Arcee", "Apertus", "Nemotron", "Jais2")),
        _llama_like("nanochat", "NanoChat", **_FC),
        _llama_like(
            "starcoder2", "Starcoder2", mlp_inputs=("mlp.c_fc",), mlp_output="mlp.c_proj", activation="mlp.act"
        ),
        _llama_like("glm", "Glm", **_STACKED_GATE),
        _llama_like(
            "glm4",
            "Glm4",
            post_norms=(("attention", "post_self_attn_layernorm"), ("mlp", "post_mlp_layernorm")),
            **_STACKED_GATE,
        ),
        _llama_like(
            "phi3",
            "Phi3",
            attention_inputs=(Projection("self_attn.qkv_proj", _QKV),),
            attention_attributes=(("config", "config"), ("num_key_value_heads", "groups")),
            **_STACKED_GATE,
        ),
        _llama_like(
            "qwen3_5_text",
            "Qwen3_5",
            "Qwen3_5TextConfig",
            headless_class="Qwen3_5TextModel",
            attention_inputs=separate("self_attn", query_blocks=2),
        ),
        _llama_like(
            "lfm2",
            "Lfm2",
            mlp_inputs=("feed_forward.w1", "feed_forward.w3"),
            mlp_output="feed_forward.w2",
            activation=None,
            attention_output="self_attn.out_proj",
            computed_width="block_auto_adjust_ff_dim",
        ),
        _llama_like("phi", "Phi", attention_output="self_attn.dense", parallel=True, **_FC),
        ArchSpec(
            "gpt_neox",
            "GPTNeoXConfig",
            "GPTNeoXForCausalLM",
            layers="gpt_neox.layers",
            mlp_inputs=("mlp.dense_h_to_4h",),
            mlp_output="mlp.dense_4h_to_h",
            activation="mlp.act",
            attention_inputs=(Projection("attention.query_key_value", _QKV, interleaved=True),),
            attention_output="attention.dense",
            attention="attention",
            kv_heads=None,
            parallel=("use_parallel_residual",),
        ),
        ArchSpec(
            "falcon",
            "FalconConfig",
            "FalconForCausalLM",
            layers="transformer.h",
            mlp_inputs=("mlp.dense_h_to_4h",),
            mlp_output="mlp.dense_4h_to_h",
            activation="mlp.act",
            attention_inputs=(Projection("self_attention.query_key_value", _QKV, interleaved=True),),
            attention_output="self_attention.dense",
            attention="self_attention",
            width="ffn_hidden_size",
            kv_heads="num_kv_heads",
            multi_query=(("multi_query", True), ("new_decoder_architecture", False)),
            attention_attributes=(("num_heads", "heads"), ("num_kv_heads", "groups")),
            fixed_heads=(("alibi", "ALiBi gives every head a slope by its number"),),
            parallel=("parallel_attn", "new_decoder_architecture"),
            layer_outputs=2,
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
            transposed=True,
            fixed_layers=(("scale_attn_by_inverse_layer_idx", "attention is divided by the number of its layer"),),
            **_GPT | {"attention_attributes": (("num_heads", "heads"), ("split_size", "features"))},
        ),
        ArchSpec(
            "gpt_bigcode",
            "GPTBigCodeConfig",
            "GPTBigCodeForCausalLM",
            multi_query=(("multi_query", True),),
            **_GPT | {"attention_inputs": (Projection("attn.c_attn", _QKV, interleaved=True),)},
        ),
        ArchSpec(
            "gpt_neo",
            "GPTNeoConfig",
            "GPTNeoForCausalLM",
            layer_outputs=2,
            **_GPT
            | {
                "attention_inputs": separate("attn.attention"),
                "attention_output": "attn.attention.out_proj",
                "attention_attributes": (("attention.num_heads", "heads"),),
                "width": "intermediate_size",
                "query_heads": "num_heads",
            },
        ),
        ArchSpec(
            "gptj",
            "GPTJConfig",
            "GPTJForCausalLM",
            layers="transformer.h",
            mlp_inputs=("mlp.fc_in",),
            mlp_output="mlp.fc_out",
            activation="mlp.act",
            attention_inputs=separate("attn"),
            attention_output="attn.out_proj",
            attention="attn",
            width="n_inner",
            query_heads="n_head",
            kv_heads=None,
            attention_attributes=(("num_attention_heads", "heads"),),
            parallel=True,
        ),
    )
}

SPECS |= {entry["model_type"]: ArchSpec(**entry) for entry in MOE_ENTRIES}

BUILT_IN = frozenset(SPECS)
"""The model types of the table itself; others were registered."""


def values_of(spec: ArchSpec) -> dict[str, Any]:
    """Return the fields of an entry that differ from their defaults, as numbers, strings, tuples and dictionaries."""
    given = asdict(spec)
    return {item.name: given[item.name] for item in fields(spec) if getattr(spec, item.name) != item.default}


def entry_from(values: Mapping[str, Any]) -> ArchSpec:
    """Return the entry with these fields, as from [`values_of`][]."""
    more: dict[str, Any] = {}
    if (inputs := values.get("attention_inputs")) is not None:
        more["attention_inputs"] = tuple(Projection(**one) for one in inputs)
    if (experts := values.get("experts")) is not None:
        more["experts"] = Experts(**experts)
    return ArchSpec(**{**values, **more})


SPECS |= {entry["model_type"]: entry_from(entry) for entry in ENTRIES}


def bare_name(reference: str) -> str:
    """Return the name of a class without its module."""
    return reference.rpartition(":")[2]


def base_model_type(model_type: str) -> str:
    """Return the native model type behind ``context_pruned_<base>``; any other type is returned unchanged."""
    return model_type.removeprefix(PREFIX)
