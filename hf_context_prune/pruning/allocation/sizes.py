"""One budget for tokens, neurons and KV groups: measured curves -> the sizes that cost least. Pure: no model, no data.

The same curves give two answers: sizes that may differ by layer, and one width for all layers, which the native
architecture can hold. The second is preferred where it costs next to nothing, since its result opens everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_context_prune.config import NATIVE_TOLERANCE
from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.geometry import Geometry, LayerWidths, widths_vary
from hf_context_prune.pruning.calibration.statistics import Key
from hf_context_prune.utils.rounding import six_digits

from .adaptive import Multiples, cheapest_counts, loss_on_hull, most_removable, predicted_loss, widths_of
from .budget import Costs, Curve

TOKENS: Key = (0, "tokens")
"""Key of the curve of the vocabulary, beside those of (layer, target)."""


@dataclass(frozen=True)
class Sizes:
    """What stays of a model.

    Attributes:
        tokens: Rows of the embedding.
        widths: Widths, one entry per layer.
        loss: Predicted loss increase, in nats per token of the base tokenizer.
    """

    tokens: int
    widths: tuple[LayerWidths, ...]
    loss: float


@dataclass(frozen=True)
class UnitCurves:
    """What every kind of unit costs, and what its removal saves.

    Attributes:
        curves: Measured loss increase by kept units, by (layer, target), and by `TOKENS`. Units without a curve stay.
        geometry: Sizes of the model's layers.
        rows: Rows of its embedding.
        costs: Parameters per unit, by target.
        multiples: What counts stay multiples of, by target.
        base_loss: Loss of the base model on the text of the curves, in nats per token; None where it is not known.
        padding: Rows beyond the tokenizer's.
        factors: How many times the width of the config each layer has in neurons; empty: once.
    """

    curves: Mapping[Key, Curve]
    geometry: Geometry
    rows: int
    costs: Costs
    multiples: Multiples
    base_loss: float | None = None
    padding: int = 0
    factors: tuple[int, ...] = ()

    @property
    def most_removable(self) -> int:
        """The most parameters that sizes which differ by layer can remove."""
        return most_removable(self.curves, self.costs, self.multiples)

    def most_removable_native(self, groups: Collection[int]) -> int:
        """Return the most parameters that one width for all layers can remove, with tokens; 0 where widths differ."""
        if (first := self._common_widths) is None:
            return 0
        layers, heads = self._num_widths, self._count("attention")
        neurons, kept = int(self._allowed_neurons(first.neurons)[-1]), min(self._allowed_groups(groups))
        gone = layers * (first.neurons - neurons) * self.costs["mlp"]
        gone += heads * (first.kv_groups - kept) * self.costs["attention"]
        tokens = {TOKENS: self.curves[TOKENS]} if TOKENS in self.curves else {}
        return gone + most_removable(tokens, self.costs, self.multiples)

    def cheapest(self, remove_params: int) -> Sizes:
        """Return the sizes that remove a budget for the least predicted loss.

        Raises:
            BudgetError: The curves do not reach that far.
        """
        counts = cheapest_counts(self.curves, self.costs, self.multiples, remove_params)
        return self.sizes(counts.get(TOKENS, self.rows), widths_of(counts, self.geometry))

    def without_layers(self, gone: Collection[int]) -> UnitCurves:
        """Return the curves of the model without some layers, as they were measured with all of them."""
        kept = [index for index in range(len(self.geometry.layers)) if index not in gone]
        new = {old: number for number, old in enumerate(kept)}
        curves = {
            key if key == TOKENS else (new[key[0]], key[1]): curve
            for key, curve in self.curves.items()
            if key == TOKENS or key[0] in new
        }
        return replace(
            self,
            curves=curves,
            geometry=replace(self.geometry, layers=tuple(self.geometry.layers[index] for index in kept)),
            factors=tuple(self.factors[index] for index in kept) if self.factors else (),
        )

    def least_loss(
        self, remove_params: int, native: bool | None, groups: Collection[int], *, repaired: float = 1.0
    ) -> float:
        """Return the predicted loss of what [`choose`][] takes for a budget; inf where it can't be reached.

        Args:
            remove_params: As for `choose`.
            native: As for `choose`.
            groups: As for `choose`.
            repaired: Share of the loss of neurons and KV groups that is left, where they are repaired better than the
                curves know.
        """
        if remove_params > (self.most_removable_native(groups) if native else self.most_removable):
            return math.inf
        found = self.choose(remove_params, native, groups)[0]
        tokens = self.token_loss(found.tokens)
        return tokens + repaired * (found.loss - tokens)

    def sizes(self, tokens: int, widths: tuple[LayerWidths, ...]) -> Sizes:
        """Return these sizes with their predicted loss; of padding, which costs nothing, all goes or nothing."""
        if TOKENS in self.curves and tokens < self.rows:
            tokens = min(tokens, self.rows - self.padding)
        loss = predicted_loss({key: curve for key, curve in self.curves.items() if key != TOKENS}, widths)
        return Sizes(tokens, widths, loss + self.token_loss(tokens))

    def token_loss(self, tokens: int) -> float:
        """Return the predicted loss of a vocabulary of this size."""
        return loss_on_hull(self.curves[TOKENS], [self.rows - tokens])[0] if TOKENS in self.curves else 0.0

    def cheapest_native(self, remove_params: int, groups: Collection[int]) -> Sizes | None:
        """Return the sizes with one width for all layers that remove a budget for the least predicted loss.

        Args:
            remove_params: Parameters to remove at least.
            groups: KV groups per layer that the native architecture accepts.

        Returns:
            The sizes; None where no such sizes remove as much.
        """
        if (first := self._common_widths) is None:
            return None
        layers, heads = self._num_widths, self._count("attention")
        neurons = self._allowed_neurons(first.neurons)
        by_width = self._loss_in_all_layers("mlp", first.neurons, neurons)
        best: tuple[float, Sizes] | None = None
        for kept in self._allowed_groups(groups):
            loss = self._loss_in_all_layers("attention", first.kv_groups, np.array([kept])) + by_width
            gone = layers * (first.neurons - neurons) * self.costs["mlp"]
            gone = gone + heads * (first.kv_groups - kept) * self.costs["attention"]
            tokens, token_loss = self._tokens_for(np.maximum(remove_params - gone, 0))
            loss = loss + token_loss
            place = int(loss.argmin())
            if np.isfinite(loss[place]) and (best is None or loss[place] < best[0]):
                widths = tuple(
                    replace(
                        layer,
                        neurons=self._factor(index) * int(neurons[place]) if layer.neurons else 0,
                        kv_groups=kept if layer.kv_groups else 0,
                    )
                    for index, layer in enumerate(self.geometry.layers)
                )
                best = float(loss[place]), self.sizes(int(tokens[place]), widths)
        return None if best is None else best[1]

    def _count(self, target: str) -> int:
        """Return how many layers have units of a target."""
        return sum(bool(layer.of(target)) for layer in self.geometry.layers)

    def _factor(self, layer: int, target: str = "mlp") -> int:
        """Return how many units of a target a layer has for each of its width."""
        return self.factors[layer] if self.factors and target == "mlp" else 1

    @property
    def _num_widths(self) -> int:
        """Layers with neurons, one of doubled width counted twice."""
        return sum(self._factor(index) for index, layer in enumerate(self.geometry.layers) if layer.neurons)

    @property
    def _common_widths(self) -> LayerWidths | None:
        """Neurons of single width and KV groups that all layers have which have any; None where they differ."""
        layers = [
            replace(layer, neurons=layer.neurons // self._factor(index))
            for index, layer in enumerate(self.geometry.layers)
        ]
        most = max(layer.kv_groups for layer in layers)
        return None if widths_vary(layers) else LayerWidths(max(layer.neurons for layer in layers), most)

    def _allowed_neurons(self, total: int) -> np.ndarray:
        """Return the widths that all layers may have, widest first."""
        multiple = self.multiples.get("mlp", 1)
        fewest = max(self._fewest("mlp", total), 1)
        return np.array([total, *range((total - 1) // multiple * multiple, fewest - 1, -multiple)])

    def _allowed_groups(self, groups: Collection[int]) -> list[int]:
        """Return the KV groups that all layers may have, most first."""
        total = max(layer.kv_groups for layer in self.geometry.layers)
        fewest = self._fewest("attention", total)
        return [total, *sorted((count for count in groups if fewest <= count < total), reverse=True)]

    def _fewest(self, target: str, total: int) -> int:
        """Return the smallest size of a target that was measured in every layer."""
        layers = [index for index, widths in enumerate(self.geometry.layers) if widths.of(target)]
        measured = [
            -(-self.curves[layer, target][-1][0] // self._factor(layer, target))
            if (layer, target) in self.curves
            else total
            for layer in layers
        ]
        return max(measured, default=total)

    def _loss_in_all_layers(self, target: str, total: int, kept: np.ndarray) -> np.ndarray:
        """Return the sum over layers of the predicted loss at each size."""
        loss = np.zeros(len(kept))
        for key, curve in self.curves.items():
            if key[1] == target:
                loss += loss_on_hull(curve, list(self._factor(key[0], target) * (total - kept)))
        return loss

    def _tokens_for(self, remove_params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that stay where tokens give these parameters, and their loss (inf where they can't)."""
        tokens = np.full(len(remove_params), self.rows)
        if TOKENS not in self.curves:
            return tokens, np.where(remove_params > 0, np.inf, 0.0)
        curve, multiple = self.curves[TOKENS], self.multiples.get("tokens", 1)
        most = self.rows - np.ceil(remove_params / self.costs["tokens"]).astype(int)
        tokens = np.where(remove_params > 0, most // multiple * multiple, tokens)
        loss = np.array(loss_on_hull(curve, list(self.rows - tokens)))
        return tokens, np.where(tokens < max(curve[-1][0], 1), np.inf, loss)

    def choose(self, remove_params: int, native: bool | None, groups: Collection[int]) -> tuple[Sizes, dict[str, Any]]:
        """Return the best sizes for a budget, of the native architecture where that costs next to nothing.

        Args:
            remove_params: Parameters to remove at least.
            native: True: the native architecture alone; False: not for its own sake; None: where it is predicted to
                cost at most `NATIVE_TOLERANCE` of the base model's loss more.
            groups: As for [`cheapest_native`][hf_context_prune.pruning.allocation.sizes.UnitCurves.cheapest_native].

        Returns:
            (sizes, predicted losses of both as facts for the provenance).

        Raises:
            BudgetError: The budget can't be reached.
        """
        alike = None if native is False else self.cheapest_native(remove_params, groups)
        if native:
            if alike is None:
                raise BudgetError(
                    f"Asked to remove {remove_params:,} parameters, but the native architecture with one width for all "
                    f"layers can't: its config refuses the widths that would, or no layer may become so narrow. Ask "
                    f"for less, or leave out --native-architecture."
                )
            return alike, {"native": six_digits(alike.loss)}
        free = self.cheapest(remove_params)
        facts: dict[str, Any] = {"variable": six_digits(free.loss)}
        if self.base_loss is not None:
            facts["base"] = six_digits(self.base_loss)
        if alike is None:
            return free, facts
        facts["native"] = six_digits(alike.loss)
        tolerated = NATIVE_TOLERANCE * self.base_loss if self.base_loss is not None else 0.0
        return (alike if alike.loss - free.loss <= tolerated else free), facts


def plain_curves(curves: Mapping[Key, Curve], layers: Sequence[int] | None = None) -> dict[str, Any]:
    """Return curves as plain values: {"layer.target" or "tokens": [[kept units, nats per token], ...]}.

    Args:
        curves: The curves.
        layers: Numbers of the layers in the base model, where some of those are gone.
    """
    return {
        "tokens" if key == TOKENS else f"{layers[key[0]] if layers else key[0]}.{key[1]}": [
            [kept, six_digits(loss)] for kept, loss in curve
        ]
        for key, curve in curves.items()
    }
