"""The entries of the architectures with mixtures of experts, as values of an `ArchSpec`.

Their routers score every expert alone, so that without some experts the others are scored as before. This file travels
with every saved variable-width model, so it imports nothing but the standard library and parts of entries.
"""

from __future__ import annotations

from typing import Any

from .spec_parts import Experts, separate

_ROUTER = ("router.weight", 0)
_WEIGHTS = (("experts.gate_up_proj", 0), ("experts.down_proj", 0))
_SHARED: dict[str, Any] = {
    "shared": "shared_expert",
    "shared_width": "shared_expert_intermediate_size",
    "shared_gate": "shared_expert_gate",
}
_BIASED = ("gate.weight", 0), ("gate.e_score_correction_bias", 0), *_WEIGHTS


def _entry(model_type: str, name: str, experts: Experts, **differences: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "model_type": model_type,
        "config_class": f"{name}Config",
        "model_class": f"{name}ForCausalLM",
        "experts": experts,
        **differences,
    }


MOE_ENTRIES: tuple[dict[str, Any], ...] = (
    _entry("mixtral", "Mixtral", Experts(count="num_local_experts", width="intermediate_size")),
    _entry(
        "qwen2_moe",
        "Qwen2Moe",
        Experts(interval="decoder_sparse_step", dense_layers="mlp_only_layers", **_SHARED),
    ),
    _entry(
        "qwen3_moe",
        "Qwen3Moe",
        Experts(count="num_local_experts", interval="decoder_sparse_step", dense_layers="mlp_only_layers"),
    ),
    _entry(
        "olmoe",
        "Olmoe",
        Experts(width="intermediate_size"),
        fixed_heads=((None, "a norm over all heads together reads them"),),
    ),
    _entry(
        "granitemoe",
        "GraniteMoe",
        Experts(
            block="block_sparse_moe",
            router="router",
            tensors=(_ROUTER, *_WEIGHTS),
            width="intermediate_size",
            count="num_local_experts",
        ),
        residual_multiplier="residual_multiplier",
    ),
    _entry(
        "gpt_oss",
        "GptOss",
        Experts(
            router="router",
            tensors=(
                *(_ROUTER, ("router.bias", 0), *_WEIGHTS),
                *(("experts.gate_up_proj_bias", 0), ("experts.down_proj_bias", 0)),
            ),
            transposed=True,
            width="intermediate_size",
            count="num_local_experts",
        ),
        head_parameters=("self_attn.sinks",),
    ),
    _entry(
        "glm4_moe",
        "Glm4Moe",
        Experts(
            tensors=_BIASED,
            shared="shared_experts",
            shared_count="n_shared_experts",
            count="n_routed_experts",
            groups=("n_group", "topk_group"),
            first="first_k_dense_replace",
        ),
    ),
    _entry(
        "qwen3_5_moe_text",
        "Qwen3_5Moe",
        Experts(**_SHARED),
        config_class="Qwen3_5MoeTextConfig",
        headless_class="Qwen3_5MoeTextModel",
        attention_inputs=separate("self_attn", query_blocks=2),
    ),
    _entry(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        Experts(
            tensors=(("gate.weight", 0), ("gate.moe_statics.e_score_correction_bias", 1), *_WEIGHTS),
            shared="shared_experts",
            shared_count="moe_num_shared_experts",
            count="moe_num_experts",
            per_token="moe_k",
            first="moe_layer_start_index",
            last="moe_layer_end_index",
            interval="moe_layer_interval",
        ),
    ),
    _entry(
        "lfm2_moe",
        "Lfm2Moe",
        Experts(
            block="feed_forward",
            tensors=(("gate.weight", 0), ("expert_bias", 0), *_WEIGHTS),
            first="num_dense_layers",
        ),
        mlp_inputs=("feed_forward.w1", "feed_forward.w3"),
        mlp_output="feed_forward.w2",
        activation=None,
        attention_output="self_attn.out_proj",
    ),
)
