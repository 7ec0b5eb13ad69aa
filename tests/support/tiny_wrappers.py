"""Tiny random models of images and text, one of every text part that a wrapper may have, and an image for each."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers

from hf_context_prune.modeling.wrapper_specs import WRAPPERS

from .tiny import COMMON, FAMILIES, VOCABULARY

IMAGE = VOCABULARY - 1
"""The token that stands for a part of an image."""
_ROTATION = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
_PATCHES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 2}
_TOWER = {"image_size": 28, "patch_size": 7, **_PATCHES}
_QWEN = {"hidden_size": 32, "num_heads": 4, "intermediate_size": 40, "depth": 2, "patch_size": 7} | {
    "spatial_merge_size": 2,
    "out_hidden_size": COMMON["hidden_size"],
    "num_position_embeddings": 16,
}
_QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": IMAGE - 1, "vision_start_token_id": IMAGE - 2} | {
    "vision_end_token_id": IMAGE - 3
}

CASES: dict[str, tuple[str, str, dict]] = {
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **_TOWER},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": IMAGE - 1,
            "eoi_token_index": IMAGE - 2,
        },
    ),
    **{
        f"mistral3-{text}": (
            "mistral3",
            text,
            {
                "vision_config": {"model_type": "pixtral", "head_dim": 8, **_TOWER},
                "image_token_index": IMAGE,
                "tie_word_embeddings": False,
            },
        )
        for text in ("mistral", "ministral3")
    },
    "qwen3_5": ("qwen3_5", "qwen3_5_text", {"vision_config": {"model_type": "qwen3_5_vision", **_QWEN}, **_QWEN_IDS}),
    "qwen3_vl": (
        "qwen3_vl",
        "qwen3_vl_text",
        {
            "vision_config": {"model_type": "qwen3_vl_vision", "deepstack_visual_indexes": [0, 1], **_QWEN},
            "tie_word_embeddings": True,
            **_QWEN_IDS,
        },
    ),
}
"""(wrapper, text part, values of the config) by test id."""
_TEXTS = FAMILIES | {"qwen3_vl_text": FAMILIES["qwen3"] | {"head_dim": 8}}


def tiny_wrapper(name: str):
    """A random model of images and text, float32, in evaluation mode; every caller gets a copy."""
    return copy.deepcopy(_built(name))


@cache
def _built(name: str):
    model_type, text, values = CASES[name]
    part = COMMON | _TEXTS[text] | {"model_type": text}
    if text.startswith("qwen3"):
        part["rope_parameters"] = _ROTATION
    spec = WRAPPERS[model_type]
    torch.manual_seed(0)
    config = getattr(transformers, spec.config_class)(text_config=part, **values)
    model = getattr(transformers, spec.model_class)(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 0.0 if parameter_name.endswith("bias") or model_type == "gemma3" else 1.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
            elif "language_model" not in parameter_name and "lm_head" not in parameter_name:
                parameter.copy_(0.2 * torch.randn_like(parameter))  # large, so that an image shows
    return model.eval()


def picture(name: str) -> dict[str, torch.Tensor]:
    """The inputs of a text with one image of 28 x 28 pixels, which makes four tokens."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY - 8, (1, 16), generator=draw)
    ids[:, 5:9] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kind = (ids == IMAGE).int()
    if name.startswith("qwen3"):
        ids[:, 4] = IMAGE - 2
        patches = torch.randn(16, 3 * 2 * 7 * 7, generator=draw)
        return inputs | {
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": kind,
        }
    pixels = torch.randn(1, 3, 28, 28, generator=draw)
    if name == "gemma3":
        return inputs | {"pixel_values": pixels, "token_type_ids": kind}
    return inputs | {"pixel_values": pixels, "image_sizes": torch.tensor([[28, 28]])}
