"""The loss of recovery, with its gradient in one pass over few tokens at a time: what is wide stays in the cache."""

from __future__ import annotations

from typing import Any

import torch
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
    share = 0.0 if wanted is None else distillation
    loss: torch.Tensor = _TokenLoss.apply(logits, targets, wanted if share else None, share, temperature)
    return loss


class _TokenLoss(torch.autograd.Function):
    """The gradient by the logits is known with the loss: (1 - a) (p - y) + a T (p_T - q_T), over the tokens."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,  # noqa: ANN401
        logits: torch.Tensor,
        targets: torch.Tensor,
        wanted: torch.Tensor | None,
        share: float,
        temperature: float,
    ) -> torch.Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        rows = _ROWS.get(logits.device.type, _MANY)
        for begin in range(0, len(targets), rows):
            part = slice(begin, begin + rows)
            z, ids = logits[part].float(), targets[part]
            own = z.log_softmax(dim=-1)
            if share < 1:
                total -= (1 - share) * own.gather(-1, ids[:, None]).sum()
            warm = own if temperature == 1 or wanted is None else (z / temperature).log_softmax(dim=-1)
            probability = own.exp()
            if wanted is None:
                slope = probability
            else:
                teacher = (wanted[part].float() / temperature).log_softmax(dim=-1)
                expected = teacher.exp()
                total += share * temperature**2 * (expected * (teacher - warm)).sum()
                slope = probability if temperature == 1 else warm.exp()
                slope = share * temperature * (slope - expected) + (1 - share) * probability
            slope.scatter_add_(-1, ids[:, None], slope.new_full((len(ids), 1), share - 1))
            gradient[part] = slope / len(targets)
        ctx.save_for_backward(gradient)
        return total / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override] # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None, None
