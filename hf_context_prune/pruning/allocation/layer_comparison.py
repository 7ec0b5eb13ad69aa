"""The output of a model without some of its layers, against the base model's: what the choice of layers measures.

All candidates of a choice go through the layers together, so that each layer's weights are read once. A linear map
stands for each gap, by ridge regression on the base model's hidden states of other text: h + h A, with
A = (E[h h^T] + r D)^-1 E[h (g - h)^T], h before the gap, g behind it and D = diag E[h h^T].
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from hf_context_prune.errors import NumericsError
from hf_context_prune.modeling.layer_device import in_hand, layer_device
from hf_context_prune.modeling.patching import known_states
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.calibration.statistics import RegressionMoments
from hf_context_prune.pruning.reconstruction import solve_ridge
from hf_context_prune.pruning.sequential.hidden_states import Stream, StreamStorage, capture_streams, count_positions

_MAP_RIDGE = 0.03
_HEAD_TOKENS = 512
"""Tokens whose logits exist at once, one sample at least."""
_BASE, _FIRST = "base", "first"


class _Gap(NamedTuple):
    """Layers that are missing together, and the name of the states that go on behind them."""

    name: str
    first: int
    last: int


class _Text:
    """The hidden states of a text, kept under names.

    Args:
        view: The base model, in evaluation mode.
        samples: [samples, length], int64.
    """

    def __init__(self, view: ModelView, samples: torch.Tensor) -> None:
        batches = list(enumerate(batches_of(samples)))
        self.ids = [batch["input_ids"] for _, batch in batches]
        self.storage = StreamStorage(count_positions(batches), device=layer_device(view.model))
        self.streams = capture_streams(view, batches, self.storage, base_only=True)
        self.keep(_FIRST)

    def keep(self, name: str) -> None:
        """Keep the states where they are now."""
        for stream in self.streams:
            self.storage.keep(name, stream.start, stream.base)

    def kept(self, name: str, stream: Stream) -> torch.Tensor:
        """Return the kept states of one stream, to read or to move on."""
        count = stream.base[..., 0].numel()
        return self.storage.room(name)[stream.start : stream.start + count].view(stream.base.shape)

    def begin(self) -> None:
        """Go back to the states before the first layer."""
        for stream in self.streams:
            stream.base.copy_(self.kept(_FIRST, stream))


class LayerComparison:
    """The base model's output on a text, to which that of models without some layers is compared.

    Memory: the hidden states of the text once per candidate, memory-mapped where they don't fit.

    Args:
        view: The base model, in evaluation mode.
        samples: [samples, length], int64.
        mapped: Other samples, that linear maps in the place of gaps are fitted to; without any, gaps stay empty.
    """

    def __init__(self, view: ModelView, samples: torch.Tensor, mapped: torch.Tensor) -> None:
        self.view, self._tokens = view, samples.numel()
        self._compared = _Text(view, samples)
        self._mapped = _Text(view, mapped) if len(mapped) else None
        self._texts = [self._compared] if self._mapped is None else [self._compared, self._mapped]
        self._run([], [])
        self._compared.keep("dense")

    def losses(self, gone: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        """Return the loss without the layers that are gone and each of the candidates, in nats per token."""
        self._run(gone, candidates)
        losses = dict(zip(candidates, self._divergences([_without(index) for index in candidates]), strict=True))
        if bad := [index for index, loss in losses.items() if not math.isfinite(loss)]:
            raise NumericsError(
                f"The logits without layer {bad[0]} are not finite, so layers can't be compared. Load the model in "
                f"float32 (--dtype float32), or leave that layer out of removable_layers."
            )
        return losses

    def loss(self, gone: Sequence[int], fitted: Mapping[int, nn.Module]) -> float:
        """Return the loss without the layers that are gone, with others in the place of some, in nats per token."""
        self._run(gone, (), fitted)
        self._compared.keep("fitted")
        (loss,) = self._divergences(["fitted"])
        if not math.isfinite(loss):
            raise NumericsError(
                f"The logits without layers {', '.join(map(str, gone))} are not finite once layers before the gaps are "
                f"refitted. Load the model in float32 (--dtype float32), or leave layers out of units."
            )
        return loss

    def _divergences(self, names: Sequence[str]) -> list[float]:
        """Return KL(base || model) of each of the models that left hidden states, and free those."""
        totals, text = [0.0] * len(names), self._compared
        for stream, ids in zip(text.streams, text.ids, strict=True):
            size = max(1, _HEAD_TOKENS // ids.shape[1])
            for start in range(0, len(ids), size):
                part = slice(start, start + size)
                dense = torch.log_softmax(self._logits(ids[part], text.kept("dense", stream)[part]), dim=-1)
                probabilities = dense.exp()
                negative_entropy = float((probabilities * dense).sum(dim=-1).sum(dtype=torch.float64))
                for number, name in enumerate(names):
                    logits = self._logits(ids[part], text.kept(name, stream)[part])
                    expected = (probabilities * logits).sum(dim=-1) - logits.logsumexp(dim=-1)
                    totals[number] += negative_entropy - float(expected.sum(dtype=torch.float64))
        for name in names:
            text.storage.drop(name)
        return [total / self._tokens for total in totals]

    def _run(
        self, gone: Sequence[int], candidates: Sequence[int], fitted: Mapping[int, nn.Module] | None = None
    ) -> None:
        """Move the text through the layers: without those that are gone, and once more without each candidate."""
        gaps = [_Gap(_BASE, *_gap(gone, first)) for first in gone if first - 1 not in gone and fitted is None]
        gaps += [_Gap(_without(index), *_gap([*gone, index], index)) for index in candidates]
        for text in self._texts:
            text.begin()
        begun: list[str] = []
        for index, own in enumerate(self.view.layers):
            layer = own if fitted is None else fitted.get(index, own)
            mapped = self._mapped.streams if self._mapped and any(index <= gap.last for gap in gaps) else []
            streams = self._compared.streams if index not in gone else []
            self._open(gaps, index)
            if mapped or streams:  # no weight of a layer is read that nothing goes through
                with in_hand(layer, layer_device(self.view.model)):
                    for stream in mapped:
                        stream.base.copy_(stream.call(index, layer, stream.base))
                    for stream in streams:
                        for states in (stream.base, *(self._compared.kept(other, stream) for other in begun)):
                            states.copy_(stream.call(index, layer, states))
            begun += self._close(gaps, index, begun)

    def _open(self, gaps: Sequence[_Gap], index: int) -> None:
        """Keep the hidden states before the gaps that begin with a layer."""
        if any(gap.first == index for gap in gaps):
            for text in self._texts:
                text.keep(_before(index))

    def _close(self, gaps: Sequence[_Gap], index: int, begun: Sequence[str]) -> list[str]:
        """Bridge the gaps that end with a layer, and return the names of the states that begin there."""
        beginning, text = [], self._compared
        for gap in gaps:
            if gap.last != index:
                continue
            change = self._fit_map(gap.first)
            for stream in text.streams:
                if gap.name == _BASE:  # the layers of all others that have begun are missing, too
                    for states in (stream.base, *(text.kept(other, stream) for other in begun)):
                        states.copy_(_bridge(states, change))
                else:
                    before = text.kept(_before(gap.first), stream)
                    text.storage.keep(gap.name, stream.start, _bridge(before, change))
            beginning += [gap.name] if gap.name != _BASE else []
        for first in {gap.first for gap in gaps if gap.last == index}:
            if all(gap.last <= index for gap in gaps if gap.first == first):
                for one in self._texts:
                    one.storage.drop(_before(first))
        return beginning

    def _fit_map(self, first: int) -> torch.Tensor | None:
        """Return A of the gap from a layer to the present one, [hidden, hidden] float32; None without text."""
        if self._mapped is None:
            return None
        streams = self._mapped.streams
        size = streams[0].base.shape[-1]
        moments = RegressionMoments(size, size, streams[0].device, centre=False)
        for stream in streams:
            before = stream.rows(self._mapped.kept(_before(first), stream))
            moments.add(before, stream.rows(stream.base) - before)
        gram, cross = moments.second_moments()
        return solve_ridge(gram, None, [(_MAP_RIDGE, cross)]).float()

    def _logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        device = self.view.model.device
        with known_states(self.view.model, hidden.to(device)):
            logits = self.view.model(input_ids=ids.to(device), use_cache=False).logits
        return logits.float()


def _without(index: int) -> str:
    return f"without {index}"


def _bridge(states: torch.Tensor, change: torch.Tensor | None) -> torch.Tensor:
    return states if change is None else states + (states.float() @ change).to(states)


def _before(index: int) -> str:
    return f"before {index}"


def _gap(gone: Collection[int], index: int) -> tuple[int, int]:
    """Return the first and the last of the missing layers around one of them."""
    first = last = index
    while first - 1 in gone:
        first -= 1
    while last + 1 in gone:
        last += 1
    return first, last
