"""Hidden states on their way through the decoder layers, for sequential reconstruction.

Layers are called, never re-implemented: their real arguments (masks, position embeddings) are captured from the model's
own forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from hf_context_prune.modeling.patching import in_bfloat16, patch_forwards
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.samples import Batch
from hf_context_prune.utils.memmap import memmap_zeros

SPILL_SHARE = 0.5
"""Share of the free memory that hidden states may take; above it they lie in a memory-mapped file."""


@dataclass
class Stream:
    """The hidden states of one batch between two layers, in the base model and in the pruned one.

    Attributes:
        base: Hidden states of the base model, [batch, length, hidden]; possibly memory-mapped.
        pruned: Hidden states of the pruned model, in the same shape.
        calls: The other arguments that each layer is called with.
        mask: Unpadded positions, [batch * length]; None without padding.
        device: Where layers run.
        validation: Whether the batch only chooses ridges, and is never fitted.
    """

    base: torch.Tensor
    pruned: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    mask: torch.Tensor | None
    device: torch.device
    validation: bool = False

    def call(self, index: int, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run a layer on hidden states, with the arguments of this batch, and return its output."""
        args, kwargs = self.calls[index]
        output = in_bfloat16(layer)(hidden.to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the unpadded positions, [tokens, features], float32, where layers run."""
        flat = tensor.to(self.device).reshape(-1, tensor.shape[-1]).float()
        return flat if self.mask is None else flat[self.mask]


class StreamStorage:
    """Room for both hidden states of every batch: memory, or above a limit a memory-mapped temporary file.

    Args:
        elements: Values of all batches together, of one of the two models.
        dtype: Of the hidden states.
        limit: Bytes that may stay in memory; None: `SPILL_SHARE` of the free memory.

    Attributes:
        pruned: Hidden states of the pruned model, those of all kept batches one after the other, [elements].
    """

    def __init__(self, elements: int, dtype: torch.dtype, *, limit: int | None = None) -> None:
        if limit is None:
            limit = int(SPILL_SHARE * psutil.virtual_memory().available)
        self.spilled = 2 * elements * dtype.itemsize > limit
        make = memmap_zeros if self.spilled else _empty
        self._base, self.pruned = make(elements, dtype), make(elements, dtype)
        self._used = 0

    def keep(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy a batch's hidden states into this storage, one copy per model, and return the copies."""
        start, self._used = self._used, self._used + hidden.numel()
        base, pruned = (flat[start : self._used].view(hidden.shape) for flat in (self._base, self.pruned))
        return base.copy_(hidden), pruned.copy_(hidden)


def _empty(elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(elements, dtype=dtype)


def capture(
    view: ModelView, inputs: Batch, mask: torch.Tensor | None, storage: StreamStorage, *, validation: bool = False
) -> Stream:
    """Record the first hidden states and the other arguments of every layer. No layer computes anything meanwhile."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[torch.Tensor] = []

    def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        first.append(hidden)
        calls.append((args, kwargs))
        return hidden

    with patch_forwards(view.layers, [record] * len(view.layers)):
        view.model.base_model(**inputs, use_cache=False)
    hidden = first[0]
    return Stream(*storage.keep(hidden), calls, mask, hidden.device, validation)


@contextmanager
def record_activations(module: nn.Module, *, inputs: bool) -> Iterator[list[torch.Tensor]]:
    """Record the inputs (or the outputs) of a module's next call."""
    seen: list[torch.Tensor] = []
    if inputs:
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def choose_validation(count: int, every: int) -> Sequence[bool]:
    """Return which of `count` batches only choose ridges: the last ones, one in `every`."""
    return [index >= count - count // every for index in range(count)]
