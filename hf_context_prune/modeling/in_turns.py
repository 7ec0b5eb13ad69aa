"""Forward passes over many batches that read each weight once, for a model that does not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.utils.memory import fits_in_memory, free_memory, mapped_bytes

from .architectures import layers_of, spec_of
from .layer_device import in_hand, layer_device
from .patching import LayerCall, known_states, move_call, record_calls

Inputs = dict[str, torch.Tensor]
"""Arguments of a forward pass: ``input_ids`` and, where there is padding, ``attention_mask``."""


def forward_in_turns(model: PreTrainedModel, batches: Iterable[Inputs], *, head: bool = True) -> Iterator[Any]:
    """Yield the outputs of a model for each batch, without a cache.

    A model that fits into memory runs batch by batch. Of any other, and of one whose layers go to an accelerator one by
    one, each layer runs on many batches before the next one
    does: its file is read once for all of them, whose hidden states are in memory meanwhile.

    Args:
        model: The model, on one device.
        batches: Arguments of its forward pass, each.
        head: Run the whole model; False: the decoder without the LM head.
    """
    run = model if head else model.base_model
    if fits_with_weights(model) and layer_device(model) == model.device:
        for batch in batches:
            yield run(**batch, use_cache=False)
        return
    group: list[Inputs] = []
    size = 0
    for batch in batches:
        needs = batch["input_ids"].numel() * int(model.config.get_text_config(decoder=True).hidden_size)
        if group and not fits_in_memory(model.dtype.itemsize * (size + needs)):
            yield from _run_group(model, run, group)
            group, size = [], 0
        group.append(batch)
        size += needs
    yield from _run_group(model, run, group)


def fits_with_weights(model: PreTrainedModel) -> bool:
    """Return whether the weights that lie in files fit into free memory; others are in memory or on a device."""
    return mapped_bytes(model.parameters()) <= free_memory()


def _run_group(model: PreTrainedModel, run: Any, group: Sequence[Inputs]) -> Iterator[Any]:  # noqa: ANN401 - a module
    layers = layers_of(model, spec_of(model.config))
    states: list[torch.Tensor] = []
    calls: list[list[LayerCall]] = []
    for batch in group:
        hidden, others = record_calls(model, batch)
        states.append(hidden)
        calls.append(others)
    device, name = layer_device(model), "hf_context_prune.layers"
    for index, layer in enumerate(tqdm(layers, desc="Running layers", unit="layer", name=name, leave=False)):
        with in_hand(layer, device):
            for number, hidden in enumerate(states):
                args, kwargs = move_call(calls[number][index], device)
                output = layer(hidden.to(device), *args, **kwargs)
                states[number] = (output[0] if isinstance(output, tuple) else output).to(hidden.device)
    for number, batch in enumerate(group):
        with known_states(model, states[number]):
            output = run(**batch, use_cache=False)
        yield output
