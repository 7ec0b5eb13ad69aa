"""Budget -> widths, from shapes or from measured curves; what can't be reached is refused before the long work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError, ConfigError
from hf_context_prune.modeling.architectures import TARGETS, Target, UnitCosts, spec_of, unit_costs
from hf_context_prune.modeling.native_fit import assess_native_fit
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.specs import ArchSpec, Geometry, LayerWidths, read_geometry
from hf_context_prune.modeling.token_rows import num_rows, token_cost
from hf_context_prune.pruning.calibration.statistics import Key
from hf_context_prune.pruning.scoring import Requirements

from .adaptive import adaptive_widths, most_removable
from .budget import Costs, Curve, ParameterBudget, beyond_probes, removed_params
from .sensitivity import choose_probe_counts
from .uniform import uniform_widths


def shape_of(model: PreTrainedModel) -> tuple[ArchSpec, Geometry, UnitCosts]:
    """What a model is, how wide it is, and what its units cost."""
    spec = spec_of(model.config)
    geometry = read_geometry(model.config, spec)
    return spec, geometry, unit_costs(model, spec, geometry)


def plan_widths(model: PreTrainedModel, config: PrunerConfig) -> tuple[LayerWidths, ...]:
    """Uniform widths for a budget, from shapes alone (the weights may be on the meta device).

    Raises:
        BudgetError: It can't be reached, or `stock` rules every choice out.
        ConfigError: `max_loss_increase`: the size is found by measuring.
    """
    if config.max_loss_increase is not None:
        raise ConfigError(
            "max_loss_increase is a size found by measuring, so shapes or statistics alone don't give widths: "
            "use prune() or plan_and_reconstruct(..., loss=), or give pruning_ratio."
        )
    spec, geometry, costs = shape_of(model)
    budget = ParameterBudget.of(config, model.num_parameters())
    native_groups: list[int] = []
    if config.native_architecture:
        native_groups = _native_groups(model, spec, geometry)
    widths = uniform_widths(geometry, costs, budget, config, native_groups=native_groups)
    if config.native_architecture and not (fit := assess_native_fit(model.config, spec, widths)).fits:
        raise BudgetError(
            f"No such widths stay native: {fit.reason}. Leave out --native-architecture, or ask for another ratio."
        )
    return widths


def check_adaptive(
    model: PreTrainedModel, config: PrunerConfig, remove_params: int, targets: Sequence[Target] = TARGETS
) -> None:
    """Refuse, from shapes alone, a budget that adaptive widths of these units can't reach, before anything is measured.

    Raises:
        BudgetError: Names the most that can go.
    """
    _, geometry, costs = shape_of(model)
    probed: dict[Key, Curve] = {}
    for layer, widths in enumerate(geometry.layers):
        for target in targets:
            full = widths.neurons if target == "mlp" else widths.kv_groups
            if counts := choose_probe_counts(widths, target):
                probed[layer, target] = ((full, 0.0), *((count, 0.0) for count in counts))
    most = most_removable(probed, costs, round_to=config.round_to)
    if remove_params > most:
        raise beyond_probes(remove_params, most, model.num_parameters())


def _native_groups(model: PreTrainedModel, spec: ArchSpec, geometry: Geometry) -> list[int]:
    """KV groups a layer that the native architecture accepts, all layers alike."""
    first = geometry.layers[0]
    return [
        groups
        for groups in range(1, first.kv_groups + 1)
        if assess_native_fit(model.config, spec, [LayerWidths(first.neurons, groups)] * len(geometry.layers)).fits
    ]


def measured_widths(
    model: PreTrainedModel, config: PrunerConfig, curves: Mapping[Key, Curve]
) -> tuple[LayerWidths, ...]:
    """Adaptive widths for a budget, from what each layer pays for each width.

    Raises:
        BudgetError: It can't be reached.
    """
    _, geometry, costs = shape_of(model)
    budget = ParameterBudget.of(config, model.num_parameters())
    if budget.remove_params is not None and config.mlp_ratio is None and config.attention_ratio is None:
        return adaptive_widths(curves, geometry, costs, budget.remove_params, round_to=config.round_to)
    # Each unit has a budget of its own: what the same options would remove with uniform widths.
    uniform = uniform_widths(geometry, costs, budget, config)
    widths = geometry.layers
    for target in Requirements.of(config).targets:
        own = {key: curve for key, curve in curves.items() if key[1] == target}
        remove = removed_of(target, geometry.layers, uniform, costs)
        part = adaptive_widths(own, geometry, costs, remove, round_to=config.round_to)
        widths = _only(target, part, widths)
    return widths


def dense_parameters(model: PreTrainedModel, plan: PruningPlan) -> int:
    """Parameters of the model that a plan was made for, from the pruned one's shapes: exact, without a weight of it."""
    _, _, costs = shape_of(model)
    tokens = 0 if plan.vocabulary is None else plan.vocabulary.dense - num_rows(model)
    return model.num_parameters() + removed_params(plan.dense, plan.widths, costs) + tokens * token_cost(model)


def removed_of(target: Target, dense: tuple[LayerWidths, ...], widths: tuple[LayerWidths, ...], costs: Costs) -> int:
    """Parameters that one kind of unit gives when the layers shrink from `dense` to `widths`."""
    return removed_params(dense, _only(target, widths, dense), costs)


def _only(target: Target, widths: tuple[LayerWidths, ...], others: tuple[LayerWidths, ...]) -> tuple[LayerWidths, ...]:
    """One target's sizes of `widths`, all else of `others`."""
    size = "neurons" if target == "mlp" else "kv_groups"
    return tuple(replace(other, **{size: getattr(width, size)}) for width, other in zip(widths, others, strict=True))


def check_units_budget(model: PreTrainedModel, config: PrunerConfig, tokens: int) -> int:
    """Parameters that neurons and KV groups have to give beside a number of tokens, from shapes alone.

    Raises:
        BudgetError: They can't give as many.
    """
    remove, fixed = (
        ParameterBudget.of(config, model.num_parameters()).remove_params,
        (config.mlp_ratio, config.attention_ratio),
    )
    if config.allocation == "adaptive" and remove is not None and fixed == (None, None):
        gone = (num_rows(model) - tokens) * token_cost(model)
        rest = max(0, remove - gone)
        with _naming_tokens(remove, gone, tokens):
            check_adaptive(model, config, rest)
        return rest
    _, geometry, costs = shape_of(model)
    widths = widths_beside(model, config, tokens)
    for target in Requirements.of(config).targets if config.allocation == "adaptive" else ():
        check_adaptive(model, config, removed_of(target, geometry.layers, widths, costs), [target])
    return removed_params(geometry.layers, widths, costs)


def widths_beside(model: PreTrainedModel, config: PrunerConfig, tokens: int) -> tuple[LayerWidths, ...]:
    """Uniform widths for what a number of tokens leaves of a budget, from shapes alone.

    Raises:
        BudgetError: It can't be reached.
    """
    budget = ParameterBudget.of(config, model.num_parameters())
    gone = (num_rows(model) - tokens) * token_cost(model)
    if budget.remove_params is None or not gone:
        return plan_widths(model, config)
    rest = max(0, budget.remove_params - gone)
    with _naming_tokens(budget.remove_params, gone, tokens):
        return plan_widths(model, replace(config, pruning_ratio=None, target_params=budget.total_params - rest))


@contextmanager
def _naming_tokens(remove: int, gone: int, tokens: int) -> Iterator[None]:
    """Say in the error of a budget what part of it goes with the tokens."""
    try:
        yield
    except BudgetError as error:
        if not gone:
            raise
        raise BudgetError(
            f"Of the {remove:,} parameters asked to go, {gone:,} go with the tokens beyond {tokens:,}. "
            f"For the rest: {error}"
        ) from error
