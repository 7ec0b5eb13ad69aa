"""Gradients that tell what an error of a layer costs at the model's output: a sketch of the Fisher information.

To second order, an error d of a sub-layer's output (one row d_t per token) changes the next-token distributions by

    KL(base || changed) = 1/2 dz^T (diag p - p p^T) dz = 1/2 E[(v . dz)^2] = 1/2 E[(sum_t g_t . d_t)^2]

with dz the change of the logits, p the base model's probabilities, v a random vector of covariance diag p - p p^T, and
g_t the gradient of v . z with respect to row t of the sub-layer's output. So one backward pass prices every error of
every layer. v = s - p sum(s), s_i = +-sqrt(p_i) with random signs, has this covariance. So have the gradients of
sampled labels, which are huge for the rare ones.

The passes go layer by layer over all the text: each layer's weights are read once, and its graph alone is in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import NumericsError
from hf_context_prune.modeling.architectures import Target
from hf_context_prune.modeling.layer_device import in_hand, layer_device
from hf_context_prune.modeling.patching import known_states
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.sequential.hidden_states import Stream, StreamStorage, capture_streams, count_positions
from hf_context_prune.pruning.sequential.sub_layer import SubLayer
from hf_context_prune.utils.linalg import all_finite

_HEAD_TOKENS = 512
"""Tokens whose logits exist at once, one sample at least."""
_ROWS = 32
"""Tokens whose probabilities are computed at once: few enough for the processor's cache."""


@dataclass(frozen=True)
class SubLayerSketch:
    """What one sub-layer did on a batch, and what its errors cost.

    Attributes:
        inputs: What its output projection read, [tokens, features], float32.
        outputs: What the projection returned, [tokens, channels], float32.
        gradients: g, with respect to what reaches the residual stream: the projection's output, or that of the norm
            behind it. [tokens, channels], float32.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    gradients: torch.Tensor


class FisherSketch:
    """The gradients of all sub-layers on a text, and its hidden states on their way through the layers.

    Memory: one hidden state and one gradient per layer and token, memory-mapped where they don't fit, and the graph of
    one layer on one batch.

    Args:
        view: The base model, in evaluation mode; unchanged.
        keys: The sub-layers, by (layer, target).
        samples: [samples, length], int64.

    Raises:
        NumericsError: The model's logits, or the gradients, are not finite.
    """

    def __init__(self, view: ModelView, keys: Collection[tuple[int, Target]], samples: torch.Tensor) -> None:
        self.view, self.keys = view, sorted(keys)
        self._generator = torch.Generator().manual_seed(0)
        batches = list(enumerate(batches_of(samples)))
        device = layer_device(view.model)
        self._storage = StreamStorage(count_positions(batches), device=device)
        layers, name = len(view.layers), "hf_context_prune.sensitivity"
        with (
            tqdm(total=2 * layers, desc="Reading the probe", unit="layer", name=name) as bar,
            _frozen_weights(view.model),
        ):
            streams = capture_streams(view, batches, self._storage, base_only=True)
            for index in range(layers):
                with in_hand(view.layers[index], device):
                    for stream in streams:
                        self._storage.keep(_states(index), stream.start, stream.base)
                        stream.base.copy_(stream.call(index, view.layers[index], stream.base))
                bar.update()
            for stream, (_, batch) in zip(streams, batches, strict=True):
                stream.base.copy_(self._head_gradient(batch["input_ids"].to(view.model.device), stream.base))
            for index in reversed(range(layers)):
                with in_hand(view.layers[index], device):
                    for stream in streams:
                        self._move_back(index, stream)
                self._storage.drop(_states(index))
                bar.update()
        self._streams = capture_streams(view, batches, self._storage, base_only=True)

    def layer(self, index: int) -> Iterator[tuple[Target, SubLayerSketch]]:
        """Run one layer on all text, and yield the sketches of its sub-layers; call this for all layers, in order."""
        layer = self.view.layers[index]
        own = {target: SubLayer(layer, self.view.spec, target) for number, target in self.keys if number == index}
        for stream in self._streams:
            seen: dict[Target, tuple[torch.Tensor, torch.Tensor]] = {}
            with _record({target: part.projection for target, part in own.items()}, seen):
                stream.base.copy_(stream.call(index, layer, stream.base))
            for target, (inputs, outputs) in seen.items():
                gradients = self._gradients(index, target, stream)
                parts = inputs.flatten(0, -2).float(), outputs.flatten(0, -2).float(), gradients.float()
                yield target, SubLayerSketch(*parts)
        for target in own:
            self._storage.drop(f"gradients {target} {index}")

    def _gradients(self, index: int, target: str, stream: Stream) -> torch.Tensor:
        room = self._storage.room(f"gradients {target} {index}")
        return room[stream.start : stream.start + stream.base[..., 0].numel()].to(stream.device)

    def _head_gradient(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the gradient of v . z with respect to the hidden states behind the last layer."""
        found, size = [], max(1, _HEAD_TOKENS // ids.shape[1])
        for samples, states in zip(ids.split(size), hidden.to(ids.device).split(size), strict=True):
            states = states.clone().requires_grad_()
            with torch.enable_grad(), known_states(self.view.model, states):
                logits = self.view.model(input_ids=samples, use_cache=False).logits
            _replace_by_noise(logits.detach(), self._generator)
            found += torch.autograd.grad(logits, [states], logits.detach())
        return torch.cat(found)

    def _move_back(self, index: int, stream: Stream) -> None:
        """Turn the gradient behind a layer into the gradients of its sub-layers and the one before it."""
        layer, room = self.view.layers[index], self._storage.room(_states(index))
        count = stream.base[..., 0].numel()
        hidden = room[stream.start : stream.start + count].view(stream.base.shape).to(stream.device)
        hidden = hidden.clone().requires_grad_()
        targets = [target for number, target in self.keys if number == index]
        branches = {target: SubLayer(layer, self.view.spec, target).branch for target in targets}
        seen: dict[Target, tuple[torch.Tensor, torch.Tensor]] = {}
        with torch.enable_grad(), _record(branches, seen, detach=False):
            output = stream.call(index, layer, hidden)
        ends = [hidden, *(seen[target][1] for target in targets)]
        before, *gradients = torch.autograd.grad(output, ends, stream.base.to(output))
        for target, gradient in zip(targets, gradients, strict=True):
            _check_finite(gradient, f"gradient at layer {index} ({target})")
            half = gradient.to(torch.bfloat16)  # its rounding averages out
            self._storage.keep(f"gradients {target} {index}", stream.start, half)
        stream.base.copy_(before)


def _states(index: int) -> str:
    return f"states {index}"


@contextmanager
def _record(
    modules: dict[Target, nn.Module], seen: dict[Target, tuple[torch.Tensor, torch.Tensor]], *, detach: bool = True
) -> Iterator[None]:
    """Record (first input, output) of modules."""

    def keep(target: Target, inputs: torch.Tensor, output: torch.Tensor) -> None:
        seen[target] = (inputs.detach(), output.detach()) if detach else (inputs, output)

    handles = [
        module.register_forward_hook(lambda _, args, output, target=target: keep(target, args[0], output))
        for target, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replace_by_noise(logits: torch.Tensor, generator: torch.Generator) -> None:
    """Replace logits, [samples, length, vocabulary], by v in place: they are larger than many a model.

    If a model's backward pass needed its logits, autograd would refuse to run it.
    """
    _check_finite(logits, "output of the base model")
    for rows in chain.from_iterable(sample.split(_ROWS) for sample in logits):
        p = rows.float().softmax(dim=-1)
        signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        signed = p.sqrt() * signs.to(p.device)
        rows.copy_(signed - p * signed.sum(dim=-1, keepdim=True))


def _check_finite(values: torch.Tensor, what: str) -> None:
    if not all_finite(values):
        raise NumericsError(
            f"The {what} is not finite, so widths can't be compared: the weights before it overflow, or are far from "
            f"those of a trained model. Load it in float32 (--dtype float32). If that does not help, the checkpoint is "
            f"damaged: download or save the model again."
        )


@contextmanager
def _frozen_weights(model: PreTrainedModel) -> Iterator[None]:
    """Let no weight have a gradient, so that a backward pass keeps no input of theirs."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
