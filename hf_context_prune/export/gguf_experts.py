"""Mixtures of experts, as llama.cpp has them: how many, in which layers, and the layout of their tensors."""

from __future__ import annotations

from typing import Any

import torch
from gguf import GGUFWriter

from hf_context_prune.errors import ExportError
from hf_context_prune.modeling.geometry import has_experts
from hf_context_prune.modeling.specs import ArchSpec

from .gguf_family import GgufFamily


def check_experts(config: Any, spec: ArchSpec, family: GgufFamily) -> None:  # noqa: ANN401
    """Refuse layers with experts elsewhere than llama.cpp looks for them.

    Args:
        config: The config of the model.
        spec: Its table entry.
        family: Its conventions in llama.cpp.

    Raises:
        ExportError: The message says which layers have experts, and where llama.cpp looks for them.
    """
    if (experts := spec.experts) is None:
        return
    layers = range(config.num_hidden_layers)
    written = {source for method, source in family.numbers if method == "leading_dense_block_count"}
    first = getattr(config, experts.first) if experts.first is not None and experts.first in written else 0
    step = getattr(config, experts.interval) if experts.interval is not None and family.stepped else 1
    found = [index for index in layers if has_experts(config.per_layer_config[index], spec, index)]
    looked_for = [index for index in layers if index >= first and (index + 1) % step == 0]
    if found != looked_for:
        raise ExportError(
            f"llama.cpp's architecture of {spec.model_type} has experts in layers {', '.join(map(str, looked_for))}, "
            f"but this model has them in {', '.join(map(str, found)) or 'none'}. Export to another format."
        )


def write_experts(writer: GGUFWriter, config: Any, spec: ArchSpec) -> None:  # noqa: ANN401
    """Write how many experts the layers have, and how many a token is routed to."""
    if (experts := spec.experts) is not None:
        writer.add_expert_count(getattr(config, experts.count))
        writer.add_expert_used_count(getattr(config, experts.per_token))


def expert_values(spec: ArchSpec, path: str, values: torch.Tensor) -> torch.Tensor:
    """Return the values of a tensor of the experts or their router for the file; others are returned unchanged.

    Args:
        spec: The table entry.
        path: Name of the tensor in its layer.
        values: Its values in the model.
    """
    if (experts := spec.experts) is None or not path.startswith(f"{experts.block}."):
        return values
    if experts.transposed and path.startswith(f"{experts.prefix}."):
        values = values.transpose(1, 2) if values.ndim == 3 else values
        if "gate_up" in path:  # gates and inputs in turns
            values = torch.cat([values[:, ::2], values[:, 1::2]], dim=1)
    if path.endswith(("shared_expert_gate.weight", "e_score_correction_bias")):
        values = values.flatten()
    return values


def part_axis(spec: ArchSpec, path: str) -> int:
    """Return the axis along which a tensor is split into the tensors of the file: experts stay together."""
    return 0 if spec.experts is None or not path.startswith(f"{spec.experts.prefix}.") else 1
