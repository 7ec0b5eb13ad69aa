"""Hidden states on their way through the blocks, for the sequential walk.

Blocks are called, never re-implemented: their real arguments (masks, position embeddings) are captured from the model's
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
from transformers import PreTrainedModel

from hf_context_prune.modeling.architectures import layers_of
from hf_context_prune.modeling.patching import in_bfloat16, patch_forwards
from hf_context_prune.modeling.specs import ArchSpec
from hf_context_prune.utils.memmap import memmap_zeros

Batch = dict[str, torch.Tensor]

SPILL_SHARE = 0.5
"""Share of the free memory that hidden states may take; past it they lie in a memory-mapped file."""


@dataclass
class Stream:
    """One batch between two blocks, in the dense and in the pruned model.

    Attributes:
        dense: Hidden states of the dense model, [batch, length, hidden]; maybe memory-mapped.
        pruned: Those of the pruned one.
        calls: What each block is called with beside them.
        mask: Unpadded positions, [batch * length]; None without padding.
        device: Where blocks run.
        held_out: Whether it only chooses ridges, and is never fitted.
    """

    dense: torch.Tensor
    pruned: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    mask: torch.Tensor | None
    device: torch.device
    held_out: bool = False

    def call(self, layer: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a block makes of hidden states, with the arguments of this batch."""
        args, kwargs = self.calls[layer]
        output = in_bfloat16(block)(hidden.to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """[tokens, features] of the unpadded positions, float32, where blocks run."""
        flat = tensor.to(self.device).reshape(-1, tensor.shape[-1]).float()
        return flat if self.mask is None else flat[self.mask]


class StreamStorage:
    """Room for both hidden states of every batch: memory, or past a limit a memory-mapped file that dies with it.

    Args:
        elements: Values of all batches together, one state.
        dtype: Of the hidden states.
        limit: Bytes that may stay in memory; None: `SPILL_SHARE` of what is free.
    """

    def __init__(self, elements: int, dtype: torch.dtype, *, limit: int | None = None) -> None:
        if limit is None:
            limit = int(SPILL_SHARE * psutil.virtual_memory().available)
        self.spilled = 2 * elements * dtype.itemsize > limit
        self._used = 0
        self._flat = memmap_zeros(2 * elements, dtype) if self.spilled else torch.empty(2 * elements, dtype=dtype)

    def keep(self, hidden: torch.Tensor) -> torch.Tensor:
        """A copy of hidden states, in this storage."""
        room = self._flat[self._used : self._used + hidden.numel()].view(hidden.shape)
        self._used += hidden.numel()
        return room.copy_(hidden)


def capture(
    model: PreTrainedModel,
    spec: ArchSpec,
    inputs: Batch,
    mask: torch.Tensor | None,
    storage: StreamStorage,
    *,
    held_out: bool = False,
) -> Stream:
    """Record the first hidden states and every block's other arguments; the blocks themselves do nothing meanwhile."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[torch.Tensor] = []
    layers = layers_of(model, spec)

    def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        first.append(hidden)
        calls.append((args, kwargs))
        return hidden

    with patch_forwards(layers, [record] * len(layers)):
        model.base_model(**inputs, use_cache=False)
    hidden = first[0]
    return Stream(storage.keep(hidden), storage.keep(hidden), calls, mask, hidden.device, held_out)


@contextmanager
def record_activations(module: nn.Module, *, inputs: bool) -> Iterator[list[torch.Tensor]]:
    """Keep what a module reads (or gives) in the next call."""
    seen: list[torch.Tensor] = []
    if inputs:
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def choose_held_out(count: int, share: int) -> Sequence[bool]:
    """Which of `count` batches only choose ridges: the last of every `share`, none if there are fewer than `share`."""
    return [count >= share and index >= count - count // share for index in range(count)]
