"""The sequential repair: one walk over the blocks with a dense and a pruned stream.

At every block the target of the refit is the *dense* residual stream, so it also absorbs the error made upstream. One
block's Gram matrix exists at a time, and blocks are done one after the other: a walk that is killed goes on from the
last finished block.

Notation: x are the inputs of an output projection in the pruned stream, W its weight, K the kept features, and e what
the pruned residual stream lacks, beside the projection's own output W x, to equal the dense one. `refit` has the
equation. Its ridge on e is chosen block by block on text that is never fitted: every block fits e anew on the same
tokens, so a small ridge would learn those tokens by heart.

Behind a norm (Gemma 2 and 3) the projection's output y = W x enters as gamma y / r(y), with one scale r a token. There
x is divided by r, and e by gamma, but for channels of small gamma: what those lack would take changes so large that
they grow r and shrink every other channel (`_SubLayer.regression`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import ConfigError, DataError, NumericsError, error_context
from hf_context_prune.modeling.architectures import (
    Target,
    channel_scale,
    check_supported,
    is_parallel,
    layers_of,
    output_projection,
    output_weight,
    post_norm,
    residual_scale,
)
from hf_context_prune.modeling.plan import LayerPlan
from hf_context_prune.modeling.specs import ArchSpec, LayerWidths, read_geometry
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.calibration.reduce import reduce_moments
from hf_context_prune.pruning.calibration.samples import Batch, prepare_batch
from hf_context_prune.pruning.calibration.statistics import Key, RegressionMoments
from hf_context_prune.pruning.criteria import Criterion
from hf_context_prune.pruning.reconstruction import refit, squared_error
from hf_context_prune.pruning.scoring import weights_of_layer
from hf_context_prune.pruning.surgery import kept_features
from hf_context_prune.utils.distributed import broadcast_object, fail_together, shard, sum_counts
from hf_context_prune.utils.precision import reduced_precision_matmul

from .checkpoint import FinishedLayer, WalkState
from .hidden_states import Stream, StreamStorage, capture, choose_held_out, record_activations

CORRECTION_RIDGES = (0.1, 0.3, 1.0, 3.0)
"""Ridges tried for what upstream blocks left to correct, as shares of each feature's mean square."""
DEFAULT_CORRECTION_RIDGE = 1.0
"""Where there is too little text to hold any out."""
NORM_DAMPING = 0.1
"""Behind a norm, the square of gamma below which a channel is corrected less, as a share of the mean square."""
SINK_SHARE = 0.1
"""Behind a norm, the RMS below which a token counts less, as a share of the median."""
HELD_OUT_EVERY = 12
"""One batch in so many only chooses ridges."""


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

    def reconstruct(
        self, layer: int, target: str, weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The refitted weights, as `apply_plan` asks for them."""
        new_weight, new_bias = self.outputs[layer, target]
        return new_weight.to(weight.device), new_bias if new_bias is None else new_bias.to(weight.device)


class _SubLayer:
    """One target of one block: its projection, and how its output enters the residual stream."""

    def __init__(self, block: nn.Module, spec: ArchSpec, target: Target) -> None:
        self.target, self.projection = target, output_projection(block, spec, target)
        self.post_norm, self.gamma = post_norm(block, spec, target), channel_scale(block, spec, target)

    @property
    def branch(self) -> nn.Module:
        """The module whose output, times the model's scale, is added to the residual stream."""
        return self.projection if self.post_norm is None else self.post_norm

    @property
    def centre(self) -> bool:
        """Whether a bias takes up the mean; behind a norm it can't (rows are rescaled there), and stays as it is."""
        return self.projection.bias is not None and self.post_norm is None

    def regression(
        self, x: torch.Tensor, output: torch.Tensor, lacking: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the regression: (x, e), or behind a norm (u x / r, u d e).

            r = sqrt(mean y^2 + eps)    u = min(1, r / (SINK_SHARE median r))
            d = gamma / (gamma^2 + NORM_DAMPING mean gamma^2)

        To first order in the change C of W, and without that of r, gamma C x / r is what is added to the stream. u
        keeps attention sinks, tokens with almost no output, from having all the weight. d is 1 / gamma where gamma is
        not small: the ridge solution of gamma d = 1.

        Args:
            x: Inputs of the projection, [tokens, features].
            output: y, the projection's output, [tokens, channels].
            lacking: e, [tokens, channels].
        """
        if self.post_norm is None:
            return x, lacking
        gamma = self.gamma.float().T
        rms = (output.square().mean(dim=-1, keepdim=True) + float(self.post_norm.eps)).sqrt()  # type: ignore[arg-type]
        weight = 1 / rms.clamp_min(SINK_SHARE * rms.median())
        damped = gamma / (gamma.square() + NORM_DAMPING * gamma.square().mean())
        return weight * x, weight * rms * damped * lacking


def check_sequential(model: PreTrainedModel, criterion: Criterion) -> None:
    """Refuse, before any work, what the walk can't do.

    Raises:
        ConfigError: The criterion needs gradients, or the blocks normalise the residual stream itself (OPT-350m).
    """
    if "taylor" in criterion.needs:
        raise ConfigError("The sequential walk has no gradients; use criterion='obs', or another reconstruction.")
    if getattr(model.config, "do_layer_norm_before", True) is False:
        raise ConfigError(
            "reconstruction='sequential' needs blocks that add to the residual stream; this model normalises the "
            "stream itself after each sub-layer (do_layer_norm_before=False). Use reconstruction='least_squares'."
        )


def _bar(what: str, total: int, done: int = 0) -> Any:  # noqa: ANN401 - huggingface_hub's tqdm
    return tqdm(total=total, initial=done, desc=what, unit="block", name="hf_context_prune.sequential")


@fail_together()
@torch.no_grad()
def prune_sequentially(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    widths: Sequence[LayerWidths],
    criterion: Criterion,
    *,
    ridge: float = 0.3,
    seed: int = 0,
    state_dir: Path | None = None,
    memory_limit: int | None = None,
) -> SequentialResult:
    """Walk the blocks once: choose, remove and refit, each block on the stream that the blocks before it left.

    Under ``accelerate launch`` every process has to call it, with the same batches: each walks every n-th of them.

    Args:
        model: The dense model; as it was when this returns.
        batches: As for `calibrate`.
        widths: Widths after pruning, one a block.
        criterion: Ranks units on the pruned stream's statistics and the refitted (not yet pruned) weights.
        ridge: Share of each feature's mean square.
        seed: For the `random` criterion.
        state_dir: Where finished blocks are kept; a walk over the same inputs goes on from there, to the same bits.
        memory_limit: Bytes of hidden states that may stay in memory, beyond which they lie in a memory-mapped file;
            None: half of the free memory.

    Raises:
        ConfigError: The criterion needs gradients, or the blocks normalise the residual stream itself (OPT-350m).
        DataError: No unpadded token, or token ids beyond the embedding.
        NumericsError: NaN or Inf, with layer and sub-layer.
    """
    spec = check_supported(model)
    check_sequential(model, criterion)
    check_weights_finite(model)
    batches = list(batches)
    state = WalkState(state_dir, model, batches, widths, criterion.name, ridge, seed)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        streams, result = _streams(model, spec, batches, memory_limit)
        walk = SequentialPruner(model, spec, streams, criterion, ridge, seed)
        bar, taking_up = None, False
        for index in range(len(widths)):
            with error_context(f"layer {index}"):
                done = broadcast_object(state.finished(index))  # all processes do the same
                if bar is None or (taking_up and done is None):  # a bar of its own: its pace says nothing of the rest
                    if bar is not None:
                        bar.close()
                    taking_up = done is not None
                    bar = _bar("Taking up finished blocks" if taking_up else "Pruning blocks", len(widths), index)
                if done is None:
                    done = walk.prune(index, widths[index])
                    state.keep(index, done)
                else:
                    walk.replay(index, done)
            result.layers += (done.layer,)
            result.outputs |= {(index, target): output for target, output in done.outputs.items()}
            bar.update()
        if bar is not None:
            bar.close()
    finally:
        for module in training:
            module.training = True
    return result


def _streams(
    model: PreTrainedModel, spec: ArchSpec, batches: Sequence[Batch], memory_limit: int | None
) -> tuple[list[Stream], SequentialResult]:
    """This process's streams before the first block, and the counts of all processes."""
    table = model.get_input_embeddings().weight
    held_out = choose_held_out(len(batches), HELD_OUT_EVERY)
    mine, result = shard(batches), SequentialResult()
    elements = sum(batch["input_ids"].numel() for _, batch in mine) * model.config.hidden_size
    storage = StreamStorage(elements, table.dtype, limit=memory_limit)
    streams = []
    for index, batch in mine:
        inputs, mask = prepare_batch(batch, index, table.shape[0])
        kept = batch["input_ids"].numel() if mask is None else int(mask.sum())
        if kept == 0:
            continue
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        mask = None if mask is None else mask.to(model.device)
        streams.append(capture(model, spec, inputs, mask, storage, held_out=held_out[index]))
        result.num_tokens += kept
        result.num_samples += batch["input_ids"].shape[0]
    result.num_tokens, result.num_samples = sum_counts(result.num_tokens, result.num_samples)
    if not result.num_tokens:
        raise DataError("There is nothing to calibrate on: no batch, or every position is padding.")
    return streams, result


class SequentialPruner:
    """Both streams on their way through the blocks."""

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ArchSpec,
        streams: Sequence[Stream],
        criterion: Criterion,
        ridge: float,
        seed: int,
    ) -> None:
        self.blocks, self.spec, self.streams = layers_of(model, spec), spec, streams
        self.criterion, self.ridge, self.seed = criterion, ridge, seed
        self.geometry = read_geometry(model.config, spec)
        self.scale, self.parallel = residual_scale(model.config, spec), is_parallel(model.config, spec)

    def prune(self, index: int, widths: LayerWidths) -> FinishedLayer:
        """Prune one block as far as its widths ask, and move both streams behind it."""
        dense = self.geometry.layers[index]
        todo: list[tuple[Target, int]] = []
        if widths.kv_groups < dense.kv_groups:
            todo.append(("attention", widths.kv_groups))
        if widths.neurons < dense.neurons:
            todo.append(("mlp", widths.neurons))
        done = FinishedLayer(LayerPlan(tuple(range(dense.neurons)), tuple(range(dense.kv_groups))))
        block = copy.deepcopy(self.blocks[index])  # loses its units: their output columns become zero
        references = self._dense_pass(index, [target for target, _ in todo])
        for target, count in todo:
            fit, choose = self._pruned_pass(index, block, target, references)
            part = _SubLayer(block, self.spec, target)
            units, output = self._choose_and_refit(index, block, part, count, fit, choose)
            name = "neurons" if target == "mlp" else "kv_groups"
            done = FinishedLayer(replace(done.layer, **{name: units}), {**done.outputs, target: output})
            self._install(part, kept_features(self.geometry, target, units), *output)
        for stream in self.streams:
            stream.pruned.copy_(stream.call(index, block, stream.pruned))
        return done

    def replay(self, index: int, done: FinishedLayer) -> None:
        """Move both streams behind a block that an earlier, interrupted walk finished."""
        block = copy.deepcopy(self.blocks[index])
        for target, output in done.outputs.items():
            part = _SubLayer(block, self.spec, target)
            self._install(part, kept_features(self.geometry, target, done.layer.kept(target)), *output)
        for stream in self.streams:
            stream.dense.copy_(stream.call(index, self.blocks[index], stream.dense))
            stream.pruned.copy_(stream.call(index, block, stream.pruned))

    def _dense_pass(self, index: int, targets: Sequence[Target]) -> list[torch.Tensor | None]:
        """Move the dense streams behind the block.

        Returns:
            For each stream what attention has to add for the pruned residual stream behind it to equal the dense one,
            [tokens, outputs]; None where that is not needed.
        """
        references: list[torch.Tensor | None] = []
        block = self.blocks[index]
        part = _SubLayer(block, self.spec, "attention")
        refers = "attention" in targets and not self.parallel
        for stream in self.streams:
            with record_activations(part.branch, inputs=False) as output:
                after = stream.call(index, block, stream.dense)
            reference = None
            if refers:
                lag = stream.rows(stream.dense) - stream.rows(stream.pruned)
                reference = stream.rows(output[0]) + lag / self.scale
            references.append(reference)
            stream.dense.copy_(after)
        return references

    def _pruned_pass(
        self, index: int, block: nn.Module, target: Target, references: list[torch.Tensor | None]
    ) -> tuple[RegressionMoments, RegressionMoments]:
        """Sums over the pruned streams for one target, fitted and held-out text; the streams stay before the block."""
        part = _SubLayer(block, self.spec, target)
        weight = output_weight(part.projection)
        fit, choose = (
            RegressionMoments(weight.shape[1], weight.shape[0], weight.device, centre=part.centre) for _ in range(2)
        )
        for stream, reference in zip(self.streams, references, strict=True):
            with (
                record_activations(part.projection, inputs=True) as x,
                record_activations(part.projection, inputs=False) as output,
                record_activations(part.branch, inputs=False) as branch,
            ):
                after = stream.call(index, block, stream.pruned)
            if reference is not None and target == "attention":
                lacking = reference - stream.rows(branch[0])
            else:  # the last to add: whatever the block's output lacks
                lacking = (stream.rows(stream.dense) - stream.rows(after)) / self.scale
            rows = part.regression(stream.rows(x[0]), stream.rows(output[0]), lacking)
            with reduced_precision_matmul():  # what that rounds in an entry is nothing to the ridge
                (choose if stream.held_out else fit).add(*rows)
        for moments in (fit, choose):
            reduce_moments(moments)
            moments.statistics.check_finite(f"layer {index} ({target}), pruned stream")
            if not bool(torch.isfinite(moments.cross).all()):
                raise NumericsError(f"NaN or Inf in the target of layer {index} ({target}). Prune in float32.")
        return fit, choose

    def _choose_and_refit(
        self,
        index: int,
        block: nn.Module,
        part: _SubLayer,
        count: int,
        fit: RegressionMoments,
        choose: RegressionMoments,
    ) -> tuple[tuple[int, ...], tuple[torch.Tensor, torch.Tensor | None]]:
        target = part.target
        old = output_weight(part.projection).double()
        second_moment, lacking = fit.second()
        correction_ridge, optimum = DEFAULT_CORRECTION_RIDGE, None
        if choose.statistics.num_tokens:
            held_out = choose.second()
            fits = {share: refit(old, second_moment, lacking, None, self.ridge, share) for share in CORRECTION_RIDGES}
            correction_ridge = min(fits, key=lambda share: squared_error(fits[share] - old, *held_out))
            optimum = fits[correction_ridge]
        if optimum is None:
            optimum = refit(old, second_moment, lacking, None, self.ridge, correction_ridge)
        groups = self.geometry.layers[index].kv_groups
        weights = replace(weights_of_layer(block, self.spec, self.geometry, target, groups), output=optimum)
        # A generator of its own for every block, so that a resumed walk draws what an uninterrupted one does.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + 2 * index + (target == "mlp")) % 2**63)
        scores = self.criterion.function(weights.cpu(), fit.statistics.cpu(), generator)
        if not bool(torch.isfinite(scores).all()):
            raise NumericsError(f"The importance of layer {index} ({target}) holds NaN or Inf; nothing was chosen.")
        units = tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))
        features = kept_features(self.geometry, target, units)
        weight = refit(old, second_moment, lacking, features, self.ridge, correction_ridge)
        bias = part.projection.bias
        if part.centre:
            mean = fit.statistics.mean
            bias = bias.double() + fit.sum_target / fit.statistics.num_tokens + old @ mean - weight @ mean[features]
        return units, (weight.float(), None if bias is None else bias.float().clone())

    @staticmethod
    def _install(part: _SubLayer, features: list[int], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Zero the output columns of what is removed, and set the refitted rest."""
        view = output_weight(part.projection)
        view.zero_()
        view[:, torch.tensor(features, device=view.device)] = weight.to(view)
        if bias is not None:
            part.projection.bias.copy_(bias)
