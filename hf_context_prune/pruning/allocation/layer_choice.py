"""Which layers go as a whole: one after the other, always the one without which the model's output changes least.

The change is KL(base || model without the layers so far and this one) of the next-token distributions, in nats per
token, measured and not estimated: a whole layer is too much for the second order that prices widths (`sensitivity`).
Every choice is followed by a new measurement, since what one layer does, another may have to do once it is gone. All
candidates of a choice go through the layers together, so each layer's weights are read once per choice.

What is lost in the end is less: the layers before the gaps make up for a part, and for more of some layers than of
others. So a linear map stands for each gap meanwhile, by ridge regression on the base model's hidden states of other
text: h + h A, with A = (E[h h^T] + r D)^-1 E[h (g - h)^T], h before the gap, g behind it and D = diag E[h h^T]. Where
layers are held against other units, the layers before the gaps are really refitted, and the repaired model is measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import BudgetError, NumericsError
from hf_context_prune.modeling.depth import leaves_attention
from hf_context_prune.modeling.geometry import GONE
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.layer_device import in_hand, layer_device
from hf_context_prune.modeling.patching import known_states
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.calibration.statistics import RegressionMoments
from hf_context_prune.pruning.criteria import get_criterion
from hf_context_prune.pruning.depth import Depth
from hf_context_prune.pruning.reconstruction import solve_ridge
from hf_context_prune.pruning.sequential.hidden_states import Stream, StreamStorage, capture_streams, count_positions
from hf_context_prune.pruning.sequential.prune import SequentialResult, prune_sequentially
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.kept_values import read_kept_values, write_kept_values
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils.distributed import is_main_process, on_main_process

CHOICE_TOKENS = 2048
"""Tokens that layers are compared on, in whole samples: spread over the calibration text."""
MAP_TOKENS = 8192
"""Tokens that the linear map in the place of a gap is fitted to."""
_MAP_RIDGE = 0.03
REPAIR_TOKENS = 16_384
"""Tokens that the layers before removed ones are refitted to, to know what those cost once repaired."""
_HEAD_TOKENS = 512
"""Tokens whose logits exist at once, one sample at least."""
_NAME, _BASE = "hf_context_prune.layers", "base"

Choice = tuple[int, float]
"""A chosen layer, and the loss without it and those before it."""


class LayerOrder:
    """The order in which layers go, as far as it is asked for, and what the model loses without the first of them.

    Under ``accelerate launch``, all processes ask for the same; the main process measures for all, and all repair.

    Args:
        model: The base model; runs in evaluation mode, and is unchanged.
        samples: Calibration samples, [samples, length], int64; layers are compared on `CHOICE_TOKENS` of them.
        candidates: Numbers of the layers that may go.
        state_dir: Where what was measured is kept; the same search, once interrupted, goes on from there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        samples: torch.Tensor,
        candidates: Sequence[int],
        *,
        state_dir: Path | None = None,
    ) -> None:
        self.view, self._candidates = ModelView.of(model), tuple(candidates)
        number = max(1, min(len(samples), CHOICE_TOKENS // samples.shape[1]))
        places = torch.arange(1, number + 1) * len(samples) // number - 1
        self._probe, others = samples[places], sorted({*range(len(samples))} - {*places.tolist()})
        count = min(len(others), max(1, REPAIR_TOKENS // samples.shape[1]))
        self._fitted = samples[[others[index * len(others) // count] for index in range(count)]]
        self._path, self._key = None, ""
        self._comparison: _Comparison | None = None  # of the main process, once it has to measure
        self._found: list[Choice] = []
        self._repaired: dict[int, float] = {}
        if state_dir is not None:
            texts = {"probe": self._probe, "fitted": self._fitted}
            self._key = resume_key(model, [texts], "mapped layers", self._candidates)
            self._path = path = state_dir / f"removed-layers-{self._key[:16]}.json"
            kept = on_main_process(lambda: read_kept_values(path, self._key)) or {}
            self._found = [(int(index), float(loss)) for index, loss in kept.get("chosen", ())]
            self._repaired = {int(count): float(loss) for count, loss in kept.get("repaired", ())}

    def depth(self, count: int) -> Depth:
        """Return the first layers of the order, each with the loss without it and those before, in nats per token.

        Args:
            count: How many layers go.

        Raises:
            BudgetError: So many can't go, since a layer with attention must stay.
            NumericsError: A logit is NaN or Inf.
            SaveError: A choice can't be written.
        """
        if len(self._found) < count:
            bar = tqdm(total=count, initial=len(self._found), desc="Choosing layers", unit="layer", name=_NAME)
            with bar:
                while len(self._found) < count:
                    self._found.append(on_main_process(lambda: self._next(count)))
                    self._keep()
                    bar.update()
        found = self._found[:count]
        return Depth(len(self.view.widths), tuple(index for index, _ in found), tuple(loss for _, loss in found))

    def repaired_loss(self, count: int) -> float:
        """Return KL(base || model without the first layers, repaired), in nats per token.

        Repaired are the MLPs before the gaps, as sequential reconstruction does it, on `REPAIR_TOKENS` of text that the
        loss is not measured on: the order's own losses, without it, are about twice as high. Where there is no such
        text, they have to do.

        Args:
            count: How many layers go; 0: none, without a loss.

        Raises:
            ContextPruneError: See [`prune_sequentially`][].
        """
        depth = self.depth(count)
        if not count or not len(self._fitted):
            return depth.losses[-1] if count else 0.0
        if count not in self._repaired:
            widths = depth.expand([self.view.widths[index] for index in depth.kept], GONE)
            batches = [{"input_ids": sample} for sample in self._fitted.split(1)]  # some of them choose ridges
            # No unit is chosen, so the criterion does not matter.
            walked = prune_sequentially(self.view.model, batches, widths, get_criterion("obs"))
            self._repaired[count] = on_main_process(lambda: self._loss_of(depth, walked))
            self._keep()
        return self._repaired[count]

    def _next(self, count: int) -> Choice:
        gone = [index for index, _ in self._found]
        with evaluation_mode(self.view.model, inference=False), torch.no_grad():
            losses = self._compare().losses(gone, _left(self.view, self._candidates, gone))
        return _cheapest(losses, count, gone)

    def _loss_of(self, depth: Depth, walked: SequentialResult) -> float:
        model = self.view.model
        smaller = apply_plan(model, depth.plan(model), reconstruct=walked.reconstruct, share=True)
        layers = zip(depth.kept, ModelView.of(smaller).layers, strict=True)
        fitted = {index: layer for index, layer in layers if (index, "mlp") in walked.outputs}
        with evaluation_mode(model, inference=False), evaluation_mode(smaller, inference=False), torch.no_grad():
            return self._compare().loss(depth.order, fitted)

    def _compare(self) -> _Comparison:
        if self._comparison is None:
            check_weights_finite(self.view.model)
            count = min(len(self._fitted), max(1, MAP_TOKENS // self._probe.shape[1]))
            mapped = [index * len(self._fitted) // count for index in range(count)]
            self._comparison = _Comparison(self.view, self._probe, self._fitted[mapped])
        return self._comparison

    def _keep(self) -> None:
        if self._path is None or not is_main_process():
            return
        values = {"chosen": self._found, "repaired": list(self._repaired.items())}
        write_kept_values(self._path, values, self._key, what="chosen layers")


def choose_layers(
    model: PreTrainedModel,
    samples: torch.Tensor,
    count: int,
    candidates: Sequence[int],
    *,
    state_dir: Path | None = None,
) -> Depth:
    """Choose the layers that are removed as a whole: the first ones of a [`LayerOrder`][].

    Args:
        model: As for [`LayerOrder`][].
        samples: As for [`LayerOrder`][].
        count: How many layers go.
        candidates: As for [`LayerOrder`][].
        state_dir: As for [`LayerOrder`][].

    Returns:
        The layers in the order of their choice, each with the loss without it and those before.

    Raises:
        BudgetError: So many can't go, since a layer with attention must stay.
        NumericsError: A logit is NaN or Inf.
        SaveError: A choice can't be written.
    """
    return LayerOrder(model, samples, candidates, state_dir=state_dir).depth(count)


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


class _Gap(NamedTuple):
    """Layers that are missing together, and the name of the states that go on behind them."""

    name: str
    first: int
    last: int


class _Comparison:
    """The base model's output on a text, to which that of models without some layers is compared.

    Memory: the hidden states of the text once per candidate, memory-mapped where they don't fit.

    Args:
        view: The base model, in evaluation mode.
        samples: [samples, length], int64.
        mapped: Other samples, that linear maps in the place of gaps are fitted to; without any, gaps stay empty.
    """

    def __init__(self, view: ModelView, samples: torch.Tensor, mapped: torch.Tensor) -> None:
        self.view, self._tokens = view, samples.numel()
        batches = list(enumerate(batches_of(samples)))
        self._ids = [batch["input_ids"] for _, batch in batches]
        self._storage = StreamStorage(count_positions(batches), device=layer_device(view.model))
        self._streams = capture_streams(view, batches, self._storage, base_only=True)
        for stream in self._streams:
            self._storage.keep("first", stream.start, stream.base)
        self._mapped, self._mapped_storage = [], None
        if len(mapped):
            batches = list(enumerate(batches_of(mapped)))
            self._mapped_storage = StreamStorage(count_positions(batches), device=layer_device(view.model))
            self._mapped = capture_streams(view, batches, self._mapped_storage, base_only=True)
            for stream in self._mapped:
                self._mapped_storage.keep("first", stream.start, stream.base)
        self._run([], [])
        for stream in self._streams:
            self._storage.keep("dense", stream.start, stream.base)

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
        for stream in self._streams:
            self._storage.keep("fitted", stream.start, stream.base)
        (loss,) = self._divergences(["fitted"])
        if not math.isfinite(loss):
            raise NumericsError(
                f"The logits without layers {', '.join(map(str, gone))} are not finite once layers before the gaps are "
                f"refitted. Load the model in float32 (--dtype float32), or leave layers out of units."
            )
        return loss

    def _divergences(self, names: Sequence[str]) -> list[float]:
        """Return KL(base || model) of each of the models that left hidden states, and free those."""
        totals = [0.0] * len(names)
        for stream, ids in zip(self._streams, self._ids, strict=True):
            size = max(1, _HEAD_TOKENS // ids.shape[1])
            for start in range(0, len(ids), size):
                part = slice(start, start + size)
                dense = torch.log_softmax(self._logits(ids[part], self._kept("dense", stream)[part]), dim=-1)
                probabilities = dense.exp()
                negative_entropy = float((probabilities * dense).sum(dim=-1).sum(dtype=torch.float64))
                for number, name in enumerate(names):
                    logits = self._logits(ids[part], self._kept(name, stream)[part])
                    expected = (probabilities * logits).sum(dim=-1) - logits.logsumexp(dim=-1)
                    totals[number] += negative_entropy - float(expected.sum(dtype=torch.float64))
        for name in names:
            self._storage.drop(name)
        return [total / self._tokens for total in totals]

    def _run(
        self, gone: Sequence[int], candidates: Sequence[int], fitted: Mapping[int, nn.Module] | None = None
    ) -> None:
        """Move the text through the layers: without those that are gone, and once more without each candidate."""
        gaps = [_Gap(_BASE, *_gap(gone, first)) for first in gone if first - 1 not in gone and fitted is None]
        gaps += [_Gap(_without(index), *_gap([*gone, index], index)) for index in candidates]
        for storage, streams in self._texts():
            for stream in streams:
                stream.base.copy_(_kept(storage, "first", stream))
        begun: list[str] = []
        for index, own in enumerate(self.view.layers):
            layer = own if fitted is None else fitted.get(index, own)
            mapped = self._mapped if any(index <= gap.last for gap in gaps) else []
            streams = self._streams if index not in gone else []
            self._open(gaps, index)
            if mapped or streams:  # no weight of a layer is read that nothing goes through
                with in_hand(layer, layer_device(self.view.model)):
                    for stream in mapped:
                        stream.base.copy_(stream.call(index, layer, stream.base))
                    for stream in streams:
                        for states in (stream.base, *(self._kept(other, stream) for other in begun)):
                            states.copy_(stream.call(index, layer, states))
            begun += self._close(gaps, index, begun)

    def _texts(self) -> list[tuple[StreamStorage, list[Stream]]]:
        found = [(self._storage, self._streams)]
        return found if self._mapped_storage is None else [*found, (self._mapped_storage, self._mapped)]

    def _open(self, gaps: Sequence[_Gap], index: int) -> None:
        """Keep the hidden states before the gaps that begin with a layer."""
        if any(gap.first == index for gap in gaps):
            for storage, streams in self._texts():
                for stream in streams:
                    storage.keep(_before(index), stream.start, stream.base)

    def _close(self, gaps: Sequence[_Gap], index: int, begun: Sequence[str]) -> list[str]:
        """Bridge the gaps that end with a layer, and return the names of the states that begin there."""
        beginning = []
        for gap in gaps:
            if gap.last != index:
                continue
            change = self._fit_map(gap.first)
            for stream in self._streams:
                if gap.name == _BASE:  # the layers of all others that have begun are missing, too
                    for states in (stream.base, *(self._kept(other, stream) for other in begun)):
                        states.copy_(_bridge(states, change))
                else:
                    before = self._kept(_before(gap.first), stream)
                    self._storage.keep(gap.name, stream.start, _bridge(before, change))
            beginning += [gap.name] if gap.name != _BASE else []
        for first in {gap.first for gap in gaps if gap.last == index}:
            if all(gap.last <= index for gap in gaps if gap.first == first):
                for storage, _ in self._texts():
                    storage.drop(_before(first))
        return beginning

    def _fit_map(self, first: int) -> torch.Tensor | None:
        """Return A of the gap from a layer to the present one, [hidden, hidden] float32; None without text."""
        if self._mapped_storage is None:
            return None
        size = self._mapped[0].base.shape[-1]
        moments = RegressionMoments(size, size, self._mapped[0].device, centre=False)
        for stream in self._mapped:
            before = stream.rows(_kept(self._mapped_storage, _before(first), stream))
            moments.add(before, stream.rows(stream.base) - before)
        gram, cross = moments.second_moments()
        return solve_ridge(gram, None, [(_MAP_RIDGE, cross)]).float()

    def _kept(self, name: str, stream: Stream) -> torch.Tensor:
        return _kept(self._storage, name, stream)

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


def _kept(storage: StreamStorage, name: str, stream: Stream) -> torch.Tensor:
    count = stream.base[..., 0].numel()
    return storage.room(name)[stream.start : stream.start + count].view(stream.base.shape)
