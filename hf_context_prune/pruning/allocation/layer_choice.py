"""Which layers go as a whole: one after the other, always the one without which the model's output changes least.

The change is KL(base || model without the layers so far and this one) of the next-token distributions, in nats per
token, measured and not estimated: a whole layer is too much for the second order that prices widths (`sensitivity`).
Every choice is followed by a new measurement, since what one layer does, another may have to do once it is gone.

What is lost in the end is less: the layers before the gaps make up for a part, and for more of some layers than of
others. So a linear map stands for each gap meanwhile (`layer_comparison`). Where layers are held against other units,
the layers before the gaps are really refitted, and the repaired model is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.depth import why_not_shortened
from hf_context_prune.modeling.geometry import GONE
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.criteria import get_criterion
from hf_context_prune.pruning.depth import Depth
from hf_context_prune.pruning.sequential.prune import SequentialResult, prune_sequentially
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.kept_values import read_kept_values, write_kept_values
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils.distributed import is_main_process, on_main_process

from .layer_comparison import LayerComparison

CHOICE_TOKENS = 2048
"""Tokens that layers are compared on, in whole samples: spread over the calibration text."""
MAP_TOKENS = 8192
"""Tokens that the linear map in the place of a gap is fitted to."""
REPAIR_TOKENS = 16_384
"""Tokens that the layers before removed ones are refitted to, to know what those cost once repaired."""
_NAME = "hf_context_prune.layers"

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
        self._comparison: LayerComparison | None = None  # of the main process, once it has to measure
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
            BudgetError: So many can't go one after the other.
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
            losses = self._compare().losses(gone, _left(self.view, self._candidates, gone, count))
        return _cheapest(losses, count, gone)

    def _loss_of(self, depth: Depth, walked: SequentialResult) -> float:
        model = self.view.model
        smaller = apply_plan(model, depth.plan(model), reconstruct=walked.reconstruct, share=True)
        layers = zip(depth.kept, ModelView.of(smaller).layers, strict=True)
        fitted = {index: layer for index, layer in layers if (index, "mlp") in walked.outputs}
        with evaluation_mode(model, inference=False), evaluation_mode(smaller, inference=False), torch.no_grad():
            return self._compare().loss(depth.order, fitted)

    def _compare(self) -> LayerComparison:
        if self._comparison is None:
            check_weights_finite(self.view.model)
            count = min(len(self._fitted), max(1, MAP_TOKENS // self._probe.shape[1]))
            mapped = [index * len(self._fitted) // count for index in range(count)]
            self._comparison = LayerComparison(self.view, self._probe, self._fitted[mapped])
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
        BudgetError: So many can't go one after the other.
        NumericsError: A logit is NaN or Inf.
        SaveError: A choice can't be written.
    """
    return LayerOrder(model, samples, candidates, state_dir=state_dir).depth(count)


def _left(view: ModelView, candidates: Sequence[int], gone: Sequence[int], count: int) -> list[int]:
    """Return the candidates that may still go: those without which there is a model, unless all of them go."""
    stay = set(range(len(view.widths))) - set(gone)
    left = [index for index in candidates if index in stay]
    config, last = view.model.config, stay - set(left)
    if count == len(candidates) and last and why_not_shortened(config, view.spec, last) is None:
        return left
    return [index for index in left if why_not_shortened(config, view.spec, stay - {index}) is None]


def _cheapest(losses: dict[int, float], count: int, gone: Sequence[int]) -> Choice:
    if not losses:
        raise BudgetError(
            f"Of the layers that may be removed, {len(gone)} can go one after the other, not {count}: without another "
            f"one there is no such model. Ask for fewer."
        )
    return min(losses.items(), key=lambda choice: (choice[1], choice[0]))
