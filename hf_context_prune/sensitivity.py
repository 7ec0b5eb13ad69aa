"""How much loss each layer pays for each width, measured at the model's output on calibration text.

Errors of different layers are not comparable (a large error in one may not matter, a small one in another may), so the
adaptive allocation compares what they do to the loss: each layer is narrowed alone, repaired, and the model is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from .architectures import (
    Target,
    blocks,
    check_supported,
    output_projection,
    output_weight,
    read_geometry,
    unit_size,
)
from .errors import NumericsError
from .stats import Curve, Key, Repair

PROBES = (0.75, 0.5, 0.25)
"""Shares of a layer's neurons that are kept when it is probed."""


def _loss(model: PreTrainedModel, token_blocks: torch.Tensor, batch_tokens: int) -> float:
    """Mean cross-entropy a token, in nats."""
    total, count = 0.0, 0
    for chunk in token_blocks.split(max(1, batch_tokens // token_blocks.shape[1])):
        ids = chunk.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        labels = ids[:, 1:]
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += labels.numel()
    return total / count


@contextmanager
def _narrowed(
    projection: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int]
) -> Iterator[None]:
    """Let a projection act as if only the kept features were there, with these weights; undone at the end."""
    view = output_weight(projection)
    old_weight, old_bias = view.clone(), projection.bias
    narrow = torch.zeros_like(view)  # filled before the old weight goes: the new one may be a view of it
    narrow[:, torch.tensor(kept, device=view.device)] = weight.to(view.device, view.dtype)
    try:
        view.copy_(narrow)
        if bias is not None:
            projection.bias = nn.Parameter(bias.to(view.device, view.dtype), requires_grad=False)
        yield
    finally:
        view.copy_(old_weight)
        projection.bias = old_bias


def measure_sensitivity(
    model: PreTrainedModel,
    importance: Mapping[Key, torch.Tensor],
    repair: Repair,
    token_blocks: torch.Tensor,
    *,
    targets: Sequence[Target],
    batch_tokens: int = 2048,
) -> dict[Key, Curve]:
    """Narrow every layer alone to a few widths and measure the loss.

    Args:
        model: The dense model; runs in evaluation mode, and is as it was when this returns.
        importance: One value a unit for every (layer, target).
        repair: As for `apply_plan`.
        token_blocks: Text to measure on, [blocks, length], int64.
        targets: Which units.
        batch_tokens: Tokens a batch.

    Returns:
        A curve for every (layer, target) that can lose units.

    Raises:
        NumericsError: A loss is NaN or Inf.
    """
    spec = check_supported(model)
    geometry = read_geometry(model.config, spec)
    probes = []
    for layer, widths in enumerate(geometry.layers):
        for target in targets:
            total = widths.neurons if target == "mlp" else widths.kv_groups
            counts = {round(total * share) for share in PROBES} if target == "mlp" else set(range(1, total))
            probes += [(layer, target, total, count) for count in sorted(counts - {0, total}, reverse=True)]
    curves: dict[Key, list[tuple[int, float]]] = {}
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            base = _checked(_loss(model, token_blocks, batch_tokens), "the dense model")
            for layer, target, total, count in tqdm(
                probes, desc="Probing layers", unit="probe", name="hf_context_prune.sensitivity"
            ):
                curve = curves.setdefault((layer, target), [(total, 0.0)])
                units = sorted(importance[layer, target].argsort(descending=True, stable=True)[:count].tolist())
                size = unit_size(geometry, target)
                kept = [unit * size + feature for unit in units for feature in range(size)]
                projection = output_projection(blocks(model, spec)[layer], spec, target)
                weight, bias = repair(layer, target, output_weight(projection), projection.bias, kept)  # type: ignore[arg-type]
                with _narrowed(projection, weight, bias, kept):
                    loss = _loss(model, token_blocks, batch_tokens)
                where = f"the model with layer {layer} ({target}) narrowed to {count} of {total} units"
                curve.append((count, _checked(loss, where) - base))
    finally:
        for module in training:
            module.training = True
    return {key: tuple(curve) for key, curve in curves.items()}


def _checked(loss: float, where: str) -> float:
    if not math.isfinite(loss):
        raise NumericsError(
            f"The loss of {where} is {loss}, so widths can't be compared. Check the model's weights, or load it in "
            f"float32."
        )
    return loss
