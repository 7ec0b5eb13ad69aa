"""Where the decoder layers of a model run: on an accelerator that has no room for all of them, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.utils.memory import free_memory, release_weights

ROOM_FOR_WEIGHTS = 0.6
"""Share of an accelerator's free memory that the weights of a model may take; the rest is for what they compute."""
_NAME = "_context_prune_layer_device"


def layer_device(model: PreTrainedModel) -> torch.device:
    """Return where the layers of a model run: where it lies, or the accelerator that takes them one at a time."""
    device: torch.device = getattr(model, _NAME, model.device)
    return device


def run_layers_on(model: PreTrainedModel, device: torch.device) -> None:
    """Let the layers of a model in main memory run on another device, each moved there while it runs."""
    setattr(model, _NAME, device)


def run_layers_alike(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Let the layers of a model run where those of the model run from which it was made."""
    if hasattr(source, _NAME):
        run_layers_on(target, layer_device(source))


def place(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device, or let its layers run there one at a time where it has no room for all of them.

    Args:
        model: The model, in main memory.
        device: The device.

    Raises:
        RuntimeError, AssertionError: There is no such device, as torch says.
    """
    if device.type == "cuda" and model.get_memory_footprint() > ROOM_FOR_WEIGHTS * free_memory(device):
        run_layers_on(model, device)
        return model
    moved: PreTrainedModel = model.to(device)
    return moved


@contextmanager
def in_hand(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold the weights of a layer on a device while the block runs, then give their pages in main memory back.

    Its tensors are the same objects as before, meanwhile and afterwards. No weight may be changed meanwhile.

    Args:
        layer: The layer.
        device: The device.
    """
    home = [(tensor, tensor.data) for tensor in (*layer.parameters(), *layer.buffers())]
    try:
        for tensor, data in home:
            tensor.data = move(data, device)
        yield
    finally:
        for tensor, data in home:
            tensor.data = data
        release_weights(layer)


def move(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - any argument of a layer
    """Return a tensor on a device, or a tuple or list with its tensors there; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(move(one, device) for one in value)
    return value
