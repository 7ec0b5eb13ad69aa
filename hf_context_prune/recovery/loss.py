"""The loss of recovery, with its gradient in one pass over few tokens at a time: what is wide stays in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

_ROWS = {"cpu": 32}
"""Tokens at once by device; elsewhere `_MANY`."""
_MANY = 1024


def token_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    wanted: torch.Tensor | None,
    *,
    distillation: float,
    temperature: float,
) -> torch.Tensor:
    """Mean over tokens of (1 - a) * cross-entropy + a * T^2 * KL(teacher || student).

    Args:
        logits: Of the student, [tokens, vocabulary], any floating-point dtype.
        targets: Next tokens, [tokens], int64.
        wanted: Logits of the teacher, [tokens, vocabulary]; None without a teacher.
        distillation: a, in [0, 1].
        temperature: T, above 0.
    """
    if wanted is None or distillation == 0:
        return nn.functional.cross_entropy(logits.float(), targets)
    loss: torch.Tensor = _Distilled.apply(logits, targets, wanted, distillation, temperature)
    return loss


class _Distilled(torch.autograd.Function):
    """The gradient by the logits is known with the loss: (1 - a) (p - y) + a T (p_T - q_T), over the tokens."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,  # noqa: ANN401
        logits: torch.Tensor,
        targets: torch.Tensor,
        wanted: torch.Tensor,
        share: float,
        temperature: float,
    ) -> torch.Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        rows = _ROWS.get(logits.device.type, _MANY)
        for z, ids, other, out in zip(*(x.split(rows) for x in (logits, targets, wanted, gradient)), strict=True):
            own = z.float().log_softmax(dim=-1)
            warm = own if temperature == 1 else (z.float() / temperature).log_softmax(dim=-1)
            teacher = (other.float() / temperature).log_softmax(dim=-1)
            expected = teacher.exp()
            if share < 1:
                total -= (1 - share) * own.gather(-1, ids[:, None]).sum()
            total += share * temperature**2 * (expected * (teacher - warm)).sum()
            probability = own.exp()
            slope = probability if temperature == 1 else warm.exp()
            slope = share * temperature * (slope - expected) + (1 - share) * probability
            slope.scatter_add_(-1, ids[:, None], slope.new_full((len(ids), 1), share - 1))
            out.copy_(slope / len(targets))
        ctx.save_for_backward(gradient)
        return total / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override] # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None, None
