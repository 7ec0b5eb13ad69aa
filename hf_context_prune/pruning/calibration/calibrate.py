"""Model + token blocks -> statistics. The only module that hooks a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import ConfigError, DataError, NumericsError
from hf_context_prune.modeling.architectures import (
    TARGETS,
    Gradients,
    Target,
    absolute_weight,
    check_supported,
    input_magnitude,
    layers_of,
    output_projection,
    output_weight,
)
from hf_context_prune.modeling.specs import ArchSpec, Geometry, read_geometry
from hf_context_prune.utils.distributed import all_reduce_, fail_together, shard, sum_counts
from hf_context_prune.utils.linalg import all_finite

from .reduce import reduce_statistics
from .samples import Batch, prepare_batch
from .statistics import CalibrationStats, TargetStatistics


def check_weights_finite(model: nn.Module) -> None:
    """Raise if any weight is NaN or Inf.

    Raises:
        NumericsError: Names the first such weight.
    """
    for name, parameter in model.named_parameters():
        if not all_finite(parameter.detach()):
            raise NumericsError(
                f"The weight {name} holds NaN or Inf. The checkpoint is damaged, or its dtype overflowed: load it "
                f"again, in float32."
            )


class _Collector:
    """Sums of one output projection's inputs; `hook` is a forward pre-hook."""

    def __init__(
        self, layer: int, target: Target, features: int, device: torch.device, *, gram: bool, centre: bool
    ) -> None:
        self.where = f"layer {layer} ({target})"
        self.centre = centre
        self.mask: torch.Tensor | None = None
        self.batch = 0
        # MPS has no float64; there the sums move to the CPU, where they are float64 too.
        self.device = torch.device("cpu") if device.type == "mps" else device
        zeros = [torch.zeros(features, dtype=torch.float64, device=self.device) for _ in range(3)]
        self.statistics = TargetStatistics(0, *zeros)
        if gram:
            self.statistics.gram = torch.zeros(features, features, device=device)

    def hook(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        if self.mask is not None:
            x = x[self.mask]
        stats = self.statistics
        if x.shape[0] == 0:
            return
        stats.num_tokens += x.shape[0]
        stats.sum += x.sum(dim=0).to(self.device, torch.float64)
        stats.sum_abs += x.abs().sum(dim=0).to(self.device, torch.float64)
        stats.sum_squares += x.square().sum(dim=0).to(self.device, torch.float64)
        if stats.gram is not None:
            if self.centre:
                if stats.pivot is None:
                    stats.pivot = x.mean(dim=0).to(self.device, torch.float64)
                x = x - stats.pivot.to(x)
            stats.gram.addmm_(x.T, x)
        stats.check_finite(f"{self.where}, batch {self.batch}")


@contextmanager
def _hooked(
    model: PreTrainedModel,
    spec: ArchSpec,
    targets: Iterable[Target],
    layers: Collection[int] | None,
    *,
    gram: bool,
) -> Iterator[dict[tuple[int, Target], _Collector]]:
    collectors: dict[tuple[int, Target], _Collector] = {}
    handles = []
    try:
        for layer, block in enumerate(layers_of(model, spec)):
            for target in targets if layers is None or layer in layers else ():
                projection = output_projection(block, spec, target)
                weight = output_weight(projection)
                centre = projection.bias is not None
                collector = _Collector(layer, target, weight.shape[1], weight.device, gram=gram, centre=centre)
                collectors[layer, target] = collector
                handles.append(projection.register_forward_pre_hook(collector.hook))
        yield collectors
    finally:
        for handle in handles:
            handle.remove()


@fail_together()
def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    targets: Iterable[Target] = TARGETS,
    statistics: frozenset[str] = frozenset(),
    layers: Collection[int] | None = None,
) -> CalibrationStats:
    """Run the model over text and sum up what its output projections read.

    Under ``accelerate launch`` every process has to call it, with the same batches: each runs every n-th of them, and
    all get the sums over all.

    Args:
        model: The dense model. Runs in evaluation mode, on its own device and in its own dtype.
        batches: Dicts with ``input_ids`` [batch, length] int64 and, where there is padding, ``attention_mask`` of the
            same shape; padded positions count in no statistic.
        targets: ``"mlp"`` and/or ``"attention"``.
        statistics: Beyond the moments: ``"gram"`` (X^T X) and/or ``"taylor"`` (gradients of the language-model loss).
        layers: Those to sum up; None: all. Gram matrices of all at once may be more than the memory holds.

    Returns:
        Sums in float64 (Gram matrices in float32).

    Raises:
        DataError: No batch, only padding, or token ids beyond the embedding.
        NumericsError: NaN or Inf in weights or activations, with layer and batch.
        UnsupportedArchitectureError: See `check_supported`.
    """
    spec = check_supported(model)
    check_weights_finite(model)
    geometry = read_geometry(model.config, spec)
    targets = tuple(targets)
    for name, given, allowed in (("targets", targets, TARGETS), ("statistics", statistics, ("gram", "taylor"))):
        if unknown := sorted(set(given) - set(allowed)):
            raise ConfigError(f"Unknown {name} {', '.join(map(repr, unknown))}; allowed are {', '.join(allowed)}.")
    rows = model.get_input_embeddings().weight.shape[0]
    with_gradients = "taylor" in statistics
    training = [module for module in model.modules() if module.training]
    model.eval()
    run = _loss_step if with_gradients else _forward_step
    gradients = _GradientSums(model, spec)
    num_tokens = num_samples = 0
    try:
        with (
            _hooked(model, spec, targets, layers, gram="gram" in statistics) as collectors,
            _only_block_gradients(model, spec, enabled=with_gradients),
        ):
            for index, batch in tqdm(
                shard(batches), desc="Calibrating", unit="batch", name="hf_context_prune.calibration"
            ):
                inputs, mask = prepare_batch(batch, index, rows)
                for collector in collectors.values():
                    collector.batch, collector.mask = index, None if mask is None else mask.to(model.device)
                ids = inputs["input_ids"]
                kept = ids.numel() if mask is None else int(mask.sum())
                if kept == 0:
                    continue
                run(model, {name: tensor.to(model.device) for name, tensor in inputs.items()})
                if with_gradients:
                    gradients.take()
                num_tokens += kept
                num_samples += ids.shape[0]
            num_tokens, num_samples = sum_counts(num_tokens, num_samples)
            if num_tokens == 0:
                raise DataError(
                    "There is nothing to calibrate on: no batch, or every position is padding. Give text with at "
                    "least one unpadded token."
                )
            for collector in collectors.values():
                reduce_statistics(collector.statistics)
            if with_gradients:
                gradients.reduce()
                _collect_taylor(model, spec, geometry, collectors, gradients.sums)
    finally:
        for module in training:
            module.training = True
    result = {}
    for key, collector in collectors.items():
        collector.statistics.check_finite(f"{collector.where}, all batches")
        result[key] = collector.statistics.cpu()
    return CalibrationStats(result, num_samples, num_tokens)  # type: ignore[arg-type]


def _forward_step(model: PreTrainedModel, inputs: Batch) -> None:
    # The bare decoder: the head's logits are most of the memory and a fifth of the time, and nobody reads them.
    with torch.inference_mode():
        model.base_model(**inputs, use_cache=False)


def _loss_step(model: PreTrainedModel, inputs: Batch) -> None:
    labels = inputs["input_ids"]
    if "attention_mask" in inputs:
        text = inputs["attention_mask"].bool()
        # The first token of a text is not predicted: what stands before it, if anything, is padding.
        follows = text & nn.functional.pad(text[:, :-1], (1, 0))
        labels = labels.masked_fill(~follows, -100)
    predicted = int((labels[:, 1:] != -100).sum())
    if predicted:  # the loss is a mean: times its tokens, so that every token weighs the same in the sum over batches
        (model(**inputs, labels=labels, use_cache=False).loss * predicted).backward()
    else:  # texts of one token: nothing is predicted, and the mean over nothing would be NaN
        _forward_step(model, inputs)


class _GradientSums:
    """Sums of the blocks' gradients over batches, in float32: half precision would lose what it adds up."""

    def __init__(self, model: PreTrainedModel, spec: ArchSpec) -> None:
        self.parameters = [parameter for block in layers_of(model, spec) for parameter in block.parameters()]
        self.sums: dict[int, torch.Tensor] = {}

    def take(self) -> None:
        """Add a batch's gradients; those of float32 weights are summed where they are."""
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
        """Sum over all processes; one that had no batch has no gradient yet."""
        counts = sum_counts(*(id(parameter) in self.sums for parameter in self.parameters))
        present = [parameter for parameter, count in zip(self.parameters, counts, strict=True) if count]
        for parameter in present:
            if id(parameter) not in self.sums:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self.sums[id(parameter)] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        all_reduce_(self.sums[id(parameter)] for parameter in present)


@contextmanager
def _only_block_gradients(model: PreTrainedModel, spec: ArchSpec, *, enabled: bool) -> Iterator[None]:
    """Let only the blocks' weights have gradients, and drop those gradients at the end."""
    if not enabled:
        yield
        return
    before: list[tuple[nn.Parameter, bool, torch.Tensor | None]] = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
    inside = {id(parameter) for block in layers_of(model, spec) for parameter in block.parameters()}
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


def _collect_taylor(
    model: PreTrainedModel,
    spec: ArchSpec,
    geometry: Geometry,
    collectors: dict[tuple[int, Target], _Collector],
    gradients: Gradients,
) -> None:
    layers = layers_of(model, spec)
    if not gradients:
        raise DataError("There are no gradients: no text has two tokens, so nothing was predicted. Give longer texts.")
    for (layer, target), collector in collectors.items():
        groups = geometry.layers[layer].kv_groups
        inputs = input_magnitude(layers[layer], spec, geometry, target, groups, gradients)
        output = absolute_weight(output_projection(layers[layer], spec, target), gradients).sum(dim=0)
        collector.statistics.taylor = inputs + output.reshape(len(inputs), -1).sum(dim=1)
