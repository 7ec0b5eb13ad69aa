"""Uniform widths: the same share of every layer, from shapes alone."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.geometry import Geometry, LayerWidths

from .budget import Costs, ParameterBudget, removed_params, share_below


def round_half_up(value: float) -> int:
    """Return the nearest integer, halves up (and not to even, so that ratios act the same at every width)."""
    return int(value + 0.5 + 1e-9)


def keep_neurons(width: int, ratio: float, multiple: int) -> int:
    """Return the neurons of a layer, or of an expert, that stay when it loses a share: a multiple if it can."""
    kept = width - round_half_up(width * ratio)
    return width if kept == width else max(min(multiple, width), kept - kept % multiple)


def _keep_groups(groups: int, ratio: float, allowed: Collection[int]) -> int:
    if not groups:
        return 0
    kept = max(1, groups - round_half_up(groups * ratio))
    if ratio > 0 and kept == groups > 1:
        reachable = ", ".join(f"{(groups - n) / groups:.3f}" for n in range(groups, 0, -1))
        raise BudgetError(
            f"attention_ratio is {ratio}, which removes no KV group: the layers have {groups}, of which one must stay, "
            f"so {reachable} can be reached."
        )
    fitting = [n for n in allowed if n <= kept]
    if not fitting:
        nearest = min((n for n in allowed if n < groups), default=None)
        raise BudgetError(
            f"attention_ratio {ratio} leaves {kept} of {groups} KV groups, which the native architecture can't hold; "
            f"it can hold {', '.join(map(str, sorted(allowed)))}. "
            + ("Leave out attention_ratio" if nearest is None else f"Ask for {1 - nearest / groups:.3f}")
            + ", or leave out --native-architecture."
        )
    return max(fitting)


def uniform_widths(
    geometry: Geometry,
    costs: Costs,
    budget: ParameterBudget,
    config: PrunerConfig,
    *,
    native_groups: Collection[int] = (),
) -> tuple[LayerWidths, ...]:
    """Return widths that take the same share of every layer.

    Args:
        geometry: Sizes of the model.
        costs: Parameters per unit, by target.
        budget: The budget in parameters.
        config: Ratios and rounding.
        native_groups: KV groups per layer that the native architecture accepts; empty where any number will do.

    Returns:
        Widths, one entry per layer. A share of all parameters is met or exceeded by less than one step of the widths.

    Raises:
        BudgetError: The budget can't be reached; the message names the maximum.
    """
    base = geometry.layers
    groups = _groups_by_ratio(geometry, config, native_groups)
    neurons = _neurons_by_ratio(base, config)
    if budget.remove_params is None:
        return _pair(base, neurons, groups)
    steps, widths_at = _narrowing_steps(base, neurons, groups, config, native_groups)

    def removed_at(step: int) -> int:
        return removed_params(base, widths_at(step), costs)

    if removed_at(steps[0]) > budget.remove_params:
        raise BudgetError(
            f"The unit ratio alone removes {removed_at(steps[0]):,} parameters, more than the {budget.remove_params:,} "
            f"asked for by pruning_ratio/target_params. Lower the unit's ratio, or leave one of the two out."
        )
    position = bisect.bisect_left(steps, budget.remove_params, key=removed_at)
    if position == len(steps):
        _refuse(budget, base, widths_at(steps[-1]), costs, config, min(native_groups, default=1))
    return widths_at(steps[position])


def _groups_by_ratio(geometry: Geometry, config: PrunerConfig, native_groups: Collection[int]) -> list[int]:
    """Return the KV groups of every layer after `attention_ratio`; all of them without it."""
    ratio, groups = config.attention_ratio, [layer.kv_groups for layer in geometry.layers]
    if ratio is None:
        return groups
    if ratio > 0 and max(groups) <= 1:
        single = "every layer has a single KV group, which must stay"
        why = single if max(groups) else f"no attention head can be removed: {geometry.heads_stay}"
        others = "MLP neurons" if any(layer.neurons for layer in geometry.layers) else "experts (experts_ratio)"
        raise BudgetError(f"attention_ratio is {ratio}, but {why}. Leave out attention_ratio; {others} can be removed.")
    return [_keep_groups(n, ratio, native_groups or range(1, n + 1)) for n in groups]


def _neurons_by_ratio(base: Sequence[LayerWidths], config: PrunerConfig) -> list[int]:
    """Return the neurons of every layer after `mlp_ratio`; all of them without it."""
    ratio, neurons = config.mlp_ratio, [layer.neurons for layer in base]
    if ratio is None:
        return neurons
    kept = [keep_neurons(n, ratio, config.round_to) for n in neurons]
    if ratio > 0 and kept == neurons:
        widest = max(neurons)
        if not widest:
            raise BudgetError(
                f"mlp_ratio is {ratio}, but the layers have experts in place of MLPs. Leave out mlp_ratio: "
                f"experts_ratio removes whole experts, and expert_neurons_ratio neurons inside them."
            )
        raise BudgetError(
            f"mlp_ratio is {ratio}, which removes no neuron: the layers have {widest}, and round_to is "
            f"{config.round_to}. Ask for at least {math.ceil(1e6 / widest) / 1e6}, with round_to below {widest}."
        )
    return kept


def _narrowing_steps(
    base: Sequence[LayerWidths],
    neurons: Sequence[int],
    groups: Sequence[int],
    config: PrunerConfig,
    native_groups: Collection[int],
) -> tuple[Sequence[int], Callable[[int], tuple[LayerWidths, ...]]]:
    """Return the sizes of the widest layer, widest first, for the unit without a ratio, and the widths at each."""
    if config.mlp_ratio is None:
        widest = max(layer.neurons for layer in base)

        def narrow_neurons(step: int) -> tuple[LayerWidths, ...]:
            return _pair(
                base,
                [keep_neurons(layer.neurons, 1 - step / max(widest, 1), config.round_to) for layer in base],
                groups,
            )

        return range(widest, 0, -1) or [0], narrow_neurons
    most = max(layer.kv_groups for layer in base)

    def narrow_groups(step: int) -> tuple[LayerWidths, ...]:
        kept = [
            layer.kv_groups and max(1, layer.kv_groups - round_half_up(layer.kv_groups * (1 - step / most)))
            for layer in base
        ]
        return _pair(base, neurons, kept)

    return [n for n in range(most, 0, -1) if not native_groups or n in {*native_groups, most}], narrow_groups


def _pair(base: Sequence[LayerWidths], neurons: Sequence[int], groups: Sequence[int]) -> tuple[LayerWidths, ...]:
    return tuple(replace(w, neurons=a, kv_groups=b) for w, a, b in zip(base, neurons, groups, strict=True))


def _refuse(
    budget: ParameterBudget,
    base: Sequence[LayerWidths],
    smallest: Sequence[LayerWidths],
    costs: Costs,
    config: PrunerConfig,
    fewest_groups: int,
) -> None:
    """Refuse a budget that the smallest widths of these options don't reach."""
    reachable = removed_params(base, smallest, costs)
    everything = removed_params(
        base,
        [replace(w, neurons=min(config.round_to, w.neurons), kv_groups=min(fewest_groups, w.kv_groups)) for w in base],
        costs,
    )
    more = (
        f" With --attention-ratio as well, up to {share_below(everything, budget.total_params)} can."
        if config.mlp_ratio is None and config.attention_ratio is None and everything > reachable
        else ""
    )
    if config.round_to > 1 and config.mlp_ratio is None:
        more += f" MLP widths stay multiples of round_to={config.round_to}; with a smaller one, more can go."
    raise BudgetError(
        f"Asked to remove {budget.remove_params:,} of {budget.total_params:,} parameters "
        f"({(budget.remove_params or 0) / budget.total_params:.4f}); these options can remove at most {reachable:,} "
        f"({share_below(reachable, budget.total_params)}).{more}"
    )
