"""The rotation of positions, as llama.cpp reads it: numbers of the file, and tensors with factors of frequencies."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import gguf
import torch
from gguf import GGUFWriter

from hf_context_prune.errors import ExportError, PruningWarning
from hf_context_prune.modeling.geometry import Geometry
from hf_context_prune.modeling.runtimes import GGUF_INTERVALS
from hf_context_prune.modeling.specs import base_model_type

from .gguf_family import GgufFamily

_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""The values of YaRN that llama.cpp takes whatever the file says."""


def rope_of(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return how positions are rotated, in layers that see all tokens; empty where they are not."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return dict(parameters.get("full_attention", parameters))


def rope_kind(config: Any) -> str:  # noqa: ANN401
    """Return the type of the scaling of the rotation."""
    rope = rope_of(config)
    kind = str(rope.get("rope_type", "default"))
    return "alpha" if kind == "dynamic" and rope.get("alpha") else kind  # Hunyuan's, which depends on no length


def check_rope(config: Any, name: str, family: GgufFamily) -> None:  # noqa: ANN401
    """Refuse a scaling that the architecture can't compute.

    Args:
        config: The config of the model.
        name: Its family.
        family: The conventions of it.

    Raises:
        ExportError: The message names what it can.
    """
    kind = rope_kind(config)
    if kind not in family.ropes:
        raise ExportError(
            f"The rope type {kind!r} of a {name} model can't be written to GGUF; allowed are "
            f"{', '.join(family.ropes)}. Export to another format."
        )
    rope = rope_of(config)
    other = {key: rope[key] for key, value in _YARN.items() if kind == "yarn" and rope.get(key) not in (None, value)}
    if other == {"truncate": False}:  # gpt-oss, which all of its GGUF files run like this
        warnings.warn(
            f"This {name} model does not round the ends of YaRN's range, llama.cpp does: losses differ a little.",
            PruningWarning,
            stacklevel=2,
        )
    elif other:
        raise ExportError(
            f"llama.cpp computes YaRN with {_YARN}, but this model has {other}. Export to another format."
        )


def write_rope(writer: GGUFWriter, model: Any, geometry: Geometry, family: GgufFamily) -> None:  # noqa: ANN401
    """Write the base, the rotated features and the scaling.

    Args:
        writer: Writer of the file.
        model: The model.
        geometry: Its sizes.
        family: Its conventions in llama.cpp.
    """
    config, rope = model.config, rope_of(model.config)
    if not rope:
        return
    kind, dims, base = rope_kind(config), _dims(rope, geometry), float(rope["rope_theta"])
    writer.add_rope_dimension_count(dims)
    writer.add_rope_freq_base(base * rope["alpha"] ** (dims / (dims - 2)) if kind == "alpha" else base)
    if (sliding := config.rope_parameters.get("sliding_attention")) is not None:
        writer.add_rope_freq_base_swa(float(sliding["rope_theta"]))
    if base_model_type(config.model_type) in GGUF_INTERVALS:
        writer.add_rope_dimension_sections([dims // 2, 0, 0, 0])  # a text has positions of one kind
    if hasattr(config, "position_embedding_type"):  # Granite's hybrids, most of which have no rotation
        writer.add_rope_scaling_finetuned(config.position_embedding_type == "rope")
    if (beta := rope.get("llama_4_scaling_beta")) is not None:
        writer.add_attn_temperature_scale(float(beta))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        # llama.cpp itself multiplies by what YaRN recommends.
        writer.add_rope_scaling_attn_factors(_attention_factor(model) / (1 + 0.1 * math.log(rope["factor"])))
    elif kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(_attention_factor(model))


def rope_tensors(model: Any, geometry: Geometry) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ANN401
    """Yield names and values of the tensors with a factor for each frequency.

    Args:
        model: The model.
        geometry: Its sizes.
    """
    rope, kind = rope_of(model.config), rope_kind(model.config)
    if kind == "llama3":
        dims = _dims(rope, geometry)
        plain = float(rope["rope_theta"]) ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
        yield "rope_freqs.weight", (plain / model.get_decoder().rotary_emb.inv_freq.double().cpu()).float()
    elif kind == "longrope":
        for which in ("long", "short"):
            yield f"rope_factors_{which}.weight", torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)


def _dims(rope: dict[str, Any], geometry: Geometry) -> int:
    return int(geometry.head_dim * (rope.get("partial_rotary_factor") or 1.0))


def _attention_factor(model: Any) -> float:  # noqa: ANN401
    """Return the factor of the rotated queries and keys."""
    rotary, name = model.get_decoder().rotary_emb, "attention_scaling"
    return float(getattr(rotary, name if hasattr(rotary, name) else f"full_attention_{name}"))
