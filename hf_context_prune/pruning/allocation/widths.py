"""Budget -> widths, from shapes or from measured curves; budgets out of reach are refused before the long work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError, ConfigError, PlanError
from hf_context_prune.modeling.architectures import TARGETS, Target
from hf_context_prune.modeling.expert_neurons import ExpertNeurons, neurons_cost
from hf_context_prune.modeling.experts import experts_spec
from hf_context_prune.modeling.geometry import UNIT_NAMES, LayerWidths, units_of, width_factor
from hf_context_prune.modeling.native_fit import assess_native_fit
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.token_rows import num_rows, token_cost
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.statistics import Key
from hf_context_prune.pruning.scoring import Requirements

from .adaptive import adaptive_widths, most_removable
from .budget import Costs, Curve, ParameterBudget, beyond_probes, for_the_rest, removed_params, share_below
from .sensitivity import choose_probe_counts
from .sizes import TOKENS, UnitCurves
from .uniform import uniform_widths


def plan_widths(model: PreTrainedModel, config: PrunerConfig) -> tuple[LayerWidths, ...]:
    """Return uniform widths for a budget, from shapes alone (the weights may be on the meta device).

    Raises:
        BudgetError: The budget can't be reached, or `native_architecture` rules out every choice.
        ConfigError: `max_loss_increase`: the size is found by measuring.
    """
    if config.max_loss_increase is not None:
        raise ConfigError(
            "max_loss_increase is a size found by measuring, so shapes or statistics alone don't give widths: "
            "use prune(), or give pruning_ratio."
        )
    view = ModelView.of_shapes(model)
    budget = ParameterBudget.of(config, view.num_parameters)
    groups = native_groups(view) if config.native_architecture else []
    widths = uniform_widths(view.geometry, view.costs, budget, config, native_groups=groups)
    if config.native_architecture and not (fit := assess_native_fit(model.config, view.spec, widths)).fits:
        raise BudgetError(
            f"No such widths stay native: {fit.reason}. Leave out --native-architecture, or ask for another ratio."
        )
    return widths


def native_groups(view: ModelView) -> list[int]:
    """Return the KV groups per layer that the native architecture accepts, equal in all layers."""
    most, config = max(layer.kv_groups for layer in view.widths), view.model.config

    def alike(groups: int) -> list[LayerWidths]:
        return [replace(layer, kv_groups=groups if layer.kv_groups else 0) for layer in view.widths]

    return [groups for groups in range(1, most + 1) if assess_native_fit(config, view.spec, alike(groups)).fits]


def measured_widths(
    model: PreTrainedModel, config: PrunerConfig, curves: Mapping[Key, Curve]
) -> tuple[LayerWidths, ...]:
    """Return adaptive widths for a budget, from what each layer pays for each width.

    Raises:
        BudgetError: The budget can't be reached.
    """
    view = ModelView.of_shapes(model)
    budget = ParameterBudget.of(config, view.num_parameters)
    if config.shares_budget:
        native = bool(config.native_architecture)
        groups = native_groups(view) if native else ()
        return layer_curves(view, curves, config).choose(budget.remove_params or 0, native, groups)[0].widths
    # Each unit has its own budget: the parameters that the same options would remove with uniform widths.
    uniform = uniform_widths(view.geometry, view.costs, budget, config)
    widths = view.widths
    for target in Requirements.of(config).targets:
        own = {key: curve for key, curve in curves.items() if key[1] == target}
        remove = removed_by_target(target, view.widths, uniform, view.costs)
        part = adaptive_widths(own, view.geometry, view.costs, remove, round_to=config.round_to)
        widths = _replace_target(target, part, widths)
    return widths


def layer_curves(
    view: ModelView, curves: Mapping[Key, Curve], config: PrunerConfig, *, base_loss: float | None = None
) -> UnitCurves:
    """Return the measured curves of neurons and KV groups with what their removal saves; all tokens stay."""
    factors = tuple(width_factor(view.model.config, view.spec, index) for index in range(len(view.widths)))
    multiples = {"mlp": config.round_to}
    return UnitCurves(curves, view.geometry, num_rows(view.model), view.costs, multiples, base_loss, factors=factors)


def check_adaptive(
    model: PreTrainedModel, config: PrunerConfig, remove_params: int, targets: Sequence[Target] | None = None
) -> None:
    """Refuse, from shapes alone, a budget that adaptive widths of these units can't reach, before anything is measured.

    Args:
        model: The base model; its weights may be on the meta device.
        config: Says which units may go, and what their numbers stay multiples of.
        remove_params: Parameters to remove.
        targets: Units, if not those of the config.

    Raises:
        BudgetError: The budget can't be reached; the message names the most that can be removed.
    """
    view, targets = ModelView.of_shapes(model), targets or Requirements.of(config).targets
    if (why := view.geometry.heads_stay) is not None and set(targets) == {"attention"}:
        raise BudgetError(f"No attention head can be removed: {why}. Let neurons or tokens go (--units).")
    free = layer_curves(view, _free_curves(view, targets), config)
    if remove_params > free.most_removable:
        raise beyond_probes(remove_params, free.most_removable, view.num_parameters)


def _free_curves(view: ModelView, targets: Sequence[Target]) -> dict[Key, Curve]:
    """Return curves without losses: what could be measured, from shapes alone."""
    return {
        (layer, target): ((widths.of(target), 0.0), *((count, 0.0) for count in counts))
        for layer, widths in enumerate(view.widths)
        for target in targets
        if (counts := choose_probe_counts(widths, target))
    }


def check_shared_budget(model: PreTrainedModel, config: PrunerConfig, fewest_tokens: int) -> None:
    """Refuse, from shapes alone, a budget for all parameters that the units of the config can't reach together.

    Args:
        model: The base model; its weights may be on the meta device.
        config: With a budget that is shared, and tokens among the units.
        fewest_tokens: Tokens that have to stay.

    Raises:
        BudgetError: The message names the most that can be removed, and the units that would help.
    """
    view = ModelView.of_shapes(model)
    budget = ParameterBudget.of(config, view.num_parameters)
    remove, total = budget.remove_params or 0, budget.total_params
    targets = Requirements.of(config).targets
    curves = layer_curves(view, _free_curves(view, targets), config)
    curves = with_tokens(curves, model, ((curves.rows, 0.0), (fewest_tokens, 0.0)), config)
    if remove > curves.most_removable:
        whole = {**curves.curves, **_free_curves(view, TARGETS)}
        more = most_removable(whole, curves.costs, curves.multiples)
        there = {target: name for target, name in UNIT_NAMES.items() if name in units_of(view.widths)}
        missing = [name for target, name in there.items() if target not in targets]
        helps = f" With {' and '.join(missing)} as well (--units), up to {share_below(more, total)} can."
        listed = ", ".join(["tokens", *(name for target, name in there.items() if target in targets)])
        raise BudgetError(
            f"Asked to remove {remove:,} of {total:,} parameters; {listed} together can give {curves.most_removable:,} "
            f"({share_below(curves.most_removable, total)} of all).{helps if missing else ''} Ask for less."
        )
    if config.native_architecture:
        curves.choose(remove, True, native_groups(view))


def with_tokens(
    curves: UnitCurves, model: PreTrainedModel, tokens: Curve, config: PrunerConfig, *, padding: int = 0
) -> UnitCurves:
    """Add the curve of the vocabulary, of whose rows some may be padding."""
    return replace(
        curves,
        curves={**curves.curves, TOKENS: tokens},
        costs={**curves.costs, "tokens": token_cost(model)},
        multiples={**curves.multiples, "tokens": config.pad_to_multiple_of},
        padding=padding,
    )


def check_round_to(widths: Sequence[LayerWidths], config: PrunerConfig) -> None:
    """Refuse a `round_to` that lets no neuron go, where a budget for all parameters would come from KV groups alone.

    Args:
        widths: Widths of the base model.
        config: The budget.

    Raises:
        BudgetError: No layer is wider than `round_to`.
    """
    widest = max(layer.neurons for layer in widths)
    asked = config.pruning_ratio or config.target_params or config.max_loss_increase
    if asked and config.mlp_ratio is None and config.round_to > 1 and config.round_to >= widest:
        raise BudgetError(
            f"round_to is {config.round_to:,}, but the layers have at most {widest:,} MLP neurons, so none could be "
            f"removed. Use a round_to below {widest:,}; to remove KV groups alone, give attention_ratio without a "
            f"budget for all parameters."
        )


def check_units_budget(model: PreTrainedModel, config: PrunerConfig, tokens: int) -> int:
    """Return the parameters that neurons and KV groups have to give beside a vocabulary size, from shapes alone.

    Args:
        model: The base model; its weights may be on the meta device.
        config: The budget.
        tokens: Vocabulary entries that stay.

    Raises:
        BudgetError: Neurons and KV groups can't give as many.
    """
    view = ModelView.of_shapes(model)
    remove = ParameterBudget.of(config, view.num_parameters).remove_params
    if config.shares_budget and remove is not None:
        gone = (num_rows(model) - tokens) * token_cost(model)
        rest = max(0, remove - gone)
        with for_the_rest(_share_of_tokens(remove, gone, tokens)):
            check_adaptive(model, config, rest)
            if config.native_architecture:
                free = layer_curves(view, _free_curves(view, Requirements.of(config).targets), config)
                free.choose(rest, True, native_groups(view))
        return rest
    widths = plan_widths_beside_vocabulary(model, config, tokens)
    for target in Requirements.of(config).targets if config.allocation == "adaptive" else ():
        check_adaptive(model, config, removed_by_target(target, view.widths, widths, view.costs), [target])
    return removed_params(view.widths, widths, view.costs)


def plan_widths_beside_vocabulary(model: PreTrainedModel, config: PrunerConfig, tokens: int) -> tuple[LayerWidths, ...]:
    """Return uniform widths for the budget that is left beside a vocabulary size, from shapes alone.

    Args:
        model: The base model; its weights may be on the meta device.
        config: The budget.
        tokens: Vocabulary entries that stay.

    Raises:
        BudgetError: The budget can't be reached.
    """
    budget = ParameterBudget.of(config, model.num_parameters())
    gone = (num_rows(model) - tokens) * token_cost(model)
    if budget.remove_params is None or not gone:
        return plan_widths(model, config)
    rest = max(0, budget.remove_params - gone)
    with for_the_rest(_share_of_tokens(budget.remove_params, gone, tokens)):
        return plan_widths(model, replace(config, pruning_ratio=None, target_params=budget.total_params - rest))


def _share_of_tokens(remove: int, gone: int, tokens: int) -> str:
    """Return what the removed tokens give to a budget, for an error on the rest of it; "" where all stay."""
    return f"Of the {remove:,} parameters asked to go, {gone:,} go with the tokens beyond {tokens:,}" if gone else ""


def count_base_parameters(model: PreTrainedModel, plan: PruningPlan) -> int:
    """Return the exact parameters of the model that a plan was made for, from the pruned model's shapes alone.

    Of layers that were removed as a whole, the plan's provenance tells how many they had.

    Raises:
        PlanError: It does not.
    """
    view = ModelView.of_shapes(model)
    tokens = 0 if plan.vocabulary is None else plan.vocabulary.dense - num_rows(model)
    dense = [plan.dense[index] for index in plan.kept_layers]
    total = view.num_parameters + removed_params(dense, plan.kept_widths, view.costs) + tokens * token_cost(model)
    if plan.expert_neurons is not None:
        total += _removed_inside(view, plan, plan.expert_neurons)
    if not plan.removed_layers:
        return total
    layers = (plan.provenance.get("removed_layers") or {}).get("parameters")
    if layers is None:
        raise PlanError(
            "The plan removes whole layers, and its provenance does not tell how many parameters they had "
            "(removed_layers.parameters), so the size of the base model is unknown. Make the plan by prune()."
        )
    return total + int(layers)


def _removed_inside(view: ModelView, plan: PruningPlan, neurons: ExpertNeurons) -> int:
    """Return the parameters of removed neurons inside experts, those of removed experts among them."""
    experts, gone = experts_spec(view.spec), 0
    for layer, kept, index in zip(view.layers, plan.kept_widths, plan.kept_layers, strict=True):
        if kept.experts:
            routed, shared = neurons_cost(layer, experts)
            routed = routed // kept.experts * plan.dense[index].experts
            gone += routed * (neurons.dense - neurons.width) + shared * (neurons.dense_shared - neurons.shared_width)
    return gone


def removed_by_target(
    target: Target, base: tuple[LayerWidths, ...], widths: tuple[LayerWidths, ...], costs: Costs
) -> int:
    """Return the parameters that one kind of unit gives when the layers shrink from `base` to `widths`."""
    return removed_params(base, _replace_target(target, widths, base), costs)


def _replace_target(
    target: Target, widths: tuple[LayerWidths, ...], others: tuple[LayerWidths, ...]
) -> tuple[LayerWidths, ...]:
    """Return `others` with one target's sizes taken from `widths`."""
    return tuple(
        replace(other, **{UNIT_NAMES[target]: width.of(target)}) for width, other in zip(widths, others, strict=True)
    )
