"""Model + samples -> statistics of the output projections' inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import ConfigError, DataError, NumericsError
from hf_context_prune.modeling.architectures import TARGETS, Target, output_weight
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.offloaded import map_offloaded
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.utils.distributed import fail_together, shard, sum_counts
from hf_context_prune.utils.linalg import add_gram_
from hf_context_prune.utils.precision import overflow_remedy
from hf_context_prune.utils.tensor_facts import is_finite

from .gradients import GradientSums, backward_step, forward_step, layer_gradients
from .reduce import reduce_statistics
from .samples import Batch, prepare_batch
from .statistics import CalibrationStats, Key, TargetStatistics


@fail_together()
def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    targets: Iterable[Target] = TARGETS,
    statistics: frozenset[str] = frozenset(),
    layers: Collection[int] | None = None,
) -> CalibrationStats:
    """Run the model over text and sum up the inputs of its output projections.

    Under ``accelerate launch`` every process has to call it, with the same batches: each runs every n-th of them, and
    all get the sums over all.

    Args:
        model: The base model. Runs in evaluation mode, on its own device and in its own dtype.
        batches: Dicts with ``input_ids`` [batch, length] int64 and, where there is padding, ``attention_mask`` of the
            same shape; padded positions count in no statistic.
        targets: ``"mlp"`` and/or ``"attention"``.
        statistics: Beyond the moments: ``"gram"`` (X^T X) and/or ``"taylor"`` (gradients of the language-model loss).
        layers: Indices of the layers to sum up; None: all. Gram matrices of all at once may not fit into memory.

    Returns:
        Sums in float64 (Gram matrices in float32).

    Raises:
        DataError: No batch, only padding, or token ids beyond the embedding.
        NumericsError: NaN or Inf in weights or activations, with layer and batch.
        UnsupportedArchitectureError: See `check_supported`.
    """
    model = map_offloaded(model)
    view = ModelView.of(model)
    check_weights_finite(model)
    targets = tuple(targets)
    for name, given, allowed in (("targets", targets, TARGETS), ("statistics", statistics, ("gram", "taylor"))):
        if unknown := sorted(set(given) - set(allowed)):
            raise ConfigError(f"Unknown {name} {', '.join(map(repr, unknown))}; allowed are {', '.join(allowed)}.")
    gradients = GradientSums(view) if "taylor" in statistics else None
    with (
        evaluation_mode(model, inference=False),
        collect(view, targets, layers, gram="gram" in statistics) as collectors,
        nullcontext() if gradients is None else layer_gradients(view),
    ):
        num_samples, num_tokens = _run(model, batches, list(collectors.values()), gradients)
        found = finish(collectors)
        if gradients is not None:
            gradients.reduce()
            for (layer, target), collector in collectors.items():
                found[layer, target].taylor = gradients.taylor(layer, target).cpu()
                found[layer, target].check_finite(f"{collector.where}, all batches")
    return CalibrationStats(found, num_samples, num_tokens)


def check_weights_finite(model: nn.Module) -> None:
    """Refuse a model with weights that are NaN or Inf.

    Raises:
        NumericsError: A weight is not finite; the message names the first.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise NumericsError(
                f"The weight {name} holds NaN or Inf: the checkpoint is damaged, or the data type that it was loaded "
                f"in overflowed. {overflow_remedy(parameter.dtype)}"
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
            add_gram_(stats.gram, x)
        stats.check_finite(f"{self.where}, batch {self.batch}")


Collectors = dict[tuple[int, Target], _Collector]


@contextmanager
def collect(
    view: ModelView, targets: Sequence[Target], layers: Collection[int] | None, *, gram: bool
) -> Iterator[Collectors]:
    """Sum up the inputs of the output projections of these layers (None: of all) whenever they run."""
    collectors: Collectors = {}
    handles = []
    try:
        for layer, target in view.places(targets):
            if layers is not None and layer not in layers:
                continue
            projection = view.output_projection(layer, target)
            weight = output_weight(projection)
            centre = projection.bias is not None
            collector = _Collector(layer, target, weight.shape[1], weight.device, gram=gram, centre=centre)
            collectors[layer, target] = collector
            handles.append(projection.register_forward_pre_hook(collector.hook))
        yield collectors
    finally:
        for handle in handles:
            handle.remove()


def _run(
    model: PreTrainedModel, batches: Iterable[Batch], collectors: Sequence[_Collector], gradients: GradientSums | None
) -> tuple[int, int]:
    """Run the hooked model over this process's batches; return samples and unpadded tokens of all processes."""
    rows = model.get_input_embeddings().weight.shape[0]
    step = forward_step if gradients is None else backward_step
    num_tokens = num_samples = 0
    for index, batch in tqdm(shard(batches), desc="Calibrating", unit="batch", name="hf_context_prune.calibration"):
        inputs, mask = prepare_batch(batch, index, rows)
        for collector in collectors:
            collector.batch, collector.mask = index, None if mask is None else mask.to(model.device)
        ids = inputs["input_ids"]
        kept = ids.numel() if mask is None else int(mask.sum())
        if kept == 0:
            continue
        step(model, {name: tensor.to(model.device) for name, tensor in inputs.items()})
        if gradients is not None:
            gradients.take()
        num_tokens += kept
        num_samples += ids.shape[0]
    num_samples, num_tokens = sum_counts(num_samples, num_tokens)
    if num_tokens == 0:
        raise DataError(
            "There is nothing to calibrate on: no batch, or every position is padding. Give text with at least one "
            "unpadded token."
        )
    return num_samples, num_tokens


def finish(collectors: Mapping[tuple[int, Target], _Collector]) -> dict[Key, TargetStatistics]:
    """Return the statistics of all processes, on the CPU, refusing sums that are not finite.

    Raises:
        NumericsError: A sum is not finite.
    """
    result: dict[Key, TargetStatistics] = {}
    for key, collector in collectors.items():
        reduce_statistics(collector.statistics)
        collector.statistics.check_finite(f"{collector.where}, all batches")
        result[key] = collector.statistics.cpu()
    return result
