"""What a config asks of a model, held against its shapes before the long work."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import PrunerConfig, ThresholdConfig
from hf_context_prune.modeling.token_rows import num_rows
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import for_the_rest
from hf_context_prune.pruning.allocation.widths import check_round_to, check_shared_budget, check_units_budget
from hf_context_prune.pruning.thresholds.magnitudes import check_linear
from hf_context_prune.pruning.vocabulary.checks import check_prunable, fewest_tokens
from hf_context_prune.pruning.vocabulary.prune import vocabulary_size
from hf_context_prune.pruning.vocabulary.selection import VocabularySize

from .depth import deepest, name_share_of_layers, rest_of_budget, stand_in
from .experts import name_experts, rest_of_experts_budget, without_experts_shape


def check_budget(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PrunerConfig | ThresholdConfig
) -> None:
    """Refuse what can't be pruned, and a budget that shapes alone say can't be reached, before the long work.

    Raises:
        ConfigError: See [`check_linear`][].
        VocabularyError: See [`check_prunable`][].
        BudgetError: The size can't be reached.
    """
    if config.prunes_vocabulary:
        check_prunable(model, tokenizer, vocabulary_size(config))
    if isinstance(config, ThresholdConfig):
        if config.prunes_layers:
            check_linear(ModelView.of(model).spec)
        return
    left, rest = without_fixed_sizes(model, config)
    if rest.prunes_layers:
        check_round_to(ModelView.of_shapes(left).widths, rest)
    gone, total = model.num_parameters() - left.num_parameters(), model.num_parameters()
    given = f"{gone:,} of the model's {total:,} parameters go with the layers and experts whose number is given"
    with for_the_rest(given if gone else ""):
        if (depth := deepest(left, rest)) is not None:
            with name_share_of_layers(left, rest, depth):
                _check_units(depth.shorten(left), tokenizer, rest_of_budget(rest, left, depth))
        else:
            _check_units(left, tokenizer, rest)


def without_fixed_sizes(model: PreTrainedModel, config: PrunerConfig) -> tuple[PreTrainedModel, PrunerConfig]:
    """Return the model without the experts and layers whose number a config fixes, and the config for what is left.

    Args:
        model: The base model; its weights may be on the meta device, as those of the result.
        config: All choices.

    Raises:
        BudgetError: As many can't be removed.
    """
    if config.prunes_experts:
        fewer = without_experts_shape(model, config)
        config, model = rest_of_experts_budget(config, model, fewer), fewer
    if (depth := stand_in(model, config)) is not None:
        config, model = rest_of_budget(config, model, depth), depth.shorten(model)
    return model, config


def _check_units(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PrunerConfig) -> None:
    """Refuse a budget that tokens, neurons and KV groups can't give."""
    with name_experts(model):
        if config.searches_tokens:
            check_shared_budget(model, config, fewest_tokens(model, tokenizer, config.pad_to_multiple_of))
        elif (
            config.prunes_layers and config.max_loss_increase is None and (config.vocab_size or not config.fixes_tokens)
        ):
            rows = num_rows(model)
            kept = config.vocab_size if config.vocab_size is not None else rows
            tokens = VocabularySize(pad_to_multiple_of=config.pad_to_multiple_of).round_up(kept)
            check_units_budget(model, config, min(tokens, rows))
