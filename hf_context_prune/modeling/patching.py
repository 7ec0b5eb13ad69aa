"""Blocks whose forward is another for a while: recorded, known, or fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.utils.precision import fast_block

from .architectures import blocks, spec_of

Forward = Callable[..., Any]


@contextmanager
def forwards(layers: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """Let blocks run these functions instead of their own; undone at the end."""
    own = [vars(block).get("forward") for block in layers]  # accelerate's hooks set one on the instance
    try:
        for block, forward in zip(layers, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block, forward in zip(layers, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def fast(forward: Forward) -> Forward:
    """A block's forward, in [`fast_block`][]."""

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever a block takes and gives
        with fast_block(hidden):
            return forward(hidden, *args, **kwargs)

    return run


def fast_blocks(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let a model's blocks run in [`fast_block`][]; embedding, final norm and head stay as precise as they are."""
    layers = blocks(model, spec_of(model.config))  # a projection may be an adapter's
    return forwards(layers, [fast(block.forward) for block in layers])
