"""Products in bfloat16 where the processor computes them faster, and what helps where numbers overflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

FAST_PRECISION = "medium"
"""PyTorch's name for float32 products of factors rounded to bfloat16; "highest" disables all rounding."""


def overflow_remedy(dtype: torch.dtype) -> str:
    """Return, as a sentence for an error, what helps where a model of this data type gives NaN or Inf."""
    if torch.finfo(dtype).bits < torch.finfo(torch.float32).bits:
        name = str(dtype).removeprefix("torch.")
        return f"Load the model in float32 (--dtype float32): {name} may have overflowed."
    return "No wider data type would help: the weights are damaged. Download or save the model again."


@contextmanager
def reduced_precision_matmul() -> Iterator[None]:
    """Let float32 products round their factors to bfloat16 (sums stay float32), where PyTorch is faster so.

    PyTorch is faster with AMX, and on CUDA with TensorFloat-32; elsewhere nothing changes. See also
    [`bfloat16_autocast`][].
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(FAST_PRECISION)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Return whether products in bfloat16 are faster than products in float32 on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return False


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the type to which factors of products may be rounded where that is faster and the error averages out."""
    return torch.bfloat16 if FAST_PRECISION != "highest" and bfloat16_is_fast(device) else torch.float32


def rounded_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return A B, float32; factors and result are rounded to bfloat16 where the processor is faster so.

    That takes two thirds of the time of [`reduced_precision_matmul`][], whose results are not rounded.

    Args:
        left: A, [rows, inner], float32.
        right: B, [inner, columns], float32.
    """
    dtype = product_dtype(left.device)
    return (left.to(dtype) @ right.to(dtype)).float()


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute as without [`reduced_precision_matmul`][] and [`bfloat16_autocast`][], within either."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def bfloat16_autocast(hidden: torch.Tensor) -> Iterator[None]:
    """Run a layer in bfloat16, except its residual stream and norms, where the processor is faster so.

    Use this to compare two models over many tokens: both round alike, the remaining error averages out, and the same
    time is enough for more tokens. Do not use it for the LM head: rounded logits differ by more than the loss from a
    narrowed layer.

    Args:
        hidden: Input of the layer; half precision needs no autocast.
    """
    cpu = hidden.device.type == "cpu" and hidden.dtype == torch.float32
    rounds = cpu and product_dtype(hidden.device) == torch.bfloat16
    with reduced_precision_matmul(), torch.autocast("cpu", torch.bfloat16) if rounds else nullcontext():
        yield
