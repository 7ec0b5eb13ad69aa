"""Gradients that tell what an error of a layer costs at the model's output: a sketch of the Fisher information.

To second order, an error d of a sub-layer's output (one row d_t per token) changes the next-token distributions by

    KL(base || changed) = 1/2 dz^T (diag p - p p^T) dz = 1/2 E[(v . dz)^2] = 1/2 E[(sum_t g_t . d_t)^2]

with dz the change of the logits, p the base model's probabilities, v a random vector of covariance diag p - p p^T, and
g_t the gradient of v . z with respect to row t of the sub-layer's output. So one backward pass prices every error of
every layer. v = s - p sum(s), s_i = +-sqrt(p_i) with random signs, has this covariance. So have the gradients of
sampled labels, which are huge for the rare ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import NumericsError
from hf_context_prune.modeling.patching import bfloat16_layers
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.statistics import Key
from hf_context_prune.pruning.sequential.sub_layer import SubLayer
from hf_context_prune.utils.linalg import all_finite

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


def sketch_batch(
    view: ModelView, keys: Sequence[Key], ids: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[Key, SubLayerSketch]]:
    """Run the model forward and backward once, and yield the sketch of each sub-layer.

    Memory: what a backward pass keeps of the batch, and its logits.

    Args:
        view: The base model, in evaluation mode; unchanged.
        keys: The sub-layers, by (layer, target).
        ids: [samples, length], int64.
        generator: Of the random signs, on the CPU; one for all batches.

    Raises:
        NumericsError: The model's logits, or the gradients, are not finite.
    """
    model, record = view.model, _Recorder()
    with _frozen_weights(model), torch.enable_grad(), record.hooked(view, keys):
        with bfloat16_layers(model):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        _replace_by_noise(logits.detach(), generator)
        gradients = torch.autograd.grad(logits, [record.branches[key] for key in keys], logits.detach())
    del logits
    record.branches.clear()
    for key, gradient in zip(keys, gradients, strict=True):
        _check_finite(gradient, f"gradient at layer {key[0]} ({key[1]})")
        parts = (record.inputs.pop(key), record.outputs.pop(key), gradient)
        yield key, SubLayerSketch(*(part.flatten(0, -2).float() for part in parts))


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
            f"The {what} is not finite, so widths can't be compared. Check the model's weights, or load it in float32."
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


class _Recorder:
    """Inputs and outputs of output projections, and the outputs of the branches that these end in."""

    def __init__(self) -> None:
        self.inputs: dict[Key, torch.Tensor] = {}
        self.outputs: dict[Key, torch.Tensor] = {}
        self.branches: dict[Key, torch.Tensor] = {}

    @contextmanager
    def hooked(self, view: ModelView, keys: Sequence[Key]) -> Iterator[None]:
        """Record a forward pass. The backward pass ends at the first of the branches."""
        handles = []
        try:
            for layer, target in keys:
                own = SubLayer(view.layers[layer], view.spec, target)  # type: ignore[arg-type]
                handles.append(own.projection.register_forward_hook(partial(self._keep, (layer, target))))
                handles.append(own.branch.register_forward_hook(partial(self._differentiate, (layer, target))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, key: Key, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.inputs[key], self.outputs[key] = args[0].detach(), output.detach()

    def _differentiate(self, key: Key, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        self.branches[key] = output if output.requires_grad else output.detach().requires_grad_()
        return self.branches[key]
