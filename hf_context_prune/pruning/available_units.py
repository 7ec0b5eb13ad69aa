"""Which units a run can share its budget between, where its config leaves that open."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import VocabularyError
from hf_context_prune.modeling.token_rows import num_rows, token_cost
from hf_context_prune.pruning.vocabulary.checks import check_prunable, fewest_tokens

SMALL_VOCABULARY = 0.01
"""Share of all parameters in removable tokens below which a vocabulary is not worth the time."""


def without_tokens(config: PrunerConfig) -> PrunerConfig:
    """Return the config for neurons and KV groups alone."""
    return replace(config, units="neurons,kv_groups")


def choose_units(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PrunerConfig
) -> tuple[PrunerConfig, str | None]:
    """Leave tokens out of a shared budget where they can't be removed or hardly count, unless the config asks for them.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        config: All choices.

    Returns:
        (the config with the units that can be removed, why tokens are not among them).
    """
    if config.units is not None or not config.searches_tokens:
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
