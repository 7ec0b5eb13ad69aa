"""Faster products in bfloat16 where the processor has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

FAST_PRECISION = "medium"
"""PyTorch's name for float32 products of factors rounded to bfloat16; "highest" rounds nothing anywhere."""


@contextmanager
def reduced_precision_matmul() -> Iterator[None]:
    """Let float32 products round their factors to bfloat16 (sums stay float32), where PyTorch has that faster.

    It has with AMX, and on CUDA with TensorFloat-32; elsewhere nothing changes. See also [`bfloat16_autocast`][].
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(FAST_PRECISION)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32 there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return False


@contextmanager
def bfloat16_autocast(hidden: torch.Tensor) -> Iterator[None]:
    """Let a block run in bfloat16 but for its residual stream and norms, where the processor is faster so.

    For blocks that are run to compare two models over many tokens: both round alike, what is left averages out, and the
    same time buys more tokens. Not for the head: rounded logits differ by more than a narrowed layer costs.

    Args:
        hidden: What the block is given; in half precision it is fast as it is.
    """
    cpu = hidden.device.type == "cpu" and hidden.dtype == torch.float32
    rounds = cpu and FAST_PRECISION != "highest" and bfloat16_is_fast(hidden.device)
    with reduced_precision_matmul(), torch.autocast("cpu", torch.bfloat16) if rounds else nullcontext():
        yield
