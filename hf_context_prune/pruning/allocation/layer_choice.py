"""Which layers go as a whole: one after the other, always the one without which the model's output changes least.

The change is KL(base || model without the layers so far and this one) of the next-token distributions, in nats per
token, measured and not estimated: a whole layer is too much for the second order that prices widths (`sensitivity`).
Every choice is followed by a new measurement, since what one layer does, another may have to do once it is gone. All
candidates of a choice go through the layers together, so each layer's weights are read once per choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.errors import BudgetError, NumericsError
from hf_context_prune.modeling.depth import leaves_attention
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.layer_device import in_hand, layer_device
from hf_context_prune.modeling.patching import known_states
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.depth import Depth
from hf_context_prune.pruning.sequential.hidden_states import Stream, StreamStorage, capture_streams, count_positions
from hf_context_prune.storage.kept_values import read_kept_values, write_kept_values
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils.distributed import on_main_process

CHOICE_TOKENS = 2048
"""Tokens that layers are compared on, in whole samples: spread over the calibration text."""
_HEAD_TOKENS = 512
"""Tokens whose logits exist at once, one sample at least."""
_NAME = "hf_context_prune.layers"

Choice = tuple[int, float]
"""A chosen layer, and the loss without it and those before it."""


def choose_layers(
    model: PreTrainedModel,
    samples: torch.Tensor,
    count: int,
    candidates: Sequence[int],
    *,
    state_dir: Path | None = None,
) -> Depth:
    """Choose the layers that are removed as a whole.

    Under ``accelerate launch``, the main process measures for all.

    Args:
        model: The base model; runs in evaluation mode, and is unchanged when this returns.
        samples: Calibration samples, [samples, length], int64; `CHOICE_TOKENS` of them are read.
        count: How many layers go.
        candidates: Numbers of the layers that may.
        state_dir: Where finished choices are kept; the same search, once interrupted, goes on from there.

    Returns:
        The layers in the order of their choice, each with the loss without it and those before.

    Raises:
        BudgetError: So many can't go, since a layer with attention must stay.
        NumericsError: A logit is NaN or Inf.
        SaveError: A choice can't be written.
    """
    number = max(1, min(len(samples), CHOICE_TOKENS // samples.shape[1]))
    probe = samples[torch.arange(1, number + 1) * len(samples) // number - 1]
    view = ModelView.of(model)
    path, key = None, ""
    if state_dir is not None:
        key = resume_key(model, [{"probe": probe}], "layers", count, tuple(candidates))
        path = state_dir / f"removed-layers-{key[:16]}.json"

    def search() -> list[Choice]:
        kept = None if path is None else read_kept_values(path, key)
        known: list[Choice] = [(int(index), float(loss)) for index, loss in kept or ()]
        check_weights_finite(model)
        with evaluation_mode(model, inference=False), torch.no_grad():
            comparison = _Comparison(view, probe) if len(known) < count else None
            bar = tqdm(total=count, initial=len(known), desc="Choosing layers", unit="layer", name=_NAME)
            with bar:
                while comparison is not None and len(known) < count:
                    gone = [index for index, _ in known]
                    known.append(_cheapest(comparison.losses(gone, _left(view, candidates, gone)), count, gone))
                    if path is not None:
                        write_kept_values(path, known, key, what="chosen layers")
                    bar.update()
        return known

    found = on_main_process(search)
    return Depth(len(view.widths), tuple(index for index, _ in found), tuple(loss for _, loss in found))


def _left(view: ModelView, candidates: Sequence[int], gone: Sequence[int]) -> list[int]:
    """Return the candidates that may still go."""
    stay = set(range(len(view.widths))) - set(gone)
    return [index for index in candidates if index in stay and leaves_attention(view.model.config, stay - {index})]


def _cheapest(losses: dict[int, float], count: int, gone: Sequence[int]) -> Choice:
    if not losses:
        raise BudgetError(
            f"Of the layers that may be removed, {len(gone)} can go, not {count}: one layer with attention must stay. "
            f"Ask for fewer."
        )
    return min(losses.items(), key=lambda choice: (choice[1], choice[0]))


class _Comparison:
    """The base model's output on a text, to which that of models without some layers is compared.

    Memory: the hidden states of the text once per candidate, memory-mapped where they don't fit.

    Args:
        view: The base model, in evaluation mode.
        samples: [samples, length], int64.
    """

    def __init__(self, view: ModelView, samples: torch.Tensor) -> None:
        self.view, self._tokens = view, samples.numel()
        batches = list(enumerate(batches_of(samples)))
        self._ids = [batch["input_ids"] for _, batch in batches]
        self._storage = StreamStorage(count_positions(batches), device=layer_device(view.model))
        self._streams = capture_streams(view, batches, self._storage, base_only=True)
        for stream in self._streams:
            self._storage.keep("first", stream.start, stream.base)
        self._run([], [])
        for stream in self._streams:
            self._storage.keep("dense", stream.start, stream.base)

    def losses(self, gone: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        """Return the loss without the layers that are gone and each of the candidates, in nats per token."""
        self._run(gone, candidates)
        totals = dict.fromkeys(candidates, 0.0)
        for stream, ids in zip(self._streams, self._ids, strict=True):
            size = max(1, _HEAD_TOKENS // ids.shape[1])
            for start in range(0, len(ids), size):
                part = slice(start, start + size)
                dense = torch.log_softmax(self._logits(ids[part], self._kept("dense", stream)[part]), dim=-1)
                probabilities = dense.exp()
                negative_entropy = float((probabilities * dense).sum(dim=-1).sum(dtype=torch.float64))
                for index in candidates:
                    logits = self._logits(ids[part], self._kept(_without(index), stream)[part])
                    expected = (probabilities * logits).sum(dim=-1) - logits.logsumexp(dim=-1)
                    totals[index] += negative_entropy - float(expected.sum(dtype=torch.float64))
        losses = {index: total / self._tokens for index, total in totals.items()}
        if bad := [index for index, loss in losses.items() if not math.isfinite(loss)]:
            raise NumericsError(
                f"The logits without layer {bad[0]} are not finite, so layers can't be compared. Load the model in "
                f"float32 (--dtype float32), or leave that layer out of removable_layers."
            )
        return losses

    def _run(self, gone: Sequence[int], candidates: Sequence[int]) -> None:
        """Move the text through the layers: without those that are gone, and once more without each candidate."""
        for stream in self._streams:
            stream.base.copy_(self._kept("first", stream))
        begun: list[int] = []
        for index, layer in enumerate(self.view.layers):
            if index in gone:
                continue
            with in_hand(layer, layer_device(self.view.model)):
                for stream in self._streams:
                    if index in candidates:
                        self._storage.keep(_without(index), stream.start, stream.base)
                    for states in (stream.base, *(self._kept(_without(other), stream) for other in begun)):
                        states.copy_(stream.call(index, layer, states))
            begun += [index] if index in candidates else []

    def _kept(self, name: str, stream: Stream) -> torch.Tensor:
        count = stream.base[..., 0].numel()
        return self._storage.room(name)[stream.start : stream.start + count].view(stream.base.shape)

    def _logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        device = self.view.model.device
        with known_states(self.view.model, hidden.to(device)):
            logits = self.view.model(input_ids=ids.to(device), use_cache=False).logits
        return logits.float()


def _without(index: int) -> str:
    return f"without {index}"
