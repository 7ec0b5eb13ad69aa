"""Which units a run can take its budget from, where its config leaves that open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError, VocabularyError
from hf_context_prune.modeling.experts import experts_spec, fewest_experts, num_groups
from hf_context_prune.modeling.token_rows import num_rows, token_cost
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import ParameterBudget, share_below
from hf_context_prune.pruning.check_budget import check_budget, without_fixed_sizes
from hf_context_prune.pruning.vocabulary.checks import check_prunable, fewest_tokens
from hf_context_prune.pruning.vocabulary.selection import VocabularySize

SMALL_VOCABULARY = 0.01
"""Share of all parameters in removable tokens below which a vocabulary is not worth the time."""


def without_tokens(config: PrunerConfig) -> PrunerConfig:
    """Return the config for neurons and KV groups alone."""
    return replace(config, units="neurons,kv_groups")


def let_experts_give(
    model: PreTrainedModel, config: PrunerConfig, check: Callable[[PrunerConfig], None]
) -> PrunerConfig:
    """Return the config with as many whole experts removed as a budget of all parameters has room for.

    Most parameters of a mixture of experts are in them, and a domain is routed to a part of them. What has a size of
    its own (layers, tokens, neurons inside experts) goes first, then experts. The other units give the rest; where they
    can't, one expert more goes.

    Args:
        model: The base model; its weights may be on the meta device.
        config: All choices; one that names the units or fixes the number of experts is returned as it is, and so is
            one whose tokens are counted on the text.
        check: Refuses a config whose budget can't be reached, by a `BudgetError`.

    Raises:
        BudgetError: The budget can't be reached with as many experts gone as may go.
    """
    view = ModelView.of_shapes(model)
    counts = {widths.experts for widths in view.widths if widths.experts}
    counted = config.fixes_tokens and config.vocab_size is None  # how many tokens go is not known yet
    fixed = config.removes_experts or config.experts_ratio is not None or config.units is not None or counted
    if len(counts) != 1 or not config.shares_budget or fixed:
        return config
    if (remove := ParameterBudget.of(config, view.num_parameters).remove_params) is None:
        return config  # the loss decides on the size
    total, experts = counts.pop(), experts_spec(view.spec)
    groups = num_groups(model.config, experts)
    most = (total - fewest_experts(model.config, experts)) // groups

    def without(removed: int) -> PrunerConfig:
        return replace(config, num_experts=total - removed * groups) if removed else config

    before = _parameters_left(model, config)
    room = max(0, before - view.num_parameters + remove)  # beside what has a size of its own
    step = before - _parameters_left(model, without(1)) if most else 0
    fewest, more = (min(count, most) for count in ((room // step, -(-room // step)) if step else (0, 0)))
    for removed in dict.fromkeys((fewest, more)):
        try:
            check(without(removed))
            return without(removed)
        except BudgetError as error:
            refused = error
    gone = view.num_parameters - before + more * step
    inside = "" if config.narrows_experts else ", or let neurons inside experts go, too (expert_neurons_ratio)"
    raise BudgetError(
        f"Asked to remove {remove:,} of {view.num_parameters:,} parameters. With {total - more * groups} of {total} "
        f"experts in every layer {gone:,} are gone ({share_below(gone, view.num_parameters)} of all), and the other "
        f"units can't give the rest. Ask for less{inside}."
    ) from refused


def _parameters_left(model: PreTrainedModel, config: PrunerConfig) -> int:
    """Return the parameters that are left once everything is gone that a config gives a size of its own."""
    fewer, tokens = without_fixed_sizes(model, config)[0], 0
    if config.vocab_size is not None:
        size = VocabularySize(config.vocab_size, pad_to_multiple_of=config.pad_to_multiple_of)
        tokens = max(0, num_rows(model) - size.round_up(config.vocab_size))
    return fewer.num_parameters() - tokens * token_cost(model)


def choose_units(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PrunerConfig
) -> tuple[PrunerConfig, str | None]:
    """Let experts give what they can of a shared budget, and leave tokens out where they can't go or hardly count.

    Nothing changes where the config names the units.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        config: All choices.

    Returns:
        (the config with the units that can be removed, why tokens are not among them).
    """
    if config.units is not None:
        return config, None

    def check(candidate: PrunerConfig) -> None:
        check_budget(model, tokenizer, candidate)

    config = let_experts_give(model, config, check)
    if not config.searches_tokens:
        return config, None
    try:
        check_prunable(model, tokenizer, None)
    except VocabularyError as error:
        return without_tokens(config), f"The vocabulary can't be pruned. {error}"
    total = model.num_parameters()
    most = (num_rows(model) - fewest_tokens(model, tokenizer, config.pad_to_multiple_of)) * token_cost(model)
    if most < SMALL_VOCABULARY * total:
        return without_tokens(config), f"Those that could go are {most / total:.2%} of the parameters."
    return config, None
