"""The sequential repair: one walk over the blocks with a dense and a pruned stream.

At every block the target of the refit is the *dense* residual stream, so it also absorbs the error made upstream.
Blocks are called, never re-implemented: their real arguments (masks, position embeddings) are captured from the model's
own forward pass. One block's Gram matrix exists at a time.

Notation: x are the inputs of an output projection in the pruned stream, W its weight, K the kept features, and t the
contribution that the sub-layer has to make for the pruned residual stream to equal the dense one. The refit solves

    (X_K^T X_K + lambda I) W_K^T = X_K^T T + lambda W_K^T,    lambda = ridge * mean diag(X^T X),

so the ridge pulls towards the old weights: with equal streams and nothing removed it returns them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from .architectures import (
    ArchSpec,
    Geometry,
    LayerWidths,
    Target,
    blocks,
    check_supported,
    is_parallel,
    output_projection,
    output_weight,
    read_geometry,
    residual_scale,
)
from .calibration import Batch, check_weights_finite, prepare_batch, weights_of_block
from .criteria import Criterion
from .errors import ConfigError, DataError, NumericsError, naming
from .plan import LayerPlan
from .reconstruction import refit
from .stats import Key, RegressionMoments
from .surgery import kept_features


@dataclass
class SequentialResult:
    """What the walk chose and refitted.

    Attributes:
        layers: Kept units, one entry a block.
        outputs: New weight [out, kept] and bias of every output projection that was refitted, in float32.
        num_samples: Blocks of text used.
        num_tokens: Unpadded tokens used.
    """

    layers: tuple[LayerPlan, ...] = ()
    outputs: dict[Key, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    num_samples: int = 0
    num_tokens: int = 0

    def repair(
        self, layer: int, target: str, weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The refitted weights, as `apply_plan` asks for them."""
        new_weight, new_bias = self.outputs[layer, target]
        return new_weight.to(weight.device), new_bias if new_bias is None else new_bias.to(weight.device)


@dataclass
class _Stream:
    """One batch on its way through the blocks."""

    dense: torch.Tensor
    pruned: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    mask: torch.Tensor | None

    def call(self, layer: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.calls[layer]
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """[tokens, features] of the unpadded positions, float32."""
        flat = tensor.reshape(-1, tensor.shape[-1]).float()
        return flat if self.mask is None else flat[self.mask]


def _capture(model: PreTrainedModel, spec: ArchSpec, inputs: Batch, mask: torch.Tensor | None) -> _Stream:
    """Record the first hidden states and every block's other arguments; the blocks themselves do nothing meanwhile."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[torch.Tensor] = []
    layers = blocks(model, spec)

    def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        first.append(hidden)
        calls.append((args, kwargs))
        return hidden

    try:
        for layer in layers:
            layer.forward = record  # type: ignore[assignment]
        model.base_model(**inputs, use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return _Stream(first[0], first[0], calls, mask)


@contextmanager
def _watched(module: nn.Module, *, inputs: bool) -> Iterator[list[torch.Tensor]]:
    """Keep what a module reads (or gives) in the next call."""
    seen: list[torch.Tensor] = []
    if inputs:
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


class _SubLayer:
    """One target of one block: its projection, and how its output enters the residual stream."""

    def __init__(self, block: nn.Module, spec: ArchSpec, target: Target, scale: float) -> None:
        self.projection = output_projection(block, spec, target)
        path = dict(spec.post_norms).get(target)
        self.post_norm = None if path is None else block.get_submodule(path)
        self.scale = scale

    @property
    def branch(self) -> nn.Module:
        """The module whose output, times the scale, is added to the residual stream."""
        return self.projection if self.post_norm is None else self.post_norm

    @property
    def centre(self) -> bool:
        """Whether a bias takes up the mean; behind a norm it can't (rows are rescaled there), and stays as it is."""
        return self.projection.bias is not None and self.post_norm is None

    def gamma(self) -> torch.Tensor:
        """Per-channel factor of the post-norm, [outputs]: its answer to a vector of ones."""
        assert self.post_norm is not None
        width = output_weight(self.projection).shape[0]
        like = output_weight(self.projection)
        return self.post_norm(torch.ones(1, width, dtype=like.dtype, device=like.device))[0].float()

    def regression(
        self, x: torch.Tensor, target: torch.Tensor, output: torch.Tensor, rms: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the linear regression: (x, t), or behind a norm (x / r, t / gamma) with r the dense stream's RMS.

        Args:
            x: Inputs of the projection, [tokens, features].
            target: Wanted contribution to the residual stream, [tokens, outputs].
            output: The projection's output now, [tokens, outputs].
            rms: RMS of the projection's output in the dense stream, [tokens, 1]; only with a post-norm.
        """
        if self.post_norm is None or rms is None:
            return x, target
        gamma = self.gamma()
        small = gamma.abs() < 1e-3 * gamma.abs().mean()
        wanted = torch.where(small, output / rms, target / gamma.masked_fill(small, 1.0))
        if self.projection.bias is not None:
            wanted = wanted - self.projection.bias.float() / rms
        return x / rms, wanted


def _rms(output: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """sqrt(mean y^2 + eps) over features, [tokens, 1]."""
    return (output.square().mean(dim=-1, keepdim=True) + float(norm.eps)).sqrt()  # type: ignore[arg-type]


@torch.no_grad()
def prune_sequentially(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    widths: Sequence[LayerWidths],
    criterion: Criterion,
    *,
    ridge: float = 0.01,
    seed: int = 0,
) -> SequentialResult:
    """Walk the blocks once: choose, remove and refit, each block on the stream that the blocks before it left.

    Args:
        model: The dense model; as it was when this returns.
        batches: As for `calibrate`.
        widths: Widths after pruning, one a block.
        criterion: Ranks units on the pruned stream's statistics and the refitted (not yet pruned) weights.
        ridge: Share of the mean diagonal.
        seed: For the `random` criterion.

    Raises:
        ConfigError: The criterion needs gradients, or the blocks normalise the residual stream itself (OPT-350m).
        DataError: No unpadded token, or token ids beyond the embedding.
        NumericsError: NaN or Inf, with layer and sub-layer.
    """
    spec = check_supported(model)
    if "taylor" in criterion.needs:
        raise ConfigError("The sequential walk has no gradients; use criterion='obs', or another reconstruction.")
    if getattr(model.config, "do_layer_norm_before", True) is False:
        raise ConfigError(
            "reconstruction='sequential' needs blocks that add to the residual stream; this model normalises the "
            "stream itself after each sub-layer (do_layer_norm_before=False). Use reconstruction='least_squares'."
        )
    check_weights_finite(model)
    geometry = read_geometry(model.config, spec)
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    result = SequentialResult()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        streams = []
        for index, batch in enumerate(batches):
            inputs, mask = prepare_batch(batch, index, rows)
            kept = batch["input_ids"].numel() if mask is None else int(mask.sum())
            if kept == 0:
                continue
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            streams.append(_capture(model, spec, inputs, None if mask is None else mask.to(model.device)))
            result.num_tokens += kept
            result.num_samples += batch["input_ids"].shape[0]
        if not streams:
            raise DataError("There is nothing to calibrate on: no batch, or every position is padding.")
        layers = []
        bar = tqdm(blocks(model, spec), desc="Pruning blocks", unit="block", name="hf_context_prune.sequential")
        for index, block in enumerate(bar):
            walk = _BlockWalk(index, block, spec, geometry, residual_scale(model.config, spec), streams)
            with naming(f"layer {index}"):
                layers.append(
                    walk.run(widths[index], criterion, ridge, generator, is_parallel(model.config, spec), result)
                )
        result.layers = tuple(layers)
    finally:
        for module in training:
            module.training = True
    return result


class _BlockWalk:
    """Both streams through one block."""

    def __init__(
        self,
        index: int,
        block: nn.Module,
        spec: ArchSpec,
        geometry: Geometry,
        scale: float,
        streams: Sequence[_Stream],
    ) -> None:
        self.index, self.dense_block, self.spec, self.geometry, self.streams = index, block, spec, geometry, streams
        self.block = copy.deepcopy(block)  # loses its units: their output columns become zero
        self.scale = scale

    def run(
        self,
        widths: LayerWidths,
        criterion: Criterion,
        ridge: float,
        generator: torch.Generator,
        parallel: bool,
        result: SequentialResult,
    ) -> LayerPlan:
        """Prune what has to be pruned, and move both streams behind the block."""
        dense = self.geometry.layers[self.index]
        kept: dict[Target, tuple[int, ...]] = {
            "mlp": tuple(range(dense.neurons)),
            "attention": tuple(range(dense.kv_groups)),
        }
        todo: list[tuple[Target, int]] = []
        if widths.kv_groups < dense.kv_groups:
            todo.append(("attention", widths.kv_groups))
        if widths.neurons < dense.neurons:
            todo.append(("mlp", widths.neurons))
        references = self._dense_pass([target for target, _ in todo], parallel=parallel)
        for target, count in todo:
            moments = self._pruned_pass(target, references, parallel=parallel)
            kept[target] = self._choose_and_refit(target, count, moments, criterion, ridge, generator, result)
        for stream in self.streams:
            stream.pruned = stream.call(self.index, self.block, stream.pruned)
        return LayerPlan(kept["mlp"], kept["attention"])

    def _dense_pass(self, targets: Sequence[Target], *, parallel: bool) -> list[dict[str, torch.Tensor]]:
        """Move the dense streams behind the block; keep what the targets are made of, one dict a stream."""
        references = []
        for stream in self.streams:
            before, notes = stream.dense, {}
            with ExitStack() as stack:
                outputs, branches = {}, {}
                for target in targets:
                    part = _SubLayer(self.dense_block, self.spec, target, self.scale)
                    outputs[target] = stack.enter_context(_watched(part.projection, inputs=False))
                    branches[target] = stack.enter_context(_watched(part.branch, inputs=False))
                stream.dense = stream.call(self.index, self.dense_block, stream.dense)
            for target in targets:
                part = _SubLayer(self.dense_block, self.spec, target, self.scale)
                if part.post_norm is not None:
                    notes[f"rms.{target}"] = _rms(stream.rows(outputs[target][0]), part.post_norm)
                if target == "attention" and not parallel:
                    # What the residual stream between attention and MLP lacks: dense contribution and upstream error.
                    lag = stream.rows(before) - stream.rows(stream.pruned)
                    notes["middle"] = stream.rows(branches[target][0]) + lag / self.scale
            references.append(notes)
        return references

    def _pruned_pass(
        self, target: Target, references: list[dict[str, torch.Tensor]], *, parallel: bool
    ) -> RegressionMoments:
        """Sums over the pruned streams for one target; the streams stay before the block."""
        part = _SubLayer(self.block, self.spec, target, self.scale)
        weight = output_weight(part.projection)
        moments = RegressionMoments(weight.shape[1], weight.shape[0], weight.device, centre=part.centre)
        for stream, notes in zip(self.streams, references, strict=True):
            with (
                _watched(part.projection, inputs=True) as x,
                _watched(part.projection, inputs=False) as output,
                _watched(part.branch, inputs=False) as branch,
            ):
                after = stream.call(self.index, self.block, stream.pruned)
            if target == "attention" and not parallel:
                wanted = notes["middle"]
            else:  # the last to add: its own contribution and whatever the block's output still lacks
                wanted = stream.rows(branch[0]) + (stream.rows(stream.dense) - stream.rows(after)) / self.scale
            moments.add(*part.regression(stream.rows(x[0]), wanted, stream.rows(output[0]), notes.get(f"rms.{target}")))
        moments.statistics.check_finite(f"layer {self.index} ({target}), pruned stream")
        if not bool(torch.isfinite(moments.cross).all()):
            raise NumericsError(f"NaN or Inf in the target of layer {self.index} ({target}). Prune in float32.")
        return moments

    def _choose_and_refit(
        self,
        target: Target,
        count: int,
        moments: RegressionMoments,
        criterion: Criterion,
        ridge: float,
        generator: torch.Generator,
        result: SequentialResult,
    ) -> tuple[int, ...]:
        part = _SubLayer(self.block, self.spec, target, self.scale)
        view, bias = output_weight(part.projection), part.projection.bias
        old = view.double()
        second_moment, cross = moments.second()
        optimum = refit(old, second_moment, cross, None, ridge)
        if part.post_norm is not None:  # rank by what reaches the residual stream
            optimum = part.gamma().double()[:, None] * optimum
        groups = self.geometry.layers[self.index].kv_groups
        weights = weights_of_block(self.block, self.spec, self.geometry, target, groups)
        scores = criterion.function(replace(weights, output=optimum).cpu(), moments.statistics.cpu(), generator)
        if not bool(torch.isfinite(scores).all()):
            raise NumericsError(
                f"The importance of layer {self.index} ({target}) holds NaN or Inf; nothing was chosen."
            )
        units = tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))
        features = kept_features(self.geometry, target, units)
        weight = refit(old, second_moment, cross, features, ridge)
        new_bias = None
        if part.centre:
            stats = moments.statistics
            new_bias = moments.sum_target / stats.num_tokens - weight @ stats.mean[features]
            bias.copy_(new_bias)
        view.zero_()
        view[:, torch.tensor(features, device=view.device)] = weight.to(view.dtype)
        kept_bias = None if bias is None else bias.float().clone()
        result.outputs[self.index, target] = (weight.float(), kept_bias)
        return units
