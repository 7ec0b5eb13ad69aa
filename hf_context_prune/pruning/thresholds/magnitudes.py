"""Model + samples -> mean |x| around every linear layer: the statistics of the paper's thresholds.

The paper (Mini-GPTs, arXiv 2312.12682) reads every `nn.Linear`, including the head, and the activation functions.
[`calibrate`][], which serves all other criteria, reads the output projections alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import ConfigError, DataError, NumericsError
from hf_context_prune.modeling.architectures import activation_of
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.specs import ArchSpec
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.calibration.samples import Batch, batches_of, prepare_batch
from hf_context_prune.utils.distributed import all_reduce_, fail_together, shard, sum_counts
from hf_context_prune.utils.precision import overflow_remedy

_HEAD_TOKENS = 1024
"""Tokens per batch: the wide output of the head is measured too."""


@dataclass(frozen=True)
class LinearMagnitudes:
    """Means over unpadded tokens, of one linear layer y = W x + b.

    Attributes:
        inputs: Mean |x|, [in_features], float64.
        outputs: Mean |y|, [out_features], float64.
        unbiased: Mean |y - b|, [out_features], float64; None without a bias.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    unbiased: torch.Tensor | None

    @property
    def smallest_outputs(self) -> torch.Tensor:
        """The smaller of mean |y| and mean |y - b|, [out_features]: the values that the paper's code compares."""
        return self.outputs if self.unbiased is None else torch.minimum(self.outputs, self.unbiased)


@dataclass(frozen=True)
class Magnitudes:
    """The means that thresholds are compared with.

    Attributes:
        linears: Means around each linear layer, by the name of the module.
        activations: Mean |a| of the MLP's activation function, [neurons], float64, one entry per layer.
        num_samples: Samples used.
        num_tokens: Unpadded tokens used.
    """

    linears: dict[str, LinearMagnitudes]
    activations: tuple[torch.Tensor, ...]
    num_samples: int
    num_tokens: int

    def for_vocabulary(self, model: PreTrainedModel, kept: Sequence[int]) -> Magnitudes:
        """Return the means for a model with only some rows of the head.

        Args:
            model: The base model.
            kept: Indices of the kept rows, in their new order.
        """
        rows, head = torch.tensor(kept), model.get_output_embeddings()
        name = next(name for name, module in linear_layers(model) if module is head)
        old = self.linears[name]
        unbiased = None if old.unbiased is None else old.unbiased[rows]
        return replace(self, linears={**self.linears, name: LinearMagnitudes(old.inputs, old.outputs[rows], unbiased)})


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Return every linear layer with its name, including the head."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def check_linear(spec: ArchSpec) -> None:
    """Refuse an architecture whose projections are of another class than `nn.Linear` (GPT-2).

    Raises:
        ConfigError: The projections are of another class, or there are experts.
    """
    if spec.experts is not None:
        raise ConfigError(
            f"The paper's thresholds are rules for linear layers, and a {spec.model_type} model has experts in place "
            f"of MLPs. Give a size instead: pruning_ratio, or num_experts."
        )
    if spec.transposed:
        raise ConfigError(
            f"The paper's thresholds are rules for nn.Linear, and the projections of a {spec.model_type} model are "
            f"Conv1D. Give a size instead: pruning_ratio."
        )


class _Sums:
    """Sums of |x| over unpadded tokens, by name."""

    def __init__(self, view: ModelView) -> None:
        self.mask: torch.Tensor | None = None
        sizes = {f"activation.{layer}": widths.neurons for layer, widths in enumerate(view.widths)}
        for name, module in linear_layers(view.model):
            sizes |= {f"{name}.inputs": module.in_features, f"{name}.outputs": module.out_features}
            if module.bias is not None:
                sizes[f"{name}.unbiased"] = module.out_features
        self.sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}

    def take(self, name: str, x: torch.Tensor) -> None:
        """Add |x|, [..., features]."""
        x = x.detach().reshape(-1, x.shape[-1])
        if self.mask is not None:
            x = x[self.mask]
        self.sums[name] += x.float().abs().sum(dim=0, dtype=torch.float64).cpu()


@contextmanager
def _hooked(view: ModelView, sums: _Sums) -> Iterator[None]:
    """Let `sums` take the inputs and outputs of every linear layer and activation function."""

    def around(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            sums.take(f"{name}.inputs", inputs[0])
            sums.take(f"{name}.outputs", output)
            if module.bias is not None:
                sums.take(f"{name}.unbiased", output - module.bias)

        return hook

    def behind(layer: int) -> Callable[..., None]:
        return lambda _, inputs, output: sums.take(f"activation.{layer}", output)

    handles = []
    try:
        handles += [module.register_forward_hook(around(name)) for name, module in linear_layers(view.model)]
        for index, layer in enumerate(view.layers):
            handles.append(activation_of(layer, view.spec).register_forward_hook(behind(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@fail_together()
def measure_magnitudes(model: PreTrainedModel, batches: Iterable[Batch]) -> Magnitudes:
    """Run the model over text and average |x| before and behind every linear layer and activation function.

    Args:
        model: The base model. Runs in evaluation mode, on its own device and in its own dtype.
        batches: As for [`calibrate`][]; padded positions don't count.

    Raises:
        ConfigError: See [`check_linear`][].
        DataError: Nothing but padding.
        NumericsError: NaN or Inf in weights or activations.
    """
    view = ModelView.of(model)
    check_linear(view.spec)
    check_weights_finite(model)
    rows = model.get_input_embeddings().weight.shape[0]
    sums, num_samples, num_tokens = _Sums(view), 0, 0
    with evaluation_mode(model), _hooked(view, sums):
        for index, batch in tqdm(shard(batches), desc="Calibrating", unit="batch", name="hf_context_prune.calibration"):
            inputs, mask = prepare_batch(batch, index, rows)
            sums.mask = None if mask is None else mask.to(model.device)
            num_samples += inputs["input_ids"].shape[0]
            num_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, use_cache=False)
    num_samples, num_tokens = sum_counts(num_samples, num_tokens)
    if num_tokens == 0:
        raise DataError("There is nothing to calibrate on: no batch, or every position is padding.")
    all_reduce_(sums.sums.values())
    means = {name: total / num_tokens for name, total in sums.sums.items()}
    for name, mean in means.items():
        if not bool(torch.isfinite(mean).all()):
            raise NumericsError(
                f"Mean |x| of {name} is NaN or Inf on the calibration text. {overflow_remedy(model.dtype)}"
            )
    return Magnitudes(
        {
            name: LinearMagnitudes(means[f"{name}.inputs"], means[f"{name}.outputs"], means.get(f"{name}.unbiased"))
            for name, _ in linear_layers(model)
        },
        tuple(means[f"activation.{layer}"] for layer in range(len(view.layers))),
        num_samples,
        num_tokens,
    )


def measure_sample_magnitudes(model: PreTrainedModel, samples: torch.Tensor) -> Magnitudes:
    """Measure what the paper's thresholds are compared with, on samples without padding.

    Args:
        model: The base model, also where its vocabulary is to be pruned.
        samples: [samples, length], int64.
    """
    return measure_magnitudes(model, batches_of(samples, batch_tokens=_HEAD_TOKENS))
