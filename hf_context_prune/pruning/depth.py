"""Layers that are removed as a whole: how many, which, and the model without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.depth import check_layers_removable, shorten_config, why_not_shortened
from hf_context_prune.modeling.native_fit import build_empty_model
from hf_context_prune.modeling.plan import GONE_LAYER, PruningPlan
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import ParameterBudget, for_the_rest, share_below
from hf_context_prune.pruning.surgery import ReconstructFn, apply_plan
from hf_context_prune.utils.layer_options import KEPT_AT_ENDS, layer_numbers

T = TypeVar("T")


@dataclass(frozen=True)
class Depth:
    """The layers that a model loses as a whole.

    The model without them (`shorten`) has numbers of its own, from 0 on; `expand` and `in_base` lead back.

    Attributes:
        num_layers: Layers of the base model.
        order: Numbers of the removed layers, in the order in which they were chosen.
        losses: KL(base || model without the layers up to here), in nats per token, for each of them; empty where they
            were not chosen by it.
    """

    num_layers: int
    order: tuple[int, ...]
    losses: tuple[float, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the layers that stay, ascending."""
        return tuple(index for index in range(self.num_layers) if index not in self.order)

    def expand(self, values: Sequence[T], gone: T) -> tuple[T, ...]:
        """Return values of the layers that stay as values of all layers, with `gone` for the removed ones."""
        known = dict(zip(self.kept, values, strict=True))
        return tuple(known.get(index, gone) for index in range(self.num_layers))

    def in_base(self, values: Mapping[tuple[int, str], T]) -> dict[tuple[int, str], T]:
        """Return values by (layer, target), by the number that each layer has in the base model."""
        return {(self.kept[layer], target): value for (layer, target), value in values.items()}

    def count_parameters(self, model: PreTrainedModel) -> int:
        """Return the parameters of the removed layers; the weights may be on the meta device."""
        layers = ModelView.of_shapes(model).layers
        return sum(parameter.numel() for index in self.order for parameter in layers[index].parameters())

    def shorten(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model without these layers; it shares its tensors, and its device if that is the meta device."""
        if model.device.type != "meta":
            return apply_plan(model, self.plan(model), share=True)
        view = ModelView.of_shapes(model)
        config = shorten_config(model.config, view.spec, self.kept)
        return build_empty_model(config, view.spec, [view.widths[index] for index in self.kept])

    def plan(self, model: PreTrainedModel) -> PruningPlan:
        """Return the plan that removes these layers and nothing else."""
        view = ModelView.of_shapes(model)
        whole = PruningPlan.identity(view.spec.model_type, view.geometry).layers
        layers = self.expand([whole[index] for index in self.kept], GONE_LAYER)
        return PruningPlan(view.spec.model_type, view.widths, layers)

    def reconstruct_in_base(self, reconstruct: ReconstructFn) -> ReconstructFn:
        """Return a reconstruction of the shortened model as one of the base model."""
        numbers = {old: new for new, old in enumerate(self.kept)}
        return lambda layer, *rest: reconstruct(numbers[layer], *rest)

    def facts(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the choice for a plan's provenance.

        Args:
            model: The base model.
        """
        return {
            "order": list(self.order),
            "losses": [float(f"{loss:.6g}") for loss in self.losses],
            "parameters": self.count_parameters(model),
        }


def removable_layers(model: PreTrainedModel, config: PrunerConfig) -> tuple[int, ...]:
    """Return the numbers of the layers that a config lets go, ascending.

    Raises:
        BudgetError: It names a layer that the model does not have.
        UnsupportedArchitectureError: The model's layers belong together.
    """
    view = ModelView.of_shapes(model)
    check_layers_removable(model.config, view.spec)
    count = len(view.widths)
    if (listed := layer_numbers(config.removable_layers)) is None:
        return tuple(range(KEPT_AT_ENDS, count - KEPT_AT_ENDS))
    if listed[-1] >= count:
        raise BudgetError(
            f"removable_layers names layer {listed[-1]}, but the model has {count} layers, numbered from 0 to "
            f"{count - 1}."
        )
    return listed


def count_removed(model: PreTrainedModel, config: PrunerConfig) -> int:
    """Return how many layers a config removes as a whole, from shapes alone.

    Raises:
        BudgetError: As many can't be removed.
        UnsupportedArchitectureError: See [`removable_layers`][].
    """
    if not config.fixes_layers:
        return 0
    allowed, count = removable_layers(model, config), len(ModelView.of_shapes(model).widths)
    if config.num_layers is not None:
        removed, asked = count - config.num_layers, f"num_layers is {config.num_layers}"
        if removed < 1:
            raise BudgetError(f"{asked}, but the model has {count} layers, so none would be removed. Ask for fewer.")
    else:
        assert config.layer_ratio is not None
        removed, asked = int(count * config.layer_ratio + 0.5 + 1e-9), f"layer_ratio is {config.layer_ratio}"
        if removed < 1:
            raise BudgetError(
                f"{asked}, which removes none of {count} layers. Ask for at least {round(0.5 / count + 5e-4, 3)}."
            )
    most = min(len(allowed), count - 1)
    if removed > most:
        stay = (
            f" The first {KEPT_AT_ENDS} and the last {KEPT_AT_ENDS} stay unless removable_layers names them."
            if config.removable_layers is None
            else ""
        )
        raise BudgetError(
            f"{asked}, so {removed} of {count} layers would be removed, and at most {most} may be.{stay} Ask for fewer."
        )
    return removed


def rest_of_budget(config: PrunerConfig, model: PreTrainedModel, depth: Depth) -> PrunerConfig:
    """Return the config for the model without these layers: what they leave of a budget for all parameters.

    Args:
        config: The config for the whole model.
        model: The whole model; its weights may be on the meta device.
        depth: The layers that are removed.
    """
    total = model.num_parameters()
    changes: dict[str, Any] = {"num_layers": None, "layer_ratio": None, "removable_layers": None}
    if config.units is not None:
        changes["units"] = ",".join(unit for unit in config.units.split(",") if unit != "layers") or None
        if changes["units"] is None:
            changes |= {"pruning_ratio": 0.0, "target_params": None, "max_loss_increase": None, "allocation": "uniform"}
            return replace(config, **changes)
    if (remove := ParameterBudget.of(config, total).remove_params) is not None:
        left = min(total - remove, total - depth.count_parameters(model))
        changes |= {"pruning_ratio": None, "target_params": left}
    elif not (config.prunes_layers or config.prunes_vocabulary):  # whole layers were all
        changes |= {"pruning_ratio": 0.0, "allocation": "uniform"}
    return replace(config, **changes)


def stand_in(model: PreTrainedModel, config: PrunerConfig) -> Depth | None:
    """Return as many layers as a config removes, before it is known which: for checks of sizes from shapes alone.

    Raises:
        BudgetError: As many can't be removed.
        UnsupportedArchitectureError: See [`removable_layers`][].
    """
    if not (removed := count_removed(model, config)):
        return None
    view, allowed = ModelView.of_shapes(model), removable_layers(model, config)
    if removed == len(allowed):  # nothing is left to choose, so a part of them need not make a model
        shorten_config(model.config, view.spec, sorted(set(range(len(view.widths))) - set(allowed)))
        return Depth(len(view.widths), allowed)
    depth, why_no_more = _first_of(model, allowed, removed)
    if len(depth.order) < removed:
        raise BudgetError(
            f"Of the layers that may be removed, {len(depth.order)} can go one after the other, not {removed}. "
            f"{why_no_more} Or ask for fewer."
        )
    return depth


def deepest(model: PreTrainedModel, config: PrunerConfig) -> Depth | None:
    """Return as many layers as a budget may remove at most, of which it is not known yet which; None: it removes none.

    Args:
        model: The base model; its weights may be on the meta device.
        config: All choices.

    Raises:
        BudgetError: No layer may go.
        UnsupportedArchitectureError: The model's layers belong together.
    """
    if not config.searches_layers:
        return None
    view, allowed = ModelView.of_shapes(model), removable_layers(model, config)
    depth, why_no_more = _first_of(model, allowed, len(view.widths) - 1)
    if not depth.order:
        ends = f"the first {KEPT_AT_ENDS} and the last {KEPT_AT_ENDS} stay unless removable_layers names them."
        raise BudgetError(
            f"units={config.units!r} lets layers go, but of the {len(view.widths)} layers of this model none can go by "
            f"itself: {why_no_more or ends} Or leave layers out of units."
        )
    return depth


@contextmanager
def name_share_of_layers(model: PreTrainedModel, config: PrunerConfig, depth: Depth) -> Iterator[None]:
    """Refuse a budget that layers alone can't give, and re-raise that of the others with what layers give.

    Args:
        model: The base model; its weights may be on the meta device.
        config: With layers among the units.
        depth: As many layers as may go.

    Raises:
        BudgetError: The budget can't be reached.
    """
    total, most = model.num_parameters(), depth.count_parameters(model)
    remove = ParameterBudget.of(config, total).remove_params or 0
    given = (
        f"{most:,} ({share_below(most, total)} of all) can go with the {len(depth.order)} layers that may be removed"
    )
    if config.units == "layers" and remove > most:
        raise BudgetError(
            f"Of the {remove:,} parameters asked to go, {given}. Ask for less, or let other units go as well (--units, "
            f"--removable-layers)."
        )
    with for_the_rest(f"Of the {remove:,} parameters asked to go, {given}"):
        yield


def _first_of(model: PreTrainedModel, allowed: Sequence[int], most: int) -> tuple[Depth, str]:
    """Return the first of some layers, as many as can go one after the other up to a number, and why no more can."""
    view, order, reason = ModelView.of_shapes(model), list[int](), ""
    count = len(view.widths)
    for index in allowed:
        if len(order) == most:
            break
        why_not = why_not_shortened(model.config, view.spec, set(range(count)) - {*order, index})
        if why_not is None:
            order.append(index)
        else:
            reason = why_not
    return Depth(count, tuple(order)), reason
