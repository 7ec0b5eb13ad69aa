"""What an entry of the table of llama.cpp's architectures says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH

Numbers = tuple[tuple[str, Any], ...]
RMS: Numbers = (("layer_norm_rms_eps", "rms_norm_eps"),)
LAYER_NORM: Numbers = (("layer_norm_eps", "layer_norm_eps"),)
GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")
"""llama.cpp has one for all, the first, which differs from the last by less than 0.0005."""
GRANITE: Numbers = (
    *RMS,
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
    ("attention_scale", "attention_multiplier"),
)
WINDOW = ("sliding_window", "sliding_window")
LLAMA3 = ("default", "linear", "yarn", "llama3")
UNBIASED = (("attention_bias", False),)
LINEAR_ATTENTION: Numbers = (
    *RMS,
    ("ssm_conv_kernel", "linear_conv_kernel_dim"),
    ("ssm_state_size", "linear_key_head_dim"),
    ("ssm_group_count", "linear_num_key_heads"),
    ("ssm_inner_size", "linear_num_value_heads*linear_value_head_dim"),
    ("ssm_time_step_rank", "linear_num_value_heads"),
)


@dataclass(frozen=True)
class GgufFamily:
    """Name and conventions of an architecture in llama.cpp.

    Attributes:
        arch: The architecture.
        reordered: Whether query and key rows are reordered: transformers rotates feature i of a head with i + half,
            some of llama.cpp's architectures rotate neighbours.
        activation: Values of the config's activation that it computes; the first is the one that it is known by.
        numbers: (the writer's method without ``add_``, what it writes: a value, or the product of the config
            attributes that ``*`` joins). Values that are None are left out.
        required: (config attribute, the only value that it computes).
        norm_offset: What a norm adds to its weight before it multiplies, which is then added to the weight.
        plain_norms: Parts of the names of norms that add nothing.
        ropes: Types of the scaling of the rotation that it computes.
        full_heads: Whether its query heads have as many features as the hidden size: removed heads are zeros in the
            file.
        own_head: Whether it asks for an LM head even where the embedding is one.
        stepped: Whether it knows layers with experts by the number of the first and an interval; else all behind the
            first have them.
        names: llama.cpp's names of tensors that the package gguf can't name, by path in the layer: of each of the
            equal parts, one after the other, that it has there.
    """

    arch: MODEL_ARCH
    reordered: bool = False
    activation: tuple[str, ...] = ("silu",)
    numbers: Numbers = RMS
    required: tuple[tuple[str, Any], ...] = ()
    norm_offset: float = 0.0
    plain_norms: tuple[str, ...] = ()
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    full_heads: bool = False
    own_head: bool = False
    stepped: bool = False
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
