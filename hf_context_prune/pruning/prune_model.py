"""One budget for tokens, neurons and KV groups: how many tokens should go, by what each kind of unit costs in loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import TextSource
from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.architectures import check_supported
from hf_context_prune.modeling.plan import PruningPlan, fingerprint
from hf_context_prune.modeling.token_rows import num_rows
from hf_context_prune.pipelines.validation_text import ValidationText
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.allocation.loss_search import Loss
from hf_context_prune.pruning.allocation.widths import check_units_budget
from hf_context_prune.pruning.calibration.samples import batches_of, tokenize_calibration_samples
from hf_context_prune.pruning.thresholds.magnitudes import Magnitudes, check_linear, measure_magnitudes
from hf_context_prune.pruning.thresholds.prune import prune_below_thresholds
from hf_context_prune.pruning.vocabulary.prune import (
    TrimmedModel,
    check_prunable,
    prune_vocabulary_for,
    vocabulary_size,
)
from hf_context_prune.pruning.vocabulary.refit import refit_rows, refit_rows_in_all_processes, tokenize_refit_samples
from hf_context_prune.pruning.vocabulary.selection import VocabularySize
from hf_context_prune.utils.distributed import on_main_process
from hf_context_prune.utils.version import versions

from .planner import plan_and_reconstruct
from .surgery import apply_plan
from .token_budget import split_token_budget

_HEAD_TOKENS = 1024
"""Tokens a batch where the head's output, which is wide, is measured too."""


def check_budget(model: PreTrainedModel, tokenizer: Any, config: PrunerConfig) -> None:  # noqa: ANN401
    """Refuse what can't be pruned so, and a budget that shapes alone say can't be reached, before the long work.

    Raises:
        ConfigError: See [`check_linear`][].
        VocabularyError: See [`check_prunable`][].
        BudgetError: The size can't be reached.
    """
    if config.thresholds_units:
        check_linear(check_supported(model))
    if config.prunes_vocabulary:
        check_prunable(model, tokenizer, vocabulary_size(config))
    sized = config.prunes_units and not config.thresholds_units
    if config.max_loss_increase is None and sized and (config.vocab_size or not config.prunes_vocabulary):
        rows = num_rows(model)
        tokens = VocabularySize(multiple=config.pad_to_multiple_of).rounded(config.vocab_size or rows)
        check_units_budget(model, config, min(tokens, rows))


def rest_of_budget(config: PrunerConfig, model: PreTrainedModel, trimmed: PreTrainedModel) -> PrunerConfig:
    """The config for the units of a trimmed model: what is left of a budget for all parameters."""
    budget = ParameterBudget.of(config, model.num_parameters())
    if budget.remove_params is None:
        return config
    target = min(budget.total_params - budget.remove_params, trimmed.num_parameters())
    return replace(config, pruning_ratio=None, target_params=target)


def _loss(
    search: ValidationText,
    whole: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    text: TextSource,
    config: PrunerConfig,
    general: TextSource | None,
) -> Loss:
    """What the size is searched by: bits a byte, of a pruned model with its rows refitted if that is to come."""
    samples = tokenize_refit_samples(whole, tokenizer, text, config, general) if config.refit_lm_head else None

    def loss(model: PreTrainedModel) -> float:
        if samples is not None and model is not whole:
            refit_rows(model, samples)
        return search.bits_per_byte(model, tokenizer)

    return loss


def prune_model(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    text: TextSource,
    config: PrunerConfig,
    *,
    general: TextSource | None = None,
    search: ValidationText | None = None,
    provenance: dict[str, Any] | None = None,
    resume_dir: Path | None = None,
) -> tuple[PreTrainedModel, Any, PruningPlan]:
    """Prune by a config: tokens first, since they change what the units see; then units, with the rest of the budget.

    Args:
        model: The dense model; left as it is.
        tokenizer: Its tokenizer; left as it is.
        text: Calibration text.
        config: All choices.
        general: Calibration text of no domain, for `general_data_ratio`; tokens are counted on `text` alone.
        search: For `max_loss_increase`.
        provenance: Goes into the plan, beside the config and versions.
        resume_dir: Where walks keep their finished blocks, to go on from; None keeps nothing.

    Returns:
        (the smaller model, its tokenizer, the plan).
    """
    if config.thresholds_units:
        magnitudes = threshold_magnitudes(model, tokenizer, text, config, general)
        trimmed = prune_vocabulary_for(model, tokenizer, text, config) if config.prunes_vocabulary else None
        return prune_below_thresholds(model, tokenizer, config, magnitudes, trimmed, provenance)
    dense, full, facts = model, tokenizer, dict(provenance or {})
    vocabulary, measured, base_loss = None, None, None
    asked, alone, increase = config, None, 0.0
    if config.prunes_vocabulary:
        split = split_token_budget(model, tokenizer, text, config, general, resume_dir) if config.vocab_auto else None
        if search is not None:
            base_loss = on_main_process(lambda: search.bits_per_byte(dense, full))
        if split is not None:
            measured, facts["considered_vocabularies"] = split.measured, [list(item) for item in split.considered]
        if split is None or split.tokens is not None:
            trimmed = prune_vocabulary_for(model, tokenizer, text, config, None if split is None else split.tokens)
            model, tokenizer, vocabulary = trimmed.model, trimmed.tokenizer, trimmed.plan.vocabulary
            facts |= trimmed.plan.provenance
            alone = _vocabulary_only_plan(trimmed, facts, config)
            if not config.prunes_units or _budget_met(config, dense, model):
                return model, tokenizer, alone
            if search is not None:
                increase = on_main_process(lambda: search.bits_per_byte(model, tokenizer)) / (base_loss or 1) - 1
                if increase > (config.max_loss_increase or 0):
                    raise BudgetError(
                        f"max_loss_increase is {config.max_loss_increase:g}, but with {num_rows(model):,} of "
                        f"{num_rows(dense):,} tokens alone the loss on the withheld text grows by {increase:.4f}. Keep "
                        f"more tokens, or allow more."
                    )
            config = rest_of_budget(config, dense, model)
            if search is None:
                check_units_budget(dense, asked, num_rows(model))
    samples = tokenize_calibration_samples(text, tokenizer, config, general)
    try:
        plan, reconstruct = plan_and_reconstruct(
            model,
            samples,
            config,
            loss=None if search is None else _loss(search, model, tokenizer, text, config, general),
            base_loss=base_loss,
            provenance=facts,
            resume_dir=resume_dir,
            measured=measured,
        )
    except BudgetError:
        if alone is None or search is None:
            raise
        # The tokens alone are within the limit, and nothing beside them is.
        within: dict[str, Any] = {"max_loss_increase": config.max_loss_increase, "increase": increase, "trials": []}
        return model, tokenizer, replace(alone, provenance={**alone.provenance, "loss_budget": within})
    smaller = apply_plan(model, plan, reconstruct=reconstruct).eval()
    if config.refit_lm_head:
        found = refit_rows_in_all_processes(smaller, tokenize_refit_samples(smaller, tokenizer, text, config, general))
        plan = replace(plan, provenance={**plan.provenance, "refit": found})
    if vocabulary is not None:
        plan = replace(
            plan,
            vocabulary=vocabulary,
            model_fingerprint=fingerprint(dense),
            provenance={**plan.provenance, "config": asked.to_dict()},
        )
    return smaller, tokenizer, plan


def threshold_magnitudes(
    dense: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    text: TextSource,
    config: PrunerConfig,
    general: TextSource | None = None,
) -> Magnitudes:
    """What the paper's thresholds are compared with: measured on the dense model, also where tokens go."""
    samples = tokenize_calibration_samples(text, tokenizer, config, general)
    return measure_magnitudes(dense, batches_of(samples, batch_tokens=_HEAD_TOKENS))


def _budget_met(config: PrunerConfig, dense: PreTrainedModel, trimmed: PreTrainedModel) -> bool:
    """Whether the tokens that went are all that was asked for."""
    budget = ParameterBudget.of(config, dense.num_parameters()).remove_params
    ratios = config.mlp_ratio or config.attention_ratio or config.max_loss_increase
    return budget is not None and not ratios and dense.num_parameters() - trimmed.num_parameters() >= budget


def _vocabulary_only_plan(trimmed: TrimmedModel, facts: dict[str, Any], config: PrunerConfig) -> PruningPlan:
    """The plan of a run in which only tokens went."""
    counted = trimmed.plan.provenance["vocabulary"]["tokens_counted"]
    own = {"config": config.to_dict(), "num_calibration_tokens": counted, "versions": versions()}
    return replace(trimmed.plan, provenance={**facts, **own})
