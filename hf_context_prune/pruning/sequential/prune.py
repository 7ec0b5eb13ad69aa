"""Sequential reconstruction: one pass over the decoder layers with a base and a pruned stream.

A *stream* is the hidden states of the text between two layers. At every layer the regression's target is the *base*
model's residual stream, so it also absorbs the error made upstream, and before removed layers their work. The Gram
matrix of one layer exists at a time, and layers are done one after the other: an interrupted run resumes from the last
finished layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.config import DEFAULT_RIDGE
from hf_context_prune.errors import ConfigError, DataError, error_context
from hf_context_prune.modeling.geometry import LayerWidths
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.layer_device import layer_device
from hf_context_prune.modeling.plan import LayerPlan
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.calibration.samples import VALIDATION_EVERY, Batch
from hf_context_prune.pruning.calibration.statistics import Key
from hf_context_prune.pruning.criteria import Criterion
from hf_context_prune.utils.distributed import broadcast_object, fail_together, shard, sum_counts

from .checkpoint import FinishedLayer, Output, SequentialCheckpoint
from .hidden_states import Stream, StreamStorage, capture_streams, choose_validation, count_positions
from .layer_pruner import SequentialPruner


@dataclass
class SequentialResult:
    """Kept units and reconstructed weights of all layers.

    Attributes:
        layers: Kept units, one entry per layer.
        outputs: New weight [out, kept] and bias of every reconstructed output projection, in the model's dtype;
            possibly memory-mapped.
        num_samples: Samples used.
        num_tokens: Unpadded tokens used.
        final_states: Hidden states of the pruned model behind its last layer, before the final norm, [samples, length,
            hidden], in the order of the samples and in the dtype of the embedding; possibly memory-mapped. They are
            what the planned model computes in [`bfloat16_layers`][]; padded positions hold no meaningful values.
            [`finish_forward`][] computes the inputs of the LM head from them. None where another process holds a part,
            or the batches differ in length or hold nothing but padding.
    """

    layers: tuple[LayerPlan, ...] = ()
    outputs: dict[Key, Output] = field(default_factory=dict)
    num_samples: int = 0
    num_tokens: int = 0
    final_states: torch.Tensor | None = field(default=None, repr=False)

    def reconstruct(
        self, layer: int, target: str, weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the reconstructed weight and bias of a projection, as `apply_plan` asks for them."""
        new_weight, new_bias = self.outputs[layer, target]
        return new_weight.to(weight.device), new_bias if new_bias is None else new_bias.to(weight.device)


def check_sequential(model: PreTrainedModel, criterion: Criterion) -> None:
    """Refuse, before any work, models and criteria that sequential reconstruction can't handle.

    Raises:
        ConfigError: The criterion needs gradients, or the layers normalise the residual stream itself (OPT-350m).
    """
    if "taylor" in criterion.needs:
        raise ConfigError(
            "reconstruction='sequential' has no gradients; use criterion='obs', or another reconstruction."
        )
    if getattr(model.config, "do_layer_norm_before", True) is False:
        raise ConfigError(
            "reconstruction='sequential' needs layers that add to the residual stream; this model normalises the "
            "stream itself after each sub-layer (do_layer_norm_before=False). Use reconstruction='least_squares'."
        )


@fail_together()
@torch.no_grad()
def prune_sequentially(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    widths: Sequence[LayerWidths],
    criterion: Criterion,
    *,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
    state_dir: Path | None = None,
    memory_limit: int | None = None,
) -> SequentialResult:
    """Choose, remove and reconstruct layer by layer, each layer on the stream that the layers before it left.

    Under ``accelerate launch`` every process has to call it, with the same batches: each runs every n-th of them.

    Args:
        model: The base model; unchanged when this returns.
        batches: As for `calibrate`.
        widths: Widths after pruning, one per layer; `GONE` for a layer that is removed as a whole.
        criterion: Ranks units on the pruned stream's statistics and the reconstructed (not yet pruned) weights.
        ridge: Share of each feature's mean square.
        seed: For the `random` criterion.
        state_dir: Where finished layers are kept; a run over the same inputs resumes from there, to the same bits.
        memory_limit: Bytes of hidden states that may stay in memory, beyond which they lie in a memory-mapped file;
            None: half of the free memory.

    Raises:
        ConfigError: The criterion needs gradients, or the layers normalise the residual stream itself (OPT-350m).
        DataError: No unpadded token, or token ids beyond the embedding.
        NumericsError: NaN or Inf, with layer and sub-layer.
    """
    view = ModelView.of(model)
    check_sequential(model, criterion)
    check_weights_finite(model)
    batches = list(batches)
    checkpoint = SequentialCheckpoint(state_dir, model, batches, widths, criterion.name, ridge, seed)
    with evaluation_mode(model, inference=False):
        mine = shard(batches)
        storage = StreamStorage(count_positions(mine), limit=memory_limit, device=layer_device(model))
        streams = capture_streams(view, mine, storage, validation=choose_validation(len(batches), VALIDATION_EVERY))
        result = _count(streams)
        gone = [index for index, width in enumerate(widths) if width.gone]
        pruner = SequentialPruner(view, streams, storage, criterion, ridge, seed, gone)
        for index, done in enumerate(_finish_layers(pruner, checkpoint, widths)):
            result.layers += (done.layer,)
            result.outputs |= {(index, target): output for target, output in done.outputs.items()}
    if len(streams) == len(batches) and len({stream.pruned.shape[1] for stream in streams}) == 1:
        result.final_states = storage.room("pruned").view(-1, *streams[0].pruned.shape[1:])
    return result


def _count(streams: Sequence[Stream]) -> SequentialResult:
    """Return a result without layers yet, with the samples and tokens of all processes.

    Raises:
        DataError: There is no unpadded token.
    """
    num_samples = sum(stream.base.shape[0] for stream in streams)
    num_tokens = sum(
        stream.base[..., 0].numel() if stream.mask is None else int(stream.mask.sum()) for stream in streams
    )
    num_samples, num_tokens = sum_counts(num_samples, num_tokens)
    if not num_tokens:
        raise DataError("There is nothing to calibrate on: no batch, or every position is padding.")
    return SequentialResult(num_samples=num_samples, num_tokens=num_tokens)


def _finish_layers(
    pruner: SequentialPruner, checkpoint: SequentialCheckpoint, widths: Sequence[LayerWidths]
) -> Iterator[FinishedLayer]:
    """Prune layer after layer, or restore the layers that an earlier run finished."""
    bar, restoring = None, False
    for index, width in enumerate(widths):
        with error_context(f"layer {index}"):
            done = broadcast_object(checkpoint.load(index))  # all processes do the same
            if bar is None or (restoring and done is None):  # a second bar: the pace of the first says nothing about it
                if bar is not None:
                    bar.close()
                restoring = done is not None
                bar = _bar("Restoring finished layers" if restoring else "Pruning layers", len(widths), index)
            if done is None:
                done = checkpoint.save(index, pruner.prune(index, width))
            else:
                pruner.replay(index, done)
        yield done
        bar.update()
    if bar is not None:
        bar.close()


def _bar(description: str, total: int, done: int = 0) -> Any:  # noqa: ANN401 - huggingface_hub's tqdm
    return tqdm(total=total, initial=done, desc=description, unit="layer", name="hf_context_prune.sequential")
