"""Layers whose forward is replaced for a while: recorded, known in advance, or in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.utils.precision import bfloat16_autocast, full_precision

from .architectures import layers_of, spec_of
from .layer_device import move
from .specs import ArchSpec

Forward = Callable[..., Any]
_RECURRENCES = ("linear_attn", "mamba")
"""Modules of a layer that pass a state from token to token."""


@contextmanager
def patch_forwards(layers: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """Let layers run these functions instead of their own forwards, which are restored at the end."""
    own = [vars(layer).get("forward") for layer in layers]  # accelerate's hooks set one on the instance
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


LayerCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a layer beside its hidden states."""


def move_call(call: LayerCall, device: torch.device) -> LayerCall:
    """Return the arguments of a layer with their tensors on a device; see [`move`][]."""
    args, kwargs = call
    return move(args, device), {name: move(value, device) for name, value in kwargs.items()}


def record_calls(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[LayerCall]]:
    """Return the first hidden states of a batch, [batch, length, hidden], and the other arguments of every layer.

    No layer computes anything meanwhile.
    """
    spec = spec_of(model.config)
    layers, calls, first = layers_of(model, spec), [], []

    def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any layer's arguments
        first.append(hidden)
        calls.append((args, kwargs))
        return _as_output(hidden, spec)

    with patch_forwards(layers, [record] * len(layers)):
        model.base_model(**inputs, use_cache=False)
    return first[0], calls


def known_states(model: PreTrainedModel, hidden: torch.Tensor) -> AbstractContextManager[None]:
    """Let a model compute only what follows its last layer, on these hidden states behind it."""
    spec = spec_of(model.config)
    layers, output = layers_of(model, spec), _as_output(hidden, spec)
    return patch_forwards(layers, [lambda *args, **kwargs: output] * len(layers))


def _as_output(hidden: torch.Tensor, spec: ArchSpec) -> Any:  # noqa: ANN401 - as the layers of the family return them
    return (hidden, *[None] * (spec.layer_outputs - 1)) if spec.layer_outputs else hidden


@torch.no_grad()
def finish_forward(model: PreTrainedModel, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return the inputs of the LM head from known hidden states behind the last layer; no layer computes anything.

    Args:
        model: The model.
        input_ids: [batch, length], int64; only their shape matters.
        hidden: Hidden states behind the last layer, before the final norm, [batch, length, hidden].

    Returns:
        [batch, length, hidden of the head].
    """
    with known_states(model, hidden):
        states: torch.Tensor = model.base_model(input_ids=input_ids, use_cache=False)[0]
    return states


def in_bfloat16(layer: nn.Module, forward: Forward) -> Forward:
    """Return a function that runs a layer in [`bfloat16_autocast`][], except recurrences, which add up rounding.

    Args:
        layer: The layer.
        forward: What runs it: the layer itself, or its own forward where that is to be replaced.
    """
    recurrences = [module for name in _RECURRENCES if (module := getattr(layer, name, None)) is not None]
    exact = [_in_full_precision(module.forward) for module in recurrences]

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any layer's arguments and result
        with patch_forwards(recurrences, exact), bfloat16_autocast(hidden):
            return forward(hidden, *args, **kwargs)

    return run


def _in_full_precision(forward: Forward) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any module's arguments and result
        with full_precision():
            return forward(*args, **kwargs)

    return run


def bfloat16_layers(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Run a model's layers in [`bfloat16_autocast`][]; embedding, final norm and head keep their precision."""
    layers = layers_of(model, spec_of(model.config))  # without check_supported: a projection may be an adapter's
    return patch_forwards(layers, [in_bfloat16(layer, layer.forward) for layer in layers])
