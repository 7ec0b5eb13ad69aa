"""The architectures of llama.cpp with mixtures of experts: one entry a family, verified in llama.cpp itself."""

from __future__ import annotations

from gguf import MODEL_ARCH, ExpertGatingFuncType

from .gguf_family import GRANITE, LINEAR_ATTENTION, RMS, UNBIASED, WINDOW, GgufFamily, Numbers

_WIDTH = ("expert_feed_forward_length", "moe_intermediate_size")
_SIGMOID = ("expert_gating_func", ExpertGatingFuncType.SIGMOID)
_GATE, _UP, _DOWN = ("ffn_gate_exps.weight",), ("ffn_up_exps.weight",), ("ffn_down_exps.weight",)
_EXPERTS = {"mlp.experts.gate_up_proj": _GATE + _UP, "mlp.experts.down_proj": _DOWN}
_SHARED_WITH_GATE = {**_EXPERTS, "mlp.shared_expert_gate.weight": ("ffn_gate_inp_shexp.weight",)}
_SHARED: Numbers = (_WIDTH, ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"))
_SHARES = ("norm_topk_prob", True)

MOE_FAMILIES: dict[str, GgufFamily] = {
    "mixtral": GgufFamily(MODEL_ARCH.LLAMA, reordered=True, names=_EXPERTS),
    "qwen2_moe": GgufFamily(
        MODEL_ARCH.QWEN2MOE,
        numbers=(*RMS, *_SHARED),
        required=(("norm_topk_prob", False), ("qkv_bias", True)),
        full_heads=True,
        own_head=True,
        names=_SHARED_WITH_GATE,
    ),
    "qwen3_moe": GgufFamily(MODEL_ARCH.QWEN3MOE, numbers=(*RMS, _WIDTH), required=(*UNBIASED, _SHARES), names=_EXPERTS),
    "olmoe": GgufFamily(
        MODEL_ARCH.OLMOE,
        required=(*UNBIASED, ("norm_topk_prob", False), ("clip_qkv", None)),
        full_heads=True,
        own_head=True,
        names=_EXPERTS,
    ),
    "granitemoe": GgufFamily(
        MODEL_ARCH.GRANITE_MOE,
        reordered=True,
        numbers=GRANITE,
        required=UNBIASED,
        names={
            "block_sparse_moe.router.weight": ("ffn_gate_inp.weight",),
            "block_sparse_moe.experts.gate_up_proj": _GATE + _UP,
            "block_sparse_moe.experts.down_proj": _DOWN,
        },
    ),
    "gpt_oss": GgufFamily(
        MODEL_ARCH.GPT_OSS,
        numbers=(*RMS, WINDOW, ("expert_feed_forward_length", "intermediate_size")),
        own_head=True,
        names={
            **_EXPERTS,
            "self_attn.sinks": ("attn_sinks.weight",),
            "post_attention_layernorm.weight": ("post_attention_norm.weight",),
            "mlp.router.weight": ("ffn_gate_inp.weight",),
            "mlp.router.bias": ("ffn_gate_inp.bias",),
            "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
            "mlp.experts.down_proj_bias": ("ffn_down_exps.bias",),
        },
    ),
    "glm4_moe": GgufFamily(
        MODEL_ARCH.GLM4_MOE,
        numbers=(
            *(*RMS, _WIDTH, _SIGMOID),
            ("expert_shared_count", "n_shared_experts"),
            ("expert_weights_scale", "routed_scaling_factor"),
            ("expert_weights_norm", "norm_topk_prob"),
            ("leading_dense_block_count", "first_k_dense_replace"),
        ),
        required=(("n_group", 1),),
        names={**_EXPERTS, "mlp.gate.e_score_correction_bias": ("exp_probs_b.bias",)},
    ),
    "qwen3_5_moe_text": GgufFamily(
        MODEL_ARCH.QWEN35MOE,
        numbers=(*LINEAR_ATTENTION, *_SHARED),
        required=UNBIASED,
        norm_offset=1.0,
        plain_norms=("linear_attn.norm",),
        names={**_SHARED_WITH_GATE, "linear_attn.dt_bias": ("ssm_dt.bias",)},
    ),
    "ernie4_5_moe": GgufFamily(
        MODEL_ARCH.ERNIE4_5_MOE,
        numbers=(
            *(*RMS, _WIDTH),
            ("expert_shared_count", "moe_num_shared_experts"),
            ("expert_shared_feed_forward_length", "moe_intermediate_size*moe_num_shared_experts"),
            ("leading_dense_block_count", "moe_layer_start_index"),
            ("interleave_moe_layer_step", "moe_layer_interval"),
        ),
        required=(("use_bias", False),),
        stepped=True,
        names={**_EXPERTS, "mlp.gate.moe_statics.e_score_correction_bias": ("exp_probs_b.bias",)},
    ),
    "lfm2_moe": GgufFamily(
        MODEL_ARCH.LFM2MOE,
        numbers=(
            *(_WIDTH, _SIGMOID),
            ("layer_norm_rms_eps", "norm_eps"),
            ("shortconv_l_cache", "conv_L_cache"),
            ("leading_dense_block_count", "num_dense_layers"),
        ),
        required=(("conv_bias", False), _SHARES, ("routed_scaling_factor", 1.0)),
        ropes=("default",),
        full_heads=True,
        names={
            "feed_forward.gate.weight": ("ffn_gate_inp.weight",),
            "feed_forward.expert_bias": ("exp_probs_b.bias",),
            "feed_forward.experts.gate_up_proj": _GATE + _UP,
            "feed_forward.experts.down_proj": _DOWN,
        },
    ),
}
