"""Hidden states on their way through the decoder layers, for sequential reconstruction.

Layers are called, never re-implemented: their real arguments (masks, position embeddings) are captured from the model's
own forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_context_prune.modeling.layer_device import layer_device, move
from hf_context_prune.modeling.patching import LayerCall, in_bfloat16, move_call, record_calls
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.samples import Batch, prepare_batch
from hf_context_prune.utils.memmap import memmap_zeros
from hf_context_prune.utils.memory import SPILL_SHARE, free_memory

_SHARED = "shared_kv_states"
"""Argument of layers that read keys and values of earlier layers."""


@dataclass
class Stream:
    """The hidden states of one batch between two layers, in the base model and in the pruned one.

    Attributes:
        base: Hidden states of the base model, [batch, length, hidden]; possibly memory-mapped.
        pruned: Hidden states of the pruned model, in the same shape; those of the base where nothing is pruned.
        start: Positions of the batches before this one, by which storage knows the batch.
        calls: The other arguments that each layer is called with.
        mask: Unpadded positions, [batch * length]; None without padding.
        device: Where layers run.
        validation: Whether the batch only chooses ridges, and is never fitted.
    """

    base: torch.Tensor
    pruned: torch.Tensor
    start: int
    calls: list[LayerCall]
    mask: torch.Tensor | None
    device: torch.device
    validation: bool = False
    _shared: Any = None

    def call(self, index: int, layer: nn.Module, hidden: torch.Tensor, *, pruned: bool = False) -> torch.Tensor:
        """Run a layer on hidden states, with the arguments of this batch, and return its output.

        Args:
            index: The layer's number.
            layer: The layer, or a copy of it.
            hidden: The hidden states before it.
            pruned: Whether they are those of the pruned model. Where later layers read keys and values of earlier ones
                (Gemma 4), both models have their own.
        """
        args, kwargs = move_call(self.calls[index], self.device)
        if pruned and kwargs.get(_SHARED) is not None:
            self._shared = copy.copy(kwargs[_SHARED]) if self._shared is None else self._shared
            kwargs = {**kwargs, _SHARED: self._shared}
        output = in_bfloat16(layer, layer)(hidden.to(self.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the unpadded positions, [tokens, features], float32, where layers run."""
        flat = tensor.to(self.device).reshape(-1, tensor.shape[-1]).float()
        return flat if self.mask is None else flat[self.mask]


class StreamStorage:
    """Room for what is kept of every position: memory, or above a limit memory-mapped temporary files.

    Args:
        positions: Positions of all batches together, padding included.
        limit: Bytes that may stay in memory; None: `SPILL_SHARE` of the free memory.
        device: Where layers run; memory from which a CUDA device reads is pinned.
    """

    def __init__(self, positions: int, *, limit: int | None = None, device: torch.device | None = None) -> None:
        self.positions, self._pinned = positions, device is not None and device.type == "cuda"
        self._left = int(SPILL_SHARE * free_memory()) if limit is None else limit
        self._rooms: dict[str, torch.Tensor] = {}
        self._in_memory: set[str] = set()

    def keep(self, name: str, start: int, values: torch.Tensor, *, width: int | None = None) -> torch.Tensor:
        """Copy a batch's values into a room, and return the copy.

        Args:
            name: The room's name; it is made at first use.
            start: Positions of the batches before this one.
            values: [..., features]; all values of a room have one dtype.
            width: Most features that the room will hold; None: those of `values`. Counts at first use.
        """
        if name not in self._rooms:
            self._rooms[name] = self._make(name, width or values.shape[-1], values.dtype)
        room = self._rooms[name]
        begin = start * room.shape[1]
        return room.view(-1)[begin : begin + values.numel()].view(values.shape).copy_(values)

    def drop(self, name: str) -> None:
        """Free a room."""
        room = self._rooms.pop(name)
        self._left += room.nbytes if name in self._in_memory else 0
        self._in_memory.discard(name)

    def room(self, name: str) -> torch.Tensor:
        """Return all values that a room holds, [positions, features]."""
        return self._rooms[name]

    def _make(self, name: str, width: int, dtype: torch.dtype) -> torch.Tensor:
        elements = self.positions * width
        size = elements * dtype.itemsize
        if size > self._left:
            return memmap_zeros(elements, dtype).view(-1, width)
        self._left -= size
        self._in_memory.add(name)
        return torch.empty(elements, dtype=dtype, pin_memory=self._pinned).view(-1, width)


def capture(
    view: ModelView,
    inputs: Batch,
    mask: torch.Tensor | None,
    storage: StreamStorage,
    start: int,
    *,
    validation: bool = False,
    base_only: bool = False,
) -> Stream:
    """Record the first hidden states and the other arguments of every layer. No layer computes anything meanwhile.

    Args:
        view: The model.
        inputs: A batch.
        mask: See [`Stream`][].
        storage: Where hidden states lie, in rooms "base" and "pruned".
        start: See [`Stream`][].
        validation: See [`Stream`][].
        base_only: Keep one copy of the hidden states, for a model that is only read.
    """
    hidden, calls = record_calls(view.model, inputs)
    base = storage.keep("base", start, hidden)
    pruned = base if base_only else storage.keep("pruned", start, hidden)
    device = layer_device(view.model)
    return Stream(base, pruned, start, calls, move(mask, device), device, validation)


def capture_streams(
    view: ModelView,
    batches: Sequence[tuple[int, Batch]],
    storage: StreamStorage,
    *,
    validation: Sequence[bool] | None = None,
    base_only: bool = False,
) -> list[Stream]:
    """Return the streams of batches, (number, batch) each, before the first layer; one of nothing but padding has none.

    Args:
        view: The model.
        batches: As for `calibrate`.
        storage: Room for all their positions.
        validation: Whether the batch of a number only chooses ridges; None: none does.
        base_only: See [`capture`][].
    """
    model, rows = view.model, view.model.get_input_embeddings().weight.shape[0]
    streams, start = [], 0
    for index, batch in batches:
        inputs, mask = prepare_batch(batch, index, rows)
        if mask is not None and not bool(mask.any()):
            continue
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        is_validation = validation is not None and validation[index]
        streams.append(capture(view, inputs, mask, storage, start, validation=is_validation, base_only=base_only))
        start += batch["input_ids"].numel()
    return streams


def count_positions(batches: Sequence[tuple[int, Batch]]) -> int:
    """Return the positions of batches, padding included."""
    return sum(batch["input_ids"].numel() for _, batch in batches)


@contextmanager
def record_output(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Record the output of a module's next call."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def record_input(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Record the first argument of a module's next call."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def choose_validation(count: int, every: int) -> Sequence[bool]:
    """Return which of `count` batches only choose ridges: the last ones, one in `every`."""
    return [index >= count - count // every for index in range(count)]
