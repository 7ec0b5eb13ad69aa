"""The architectures of llama.cpp that GGUF files are written for: one entry a family, verified in llama.cpp itself."""

from __future__ import annotations

from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

from hf_context_prune.errors import ExportError
from hf_context_prune.modeling.runtimes import why_not_gguf_order

from .gguf_family import GELU, GRANITE, LAYER_NORM, LINEAR_ATTENTION, LLAMA3, RMS, UNBIASED, WINDOW, GgufFamily
from .gguf_moe_families import MOE_FAMILIES

FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(MODEL_ARCH.LLAMA, reordered=True, ropes=LLAMA3),
    "mistral": GgufFamily(MODEL_ARCH.LLAMA, reordered=True, ropes=LLAMA3),
    "ministral3": GgufFamily(MODEL_ARCH.MISTRAL3, reordered=True),
    "qwen2": GgufFamily(MODEL_ARCH.QWEN2, full_heads=True),
    "qwen3": GgufFamily(MODEL_ARCH.QWEN3, required=UNBIASED),
    "qwen3_5_text": GgufFamily(
        MODEL_ARCH.QWEN35,
        numbers=LINEAR_ATTENTION,
        required=UNBIASED,
        norm_offset=1.0,
        plain_norms=("linear_attn.norm",),
        names={"linear_attn.dt_bias": ("ssm_dt.bias",)},
    ),
    "smollm3": GgufFamily(
        MODEL_ARCH.SMOLLM3,
        reordered=True,
        required=(*UNBIASED, ("mlp_bias", False)),
    ),
    "granite": GgufFamily(MODEL_ARCH.GRANITE, reordered=True, numbers=GRANITE),
    "granitemoehybrid": GgufFamily(
        MODEL_ARCH.GRANITE_HYBRID,
        reordered=True,
        numbers=(
            *GRANITE,
            ("ssm_conv_kernel", "mamba_d_conv"),
            ("ssm_state_size", "mamba_d_state"),
            ("ssm_group_count", "mamba_n_groups"),
            ("ssm_inner_size", "mamba_n_heads*mamba_d_head"),
            ("ssm_time_step_rank", "mamba_n_heads"),
        ),
        required=(("mamba_proj_bias", False), ("mamba_conv_bias", True)),
        ropes=("default",),
        names={
            "mamba.dt_bias": ("ssm_dt.bias",),
            "shared_mlp.input_linear.weight": ("ffn_gate.weight", "ffn_up.weight"),
            "shared_mlp.output_linear.weight": ("ffn_down.weight",),
        },
    ),
    "gemma": GgufFamily(MODEL_ARCH.GEMMA, activation=GELU, required=UNBIASED, norm_offset=1.0),
    "gemma2": GgufFamily(
        MODEL_ARCH.GEMMA2,
        activation=GELU,
        numbers=(
            *RMS,
            WINDOW,
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
        required=UNBIASED,
        norm_offset=1.0,
    ),
    "gemma3_text": GgufFamily(
        MODEL_ARCH.GEMMA3,
        activation=GELU,
        numbers=(*RMS, WINDOW, ("final_logit_softcapping", "final_logit_softcapping")),
        required=(*UNBIASED, ("attn_logit_softcapping", None)),
        norm_offset=1.0,
    ),
    "phi": GgufFamily(MODEL_ARCH.PHI2, activation=GELU, numbers=LAYER_NORM, own_head=True, full_heads=True),
    "phi3": GgufFamily(MODEL_ARCH.PHI3, ropes=("default", "longrope"), full_heads=True),
    "olmo": GgufFamily(
        MODEL_ARCH.OLMO,
        reordered=True,
        numbers=(("layer_norm_eps", 1e-5), ("clamp_kqv", "clip_qkv")),
        required=UNBIASED,
        full_heads=True,
    ),
    "olmo2": GgufFamily(MODEL_ARCH.OLMO2, required=UNBIASED, own_head=True, full_heads=True),
    "olmo3": GgufFamily(
        MODEL_ARCH.OLMO2,
        numbers=(*RMS, WINDOW),
        required=UNBIASED,
        own_head=True,
        full_heads=True,
    ),
    "cohere": GgufFamily(
        MODEL_ARCH.COMMAND_R,
        numbers=(*LAYER_NORM, ("logit_scale", "logit_scale")),
        required=(*UNBIASED, ("use_qk_norm", False)),
        full_heads=True,
    ),
    "cohere2": GgufFamily(
        MODEL_ARCH.COHERE2,
        numbers=(*LAYER_NORM, WINDOW, ("logit_scale", "logit_scale")),
        required=UNBIASED,
        full_heads=True,
    ),
    "glm": GgufFamily(MODEL_ARCH.CHATGLM, full_heads=True),
    "glm4": GgufFamily(MODEL_ARCH.GLM4),
    "exaone4": GgufFamily(MODEL_ARCH.EXAONE4, required=(("sliding_window", None),), ropes=LLAMA3, full_heads=True),
    "ernie4_5": GgufFamily(MODEL_ARCH.ERNIE4_5, required=(("use_bias", False),)),
    "seed_oss": GgufFamily(MODEL_ARCH.SEED_OSS, required=(("attention_out_bias", False), ("mlp_bias", False))),
    "hunyuan_v1_dense": GgufFamily(
        MODEL_ARCH.HUNYUAN_DENSE, required=UNBIASED, ropes=("default", "linear", "yarn", "alpha")
    ),
    "arcee": GgufFamily(
        MODEL_ARCH.ARCEE,
        reordered=True,
        activation=("relu2",),
        required=(*UNBIASED, ("mlp_bias", False)),
        ropes=LLAMA3,
    ),
    "apertus": GgufFamily(MODEL_ARCH.APERTUS, activation=("xielu",), ropes=LLAMA3, own_head=True),
    "nemotron": GgufFamily(
        MODEL_ARCH.NEMOTRON,
        activation=("relu2",),
        numbers=(("layer_norm_eps", "norm_eps"),),
        norm_offset=1.0,
        own_head=True,
        full_heads=True,
    ),
    "jais2": GgufFamily(
        MODEL_ARCH.JAIS2,
        activation=("relu2",),
        numbers=LAYER_NORM,
        required=(("attention_bias", True), ("mlp_bias", True)),
    ),
    "stablelm": GgufFamily(
        MODEL_ARCH.STABLELM,
        numbers=(*LAYER_NORM, ("parallel_residual", "use_parallel_residual")),
        required=(("qk_layernorm", False),),
        own_head=True,
        full_heads=True,
    ),
    "starcoder2": GgufFamily(
        MODEL_ARCH.STARCODER2,
        activation=GELU,
        numbers=(("layer_norm_eps", "norm_epsilon"),),
        required=(("use_bias", True),),
        full_heads=True,
    ),
    "gpt2": GgufFamily(
        MODEL_ARCH.GPT2,
        activation=GELU,
        numbers=(("layer_norm_eps", "layer_norm_epsilon"),),
        required=(("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)),
        full_heads=True,
    ),
    "gpt_bigcode": GgufFamily(
        MODEL_ARCH.STARCODER,
        activation=GELU,
        numbers=(("layer_norm_eps", "layer_norm_epsilon"),),
        required=(("scale_attn_weights", True),),
        full_heads=True,
    ),
    "gpt_neox": GgufFamily(
        MODEL_ARCH.GPTNEOX,
        activation=GELU,
        numbers=(*LAYER_NORM, ("parallel_residual", "use_parallel_residual")),
        required=(("attention_bias", True),),
        own_head=True,
        full_heads=True,
    ),
    "falcon": GgufFamily(
        MODEL_ARCH.FALCON,
        activation=GELU,
        numbers=(("layer_norm_eps", "layer_norm_epsilon"),),
        required=(("alibi", False), ("bias", False)),
        full_heads=True,
    ),
    "lfm2": GgufFamily(
        MODEL_ARCH.LFM2,
        numbers=(("layer_norm_rms_eps", "norm_eps"), ("shortconv_l_cache", "conv_L_cache")),
        required=(("conv_bias", False),),
        full_heads=True,
    ),
    **MOE_FAMILIES,
}
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")
_SCALED_BY_HEAD = ("gemma2", "gemma3_text")
"""Families whose attention llama.cpp scales by the size of a head, whatever the config says."""
_OWN_KEYS = ("olmoe",)
"""Families in which llama.cpp has keys and values for every query head."""


def check_conventions(config: Any, name: str) -> None:  # noqa: ANN401
    """Refuse a config that llama.cpp's architecture computes in another way.

    Args:
        config: The config of the model.
        name: Its family, one of `FAMILIES`.

    Raises:
        ExportError: The message names the attribute and what llama.cpp computes.
    """
    family, known = FAMILIES[name], MODEL_ARCH_NAMES[FAMILIES[name].arch]
    attribute = next((each for each in _ACTIVATIONS if getattr(config, each, None) is not None), None)
    if attribute is not None and getattr(config, attribute) not in family.activation:
        raise ExportError(
            f"llama.cpp computes {name} with {family.activation[0]}, but {attribute} is "
            f"{getattr(config, attribute)!r}. Export to another format."
        )
    required = [*family.required]
    if name in _SCALED_BY_HEAD:
        required.append(("query_pre_attn_scalar", config.head_dim))
    if name in _OWN_KEYS:
        required.append(("num_key_value_heads", config.num_attention_heads))
    for each, value in required:
        if (has := getattr(config, each)) != value:
            raise ExportError(
                f"llama.cpp's architecture {known} computes {each}={value}, but this model has {has}. Export to "
                f"another format."
            )
    if (why := why_not_gguf_order(config.to_dict(), name)) is not None:
        raise ExportError(f"{why}. Export to another format.")
