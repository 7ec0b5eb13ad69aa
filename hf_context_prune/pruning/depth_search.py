"""Whole layers as a unit of the shared budget: it decides how many go, by what they cost and what they leave to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.allocation.depth_choice import choose_depth
from hf_context_prune.pruning.allocation.layer_choice import LayerOrder
from hf_context_prune.pruning.allocation.sizes import UnitCurves
from hf_context_prune.utils.rounding import six_digits

from .model_builder import ModelBuilder, ModelSize, PrunedModel
from .unit_curves import TokenProbe, measure_units

_BEYOND = 2.0
"""How many times the allowed loss layers may cost alone to be looked at: predictions are not more wrong than that."""
_REPAIRED = 0.7
"""What sequential reconstruction leaves of the loss that the curves predict, which know the repair by one pass alone:
0.35 / 0.50 at 25 %, 0.30 / 0.43 at 50 % of the neurons. The price of layers is that of the repaired model, so the other
units are held against it as repaired."""
_REFIT_GAIN = 0.25
"""What refitting the rows of the LM head gives back, in nats per token (0.14 with 20 % gone of the layers of
SmolLM2-135M on medicine, 0.23 if tokens go as well): layers may cost that much more than the loss that is allowed."""


class DepthSearch:
    """Builds smaller forms of a model, as a [`ModelBuilder`][] does, with as many layers as a budget is best spent on.

    The number is chosen by the curves that were measured with all layers; where layers go, the other units are measured
    again without them.

    Args:
        whole: Builds forms with all layers, of units that were measured; those of its config may be layers alone.
        order: The order in which layers go.
        most: Most layers that may go.
        probe: As for `prune_model`.
    """

    def __init__(self, whole: ModelBuilder, order: LayerOrder, most: int, probe: TokenProbe | None) -> None:
        assert whole.measured is not None
        self.whole, self.order, self.most, self.probe = whole, order, most, probe
        self.model, self.tokenizer, self.total = whole.model, whole.tokenizer, whole.total
        self.base_loss, self._units = whole.base_loss, whole.measured
        self._sequential = whole.config.reconstruction == "sequential"
        self._repaired = _REPAIRED if self._sequential else 1.0
        self._builders, self._known = {0: whole}, dict[int, tuple[int, list[float]]]()
        limit, base = whole.config.max_loss_increase, whole.base_loss
        if limit is not None and base is not None:
            dearest = _BEYOND * limit * base + (_REFIT_GAIN if whole.config.refits_lm_head else 0.0)
            costs = (self._price(count) > dearest for count in range(1, most + 1))
            self.most = next((count for count, beyond in enumerate(costs) if beyond), most)

    @property
    def fixed_params(self) -> int:
        """Parameters that go in any case."""
        return self.whole.fixed_params

    @property
    def most_removable(self) -> int:
        """Parameters that can be removed at most."""
        return max(self._gone(count) + self._most_of_rest(count) for count in range(self.most + 1))

    def size(self, config: PrunerConfig) -> tuple[ModelSize, dict[str, Any]]:
        """Return the size of the budget that a config names, and facts on the choice.

        Raises:
            BudgetError: It can't be reached.
        """
        count, sums = self._choose(config)
        size, facts = self._without(count).size(config)
        tokens = self._units.curves.token_loss(size.tokens)
        widths = self._repaired * max(0.0, (size.predicted or 0.0) - tokens)
        size = replace(size, predicted=self._price(count) + tokens + widths, num_removed=count)
        by_count = [None if math.isinf(loss) else six_digits(loss) for loss in sums]
        return size, {**facts, "predicted_by_removed_layers": by_count}

    def predicted(self, config: PrunerConfig) -> float:
        """Return the predicted loss increase of the budget that a config names, by what was measured with all layers.

        Raises:
            BudgetError: It can't be reached.
        """
        count, sums = self._choose(config)
        return sums[count]

    def build(self, size: ModelSize, chosen: Mapping[str, Any], *, to_files: bool = False) -> PrunedModel:
        """Build the model of a size; see [`ModelBuilder.build`][]."""
        return self._without(size.num_removed).build(size, chosen, to_files=to_files)

    def _choose(self, config: PrunerConfig) -> tuple[int, list[float]]:
        """Return how many layers a budget removes, and the predicted loss of each number that was looked at."""
        remove = ParameterBudget.of(config, self.total).remove_params or 0
        if remove not in self._known:
            self._known[remove] = choose_depth(self._price, lambda count: self._rest(remove, count), self.most)
        count, sums = self._known[remove]
        if math.isinf(sums[count]):
            raise BudgetError(
                f"Asked to remove {remove:,} of {self.total:,} parameters; {self.whole.config.units} can give at most "
                f"{self.most_removable:,}. Ask for less, or let other units go as well (--units, --removable-layers)."
            )
        return count, sums

    def _price(self, count: int) -> float:
        """Return the loss without the first layers, repaired as the config says."""
        if self._sequential:
            return self.order.repaired_loss(count)
        return self.order.depth(count).losses[-1] if count else 0.0

    def _gone(self, count: int) -> int:
        """Return the parameters that are gone before other units give any."""
        return self.whole.fixed_params + self.order.depth(count).count_parameters(self.model)

    def _rest(self, remove: int, count: int) -> float:
        """Return the predicted loss of what is left of a budget, by what was measured with all layers."""
        left, whole = max(0, remove - self._gone(count)), self.whole
        native = whole.config.native_architecture
        return self._curves(count).least_loss(left, native, whole.groups, repaired=self._repaired)

    def _curves(self, count: int) -> UnitCurves:
        """Return the curves of what stays without the first layers, as they were measured with all layers."""
        return self._units.curves.without_layers(self.order.depth(count).order)

    def _most_of_rest(self, count: int) -> int:
        curves = self._curves(count)
        native = bool(self.whole.config.native_architecture)
        return curves.most_removable_native(self.whole.groups) if native else curves.most_removable

    def _without(self, count: int) -> ModelBuilder:
        """Return the builder of forms without the first layers of the order."""
        if count not in self._builders:
            whole, depth = self.whole, self.order.depth(count)
            measured = measure_units(
                whole.model,
                whole.tokenizer,
                whole.calibration,
                whole.config,
                self.probe,
                whole.resume_dir,
                depth,
                known=self._units,
            )
            self._builders[count] = whole.without(depth, measured)
        return self._builders[count]
