"""Tiny random models of every family, and a tiny tokenizer: one line a family."""

from __future__ import annotations

import copy
import json
import random
from functools import cache

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_context_prune.modeling.architectures import is_parallel, residual_scale
from hf_context_prune.modeling.geometry import WITHOUT_ATTENTION, kv_groups_of, shared_kv_heads, why_heads_stay
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.utils import precision

FAST_PRECISION = precision.FAST_PRECISION
"""As the package has it: for tests on the real model."""
precision.FAST_PRECISION = "highest"  # in every process that has tiny models: rounding is more than what they lose

VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # large, so that a wrong slice shows
}
GATED = {"intermediate_size": 40, "num_key_value_heads": 3, "head_dim": 8}

SLIDING = GATED | {"sliding_window": 16}
GRANITE = GATED | {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0}
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
DELTA = GATED | {
    "layer_types": HYBRID,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

FAMILIES: dict[str, dict] = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED | {"head_dim": 16},
    "mistral": SLIDING,
    "ministral": SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "ministral3": GATED,
    "smollm3": GATED | {"no_rope_layers": [1, 0, 1]},
    "gemma": GATED | {"head_dim": 16},
    "gemma2": SLIDING | {"query_pre_attn_scalar": 8},
    "gemma3_text": SLIDING | {"query_pre_attn_scalar": 8},
    "gemma4_text": SLIDING
    | {
        "num_hidden_layers": 5,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "vaultgemma": SLIDING | {"query_pre_attn_scalar": 8},
    "olmo": GATED | {"clip_qkv": 2.0},
    "olmo2": GATED,
    "olmo3": SLIDING,
    "olmo_hybrid": DELTA,
    "ernie4_5": GATED,
    "hunyuan_v1_dense": GATED,
    "seed_oss": GATED | {"residual_dropout": 0.0, "attention_dropout": 0.0},
    "helium": GATED,
    "cwm": SLIDING | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "exaone4": SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "granite": GRANITE,
    "granite_swa": GRANITE
    | {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "granitemoehybrid": GRANITE
    | {
        "shared_intermediate_size": 40,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": HYBRID,
        "mamba_n_heads": 4,
        "mamba_d_head": 24,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "hyperclovax": GATED | {"residual_multiplier": 0.5, "use_post_norm": True, "attention_multiplier": 0.3},
    "cohere": GATED | {"logit_scale": 1.0},
    "cohere2": SLIDING
    | {"logit_scale": 1.0, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "stablelm": GATED | {"use_qkv_bias": True},
    "arcee": GATED,
    "apertus": GATED,
    "nemotron": GATED,
    "jais2": GATED,
    "nanochat": GATED,
    "starcoder2": GATED | {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "glm": GATED,
    "glm4": GATED,
    "phi3": GATED,
    "qwen3_5_text": DELTA,
    "lfm2": GATED
    | {"intermediate_size": 60, "block_multiple_of": 8, "layer_types": ["conv", "full_attention", "conv"]},
    "phi": {"intermediate_size": 40, "num_key_value_heads": 3, "qk_layernorm": True},
    "gpt_neox": {"intermediate_size": 40},
    "falcon": {"ffn_hidden_size": 40, "new_decoder_architecture": True, "num_kv_heads": 3},
    "opt": {"ffn_dim": 40, "init_std": 0.2, "word_embed_proj_dim": 48, "dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_bigcode": {"n_inner": 40, "multi_query": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neo": {"intermediate_size": 40, "attention_types": [[["global", "local", "global"], 1]], "window_size": 16},
    "gptj": {"n_inner": 40, "rotary_dim": 4},
}

MOE = GATED | {"num_experts_per_tok": 2}
"""Eight experts of which every token is routed to two."""
MOE_FAMILIES: dict[str, dict] = {
    "mixtral": MOE | {"num_local_experts": 8},
    "qwen2_moe": MOE
    | {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    "qwen3_moe": MOE | {"num_experts": 8, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "olmoe": MOE | {"num_experts": 8},
    "granitemoe": GRANITE | {"num_experts_per_tok": 2, "num_local_experts": 8},
    "gpt_oss": MOE | {"num_local_experts": 8, "sliding_window": 16},
    "glm4_moe": MOE | {"n_routed_experts": 8, "moe_intermediate_size": 24, "num_mtp_layers": 0},
    "qwen3_5_moe_text": MOE
    | {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "layer_types": HYBRID,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "ernie4_5_moe": GATED
    | {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1},
    "lfm2_moe": MOE
    | {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
}
"""Families with mixtures of experts, whose contract is in ``tests/contract/test_experts.py``."""

VARIANTS: dict[str, tuple[str, dict]] = {
    "llama-mha-untied": ("llama", {"num_key_value_heads": 6, "tie_word_embeddings": False}),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3-biased-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False}),
    "opt-unbiased": ("opt", {"enable_bias": False}),
    "gpt2-n_inner": ("gpt2", {"n_inner": 40, "scale_attn_by_inverse_layer_idx": True}),
    "phi-mha": ("phi", {"num_key_value_heads": 6, "qk_layernorm": False, "tie_word_embeddings": True}),
    "gemma3_text-mha": ("gemma3_text", {"num_key_value_heads": 6}),
    "falcon-multi-query": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "bias": True}),
    "falcon-mha": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 6, "parallel_attn": False},
    ),
    "gpt_bigcode-multi-query": ("gpt_bigcode", {"multi_query": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "hyperclovax-pre-norm": ("hyperclovax", {"use_post_norm": False}),
    "lfm2-plain-width": ("lfm2", {"block_auto_adjust_ff_dim": False}),
}


def tiny_config(family: str, **overrides):
    spec = SPECS[family]
    values = FAMILIES | MOE_FAMILIES
    return getattr(transformers, spec.config_class)(**(COMMON | values[family] | overrides))


def tiny_model(family: str, *, seed: int = 0, **overrides):
    """A random model of a family, float32, in evaluation mode; biases and norms are random too.

    Each is built once per process, and every caller gets a copy.
    """
    key = repr((family, seed, sorted(overrides.items())))
    if key not in _BUILT:
        _BUILT[key] = _built(family, seed, overrides), torch.get_rng_state()
    model, random_state = _BUILT[key]
    torch.set_rng_state(random_state)  # as after building: what a test draws next is the same for every caller
    return copy.deepcopy(model)


_BUILT: dict[str, tuple[transformers.PreTrainedModel, torch.Tensor]] = {}
"""Models by what they were built from, and the random state after each was built."""


def _built(family, seed, overrides):
    torch.manual_seed(seed)
    model = getattr(transformers, SPECS[family].model_class)(tiny_config(family, **overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 0.0 if name.endswith("bias") or "gemma" in family else 1.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
        for name, bias in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("e_score_correction_bias", "expert_bias")):  # of routers, zero when they are made
                bias.copy_(0.1 * torch.randn_like(bias))
    return model.eval()


def case(name: str, **more):
    """The model of a family or variant by its test id."""
    family, overrides = (VARIANTS | MOE_VARIANTS).get(name, (name, {}))
    return tiny_model(family, **(overrides | more))


MOE_VARIANTS: dict[str, tuple[str, dict]] = {
    "qwen2_moe-normed": ("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 2}),
    "qwen3_moe-not-normed": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [1]}),
    "olmoe-normed": ("olmoe", {"norm_topk_prob": True}),
    "glm4_moe-groups": ("glm4_moe", {"n_group": 2, "topk_group": 1}),
    "ernie4_5_moe-interval": ("ernie4_5_moe", {"moe_layer_interval": 2, "use_bias": True}),
    "lfm2_moe-unbiased": ("lfm2_moe", {"use_expert_bias": False, "norm_topk_prob": False}),
}
MOE_CASES = [*MOE_FAMILIES, *MOE_VARIANTS]
MOE_COVERING = ["mixtral", "gpt_oss", "glm4_moe-groups", "lfm2_moe", "ernie4_5_moe-interval"]
"""Together they have every kind of router and of experts that the code tells apart."""

CASES = [*FAMILIES, *VARIANTS]
COVERING = [
    *("llama-mqa-tied", "gpt2", "gpt_neox", "gemma2", "granite", "phi"),
    *("phi3", "qwen3_5_text", "granite_swa", "gpt_bigcode-multi-query", "olmo2", "lfm2"),
]
"""Together they have every feature that the code tells apart (`features_of`). For tests outside the contract of the
families, and for those of its tests that take long."""


def features_of(name: str) -> set[object]:
    """What the code tells apart in a family or variant."""
    config = case(name).config
    spec = SPECS[config.model_type]
    kinds = {kind for kind in getattr(config, "layer_types", None) or () if kind in WITHOUT_ATTENTION}
    first = config.per_layer_config[0]
    groups, heads = kv_groups_of(first, spec), getattr(first, spec.query_heads)
    return {
        ("MLP", len(spec.mlp_inputs), spec.mlp_blocks, spec.activation is None),
        *(("projection", len(p.roles) > 1, p.interleaved, p.blocks) for p in spec.attention_inputs),
        ("transposed", spec.transposed),
        ("heads", "MQA" if groups == 1 else "MHA" if groups == heads else "GQA"),
        ("shared head", shared_kv_heads(config, spec) is not None),
        ("heads stay", why_heads_stay(config, spec) is not None),
        ("without attention", bool(kinds)),
        ("head parameters", bool(spec.head_parameters)),
        ("computed width", bool(spec.computed_width and getattr(config, spec.computed_width))),
        ("parallel", is_parallel(config, spec)),
        ("post norms", bool(spec.post_norms)),
        ("scaled residual", residual_scale(config, spec) != 1.0),
        ("tied", config.tie_word_embeddings),
    }


def tokens(count: int = 4, length: int = 20, *, seed: int = 1) -> torch.Tensor:
    """Random token ids, [count, length], none of them special."""
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


TEXT = "the court finds that the party of the first part has a duty of care; the patient was given the dose. " * 8


def texts(count: int = 40, *, seed: int = 0) -> list[str]:
    """Texts of random words of TEXT."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(TEXT.split(), k=60)) for _ in range(count)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most VOCABULARY tokens, trained on a sentence: a copy for every caller."""
    return copy.deepcopy(_trained_tokenizer())


@cache
def _trained_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


def model_and_text(folder, data):
    """A tiny model in ``base`` and forty documents in the file `data`, for commands; returns the folder."""
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(TEXT.split(), k=80)), "doc": str(i)}) for i in range(40)]
    (folder / data).write_text("\n".join(lines))
    return folder
