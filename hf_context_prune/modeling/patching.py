"""Blocks whose forward is another for a while: recorded, known, or fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.utils.precision import bfloat16_autocast

from .architectures import layers_of, spec_of

Forward = Callable[..., Any]


@contextmanager
def patch_forwards(layers: Sequence[nn.Module], patch_forwards: Sequence[Forward]) -> Iterator[None]:
    """Let blocks run these functions instead of their own; undone at the end."""
    own = [vars(block).get("forward") for block in layers]  # accelerate's hooks set one on the instance
    try:
        for block, forward in zip(layers, patch_forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block, forward in zip(layers, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def in_bfloat16(forward: Forward) -> Forward:
    """A block's forward, in [`bfloat16_autocast`][]."""

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever a block takes and gives
        with bfloat16_autocast(hidden):
            return forward(hidden, *args, **kwargs)

    return run


def bfloat16_layers(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Run a model's layers in [`bfloat16_autocast`][]; embedding, final norm and head stay as precise as they are."""
    layers = layers_of(model, spec_of(model.config))  # a projection may be an adapter's
    return patch_forwards(layers, [in_bfloat16(block.forward) for block in layers])
