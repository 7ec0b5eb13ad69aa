"""Passes over a batch of text, and the gradients of the language-model loss that the `taylor` criterion reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import DataError
from hf_context_prune.modeling.architectures import Target, absolute_weight, input_magnitude
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.utils.distributed import all_reduce_, sum_counts

from .samples import Batch


def forward_step(model: PreTrainedModel, inputs: Batch) -> None:
    """Run the model on a batch without gradients, for its hooks alone."""
    # The bare decoder: the head's logits are most of the memory and a fifth of the time, and nothing reads them.
    with torch.inference_mode():
        model.base_model(**inputs, use_cache=False)


def backward_step(model: PreTrainedModel, inputs: Batch) -> None:
    """Run the model on a batch and add the gradients of its loss, summed over tokens, to the weights."""
    labels = inputs["input_ids"]
    if "attention_mask" in inputs:
        text = inputs["attention_mask"].bool()
        # The first token of a text is not predicted: if anything stands before it, it is padding.
        follows = text & nn.functional.pad(text[:, :-1], (1, 0))
        labels = labels.masked_fill(~follows, -100)
    predicted = int((labels[:, 1:] != -100).sum())
    if predicted:  # the loss is a mean: times its tokens, so that every token weighs the same in the sum over batches
        (model(**inputs, labels=labels, use_cache=False).loss * predicted).backward()
    else:  # texts of one token: nothing is predicted, and the mean over nothing would be NaN
        forward_step(model, inputs)


class GradientSums:
    """Sums of the layers' gradients over batches, in float32: half precision would lose small summands."""

    def __init__(self, view: ModelView) -> None:
        self.view = view
        self.parameters = [parameter for layer in view.layers for parameter in layer.parameters()]
        self.sums: dict[int, torch.Tensor] = {}

    def take(self) -> None:
        """Add a batch's gradients; those of float32 weights are summed in place by the backward pass."""
        for parameter in self.parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.dtype in (torch.float32, torch.float64):
                self.sums[id(parameter)] = gradient
            else:
                known = self.sums.get(id(parameter))
                self.sums[id(parameter)] = gradient.float() if known is None else known.add_(gradient)
                parameter.grad = None

    def reduce(self) -> None:
        """Sum over all processes; a process that had no batch has no gradient yet.

        Raises:
            DataError: No process has a gradient.
        """
        counts = sum_counts(*(id(parameter) in self.sums for parameter in self.parameters))
        present = [parameter for parameter, count in zip(self.parameters, counts, strict=True) if count]
        for parameter in present:
            if id(parameter) not in self.sums:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self.sums[id(parameter)] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        all_reduce_(self.sums[id(parameter)] for parameter in present)
        if not self.sums:
            raise DataError(
                "There are no gradients: no text has two tokens, so nothing was predicted. Give longer texts."
            )

    def taylor(self, layer: int, target: Target) -> torch.Tensor:
        """Return the sum of |w * dL/dw| over the weights of each unit, [units], float64."""
        view, groups = self.view, self.view.widths[layer].kv_groups
        inputs = input_magnitude(view.layers[layer], view.spec, view.geometry, target, groups, self.sums)
        output = absolute_weight(view.output_projection(layer, target), self.sums).sum(dim=0)
        return inputs + output.reshape(len(inputs), -1).sum(dim=1)


@contextmanager
def layer_gradients(view: ModelView) -> Iterator[None]:
    """Let only the weights of the layers have gradients, and drop those gradients at the end."""
    before: list[tuple[nn.Parameter, bool, torch.Tensor | None]] = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in view.model.parameters()
    ]
    inside = {id(parameter) for layer in view.layers for parameter in layer.parameters()}
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in inside)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad
