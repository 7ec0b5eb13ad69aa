"""Uniform widths: the same share of every layer."""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Sequence

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.specs import Geometry, LayerWidths

from .budget import Costs, ParameterBudget, removed_params, share_below


def round_half_up(value: float) -> int:
    """Nearest integer, halves up (and not to even, so that ratios act the same at every width)."""
    return int(value + 0.5 + 1e-9)


def _kept(width: int, ratio: float, multiple: int) -> int:
    kept = width - round_half_up(width * ratio)
    return width if kept == width else max(min(multiple, width), kept - kept % multiple)


def _kept_groups(groups: int, ratio: float, allowed: Collection[int]) -> int:
    kept = max(1, groups - round_half_up(groups * ratio))
    if ratio > 0 and kept == groups > 1:
        reachable = ", ".join(f"{(groups - n) / groups:.3f}" for n in range(groups, 0, -1))
        raise BudgetError(
            f"attention_ratio is {ratio}, which removes no KV group: the layers have {groups}, of which one must stay, "
            f"so {reachable} can be reached."
        )
    fitting = [n for n in allowed if n <= kept]
    if not fitting:
        raise BudgetError(
            f"attention_ratio {ratio} leaves {kept} of {groups} KV groups, which the native architecture can't hold; "
            f"it can hold {', '.join(map(str, sorted(allowed)))}. Ask for one of those, or leave out --native-architecture."
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
    """The same share of every layer.

    Args:
        geometry: Sizes of the model.
        costs: Parameters a unit.
        budget: What is asked for.
        config: Ratios and rounding.
        native_groups: KV groups a layer that the native architecture accepts; empty where that does not matter.

    Returns:
        Widths, one a layer. A share of all parameters is met or exceeded by less than one step of the widths.

    Raises:
        BudgetError: It can't be reached; names the maximum that can.
    """
    dense, multiple = geometry.layers, config.round_to
    groups = [layer.kv_groups for layer in dense]
    if config.attention_ratio is not None:
        if config.attention_ratio > 0 and max(groups) == 1:
            raise BudgetError(
                f"attention_ratio is {config.attention_ratio}, but every layer has a single KV group, which must stay. "
                f"Leave attention_ratio out; the MLP neurons can go."
            )
        groups = [_kept_groups(n, config.attention_ratio, native_groups or range(1, n + 1)) for n in groups]
    neurons = [layer.neurons for layer in dense]
    if config.mlp_ratio is not None:
        neurons = [_kept(n, config.mlp_ratio, multiple) for n in neurons]
        if config.mlp_ratio > 0 and neurons == [layer.neurons for layer in dense]:
            widest = max(neurons)
            raise BudgetError(
                f"mlp_ratio is {config.mlp_ratio}, which removes no neuron: the layers have {widest}, and round_to is "
                f"{multiple}. Ask for at least {math.ceil(1e6 / widest) / 1e6}, with round_to below {widest}."
            )
    widths = _zip(neurons, groups)
    if budget.remove_params is None:
        return widths
    if config.mlp_ratio is None:
        widest = max(layer.neurons for layer in dense)
        steps = range(widest, 0, -1)

        def widths_at(step: int) -> tuple[LayerWidths, ...]:
            return _zip([_kept(layer.neurons, 1 - step / widest, multiple) for layer in dense], groups)
    else:
        most = max(layer.kv_groups for layer in dense)
        steps = range(most, 0, -1)
        if native_groups:
            steps = [step for step in steps if step in {*native_groups, most}]  # type: ignore[assignment]

        def widths_at(step: int) -> tuple[LayerWidths, ...]:
            kept = [max(1, layer.kv_groups - round_half_up(layer.kv_groups * (1 - step / most))) for layer in dense]
            return _zip(neurons, kept)

    def removed_at(step: int) -> int:
        return removed_params(dense, widths_at(step), costs)

    if removed_at(steps[0]) > budget.remove_params:
        raise BudgetError(
            f"The unit ratio alone removes {removed_at(steps[0]):,} parameters, more than the {budget.remove_params:,} "
            f"asked for by pruning_ratio/target_params. Lower the unit's ratio, or leave one of the two out."
        )
    position = bisect.bisect_left(steps, budget.remove_params, key=removed_at)
    if position == len(steps):
        _refuse(budget, dense, widths_at(steps[-1]), costs, config, min(native_groups, default=1))
    return widths_at(steps[position])


def _zip(neurons: Sequence[int], groups: Sequence[int]) -> tuple[LayerWidths, ...]:
    return tuple(LayerWidths(a, b) for a, b in zip(neurons, groups, strict=True))


def _refuse(
    budget: ParameterBudget,
    dense: Sequence[LayerWidths],
    smallest: Sequence[LayerWidths],
    costs: Costs,
    config: PrunerConfig,
    fewest_groups: int,
) -> None:
    reachable = removed_params(dense, smallest, costs)
    everything = removed_params(
        dense, [LayerWidths(min(config.round_to, w.neurons), min(fewest_groups, w.kv_groups)) for w in dense], costs
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
