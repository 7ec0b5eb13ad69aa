"""A model with calibration text -> the smaller model: the vocabulary first, then neurons and KV groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import CalibrationConfig, PrunerConfig, ThresholdConfig
from hf_context_prune.errors import BudgetError, ConfigError
from hf_context_prune.modeling.plan import PruningPlan, Vocabulary, fingerprint
from hf_context_prune.modeling.token_rows import num_rows
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.allocation.widths import check_round_to, check_units_budget
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.thresholds.magnitudes import check_linear, measure_sample_magnitudes
from hf_context_prune.pruning.thresholds.prune import prune_below_thresholds
from hf_context_prune.pruning.vocabulary.checks import check_prunable
from hf_context_prune.pruning.vocabulary.prune import TrimmedModel, prune_vocabulary_for, vocabulary_size
from hf_context_prune.pruning.vocabulary.refit import num_refit_samples, refit_rows, refit_rows_in_all_processes
from hf_context_prune.pruning.vocabulary.selection import VocabularySize
from hf_context_prune.utils.distributed import on_main_process
from hf_context_prune.utils.version import versions

from .measurements import LayerMeasurements
from .planner import plan_and_reconstruct
from .surgery import apply_plan
from .token_budget import VocabularyProbe, split_token_budget

ValidationLoss = Callable[[PreTrainedModel, PreTrainedTokenizerBase], float]
"""Loss of a model with its tokenizer, above 0 and comparable between tokenizers, on text that is not calibrated on."""


class PrunedModel(NamedTuple):
    """A smaller model with its tokenizer and the plan that describes it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan


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
        if config.prunes_units:
            check_linear(ModelView.of(model).spec)
        return
    if config.prunes_units:
        check_round_to(ModelView.of_shapes(model).widths, config)
    fixed = isinstance(config.vocab_size, int) or not config.prunes_vocabulary
    if config.prunes_units and config.max_loss_increase is None and fixed:
        rows = num_rows(model)
        kept = config.vocab_size if isinstance(config.vocab_size, int) else rows
        tokens = VocabularySize(pad_to_multiple_of=config.pad_to_multiple_of).round_up(kept)
        check_units_budget(model, config, min(tokens, rows))


def prune_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: CalibrationSet,
    config: PrunerConfig | ThresholdConfig,
    *,
    validation_loss: ValidationLoss | None = None,
    vocabulary_probe: VocabularyProbe | None = None,
    provenance: Mapping[str, Any] | None = None,
    resume_dir: Path | None = None,
) -> PrunedModel:
    """Prune by a config: the vocabulary first, since it changes what the layers see; then units, with what is left.

    Args:
        model: The base model; left as it is.
        tokenizer: Its tokenizer; left as it is.
        calibration: Calibration text; the tokens of the vocabulary are counted on its domain text alone.
        config: All choices.
        validation_loss: For `max_loss_increase`.
        vocabulary_probe: For ``vocab_size="auto"``.
        provenance: Goes into the plan, beside the config and versions.
        resume_dir: Folder where finished layers are kept, to resume from; None keeps nothing.

    Raises:
        ConfigError: What the config needs measured is not handed in.
        ContextPruneError: See `hf_context_prune.errors`.
    """
    if isinstance(config, ThresholdConfig):
        return _prune_by_thresholds(model, tokenizer, calibration, config, dict(provenance or {}))
    if config.max_loss_increase is not None and validation_loss is None:
        raise ConfigError("max_loss_increase is found by measuring; pass validation_loss=, or call prune().")
    if config.vocab_size == "auto" and vocabulary_probe is None:
        raise ConfigError("vocab_size='auto' is found by measuring; pass vocabulary_probe=, or call prune().")
    start = _Progress(model, tokenizer, config, facts=dict(provenance or {}))
    begun = _prune_tokens(start, calibration, validation_loss, vocabulary_probe, resume_dir)
    if begun.is_finished:
        assert begun.vocabulary_plan is not None
        return PrunedModel(begun.model, begun.tokenizer, begun.vocabulary_plan)
    pruned = _prune_units(begun, calibration, validation_loss, resume_dir)
    if begun.vocabulary is None:
        return pruned
    plan = replace(
        pruned.plan,
        vocabulary=begun.vocabulary,
        model_fingerprint=fingerprint(model),
        provenance={**pruned.plan.provenance, "config": config.to_dict()},
    )
    return pruned._replace(plan=plan)


def _prune_by_thresholds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: CalibrationSet,
    config: ThresholdConfig,
    facts: dict[str, Any],
) -> PrunedModel:
    """Run the paper's protocol: what goes follows from thresholds, not from a budget."""
    magnitudes = None
    if config.prunes_units:
        magnitudes = measure_sample_magnitudes(model, calibration.samples(tokenizer))
    trimmed = prune_vocabulary_for(model, tokenizer, calibration.domain, config) if config.prunes_vocabulary else None
    if magnitudes is not None:
        return PrunedModel(*prune_below_thresholds(model, tokenizer, config, magnitudes, trimmed, facts))
    assert trimmed is not None  # a ThresholdConfig has one threshold at least
    plan = _vocabulary_only_plan(trimmed, {**facts, **trimmed.plan.provenance}, config)
    return PrunedModel(trimmed.model, trimmed.tokenizer, plan)


@dataclass
class _Progress:
    """A model on its way: the base, or the base with a smaller vocabulary.

    Attributes:
        model: The model so far.
        tokenizer: Its tokenizer.
        config: The config for what is still to be removed.
        facts: For the plan's provenance.
        vocabulary: The kept tokens, if some were removed.
        vocabulary_plan: Plan of a run that ends here.
        is_finished: Whether the removed tokens are all that was asked for.
        measured: What was measured of the layers already.
        base_loss: Validation loss of the base model, where it was measured already.
        increase: Relative increase of the validation loss by the smaller vocabulary alone.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: PrunerConfig
    facts: dict[str, Any] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    vocabulary_plan: PruningPlan | None = None
    is_finished: bool = False
    measured: LayerMeasurements | None = None
    base_loss: float | None = None
    increase: float = 0.0


def _prune_tokens(
    start: _Progress,
    calibration: CalibrationSet,
    validation_loss: ValidationLoss | None,
    probe: VocabularyProbe | None,
    resume_dir: Path | None,
) -> _Progress:
    """Remove the tokens that the config asks for, or that one budget with the other units leaves over."""
    model, tokenizer, config, facts = start.model, start.tokenizer, start.config, start.facts
    if not config.prunes_vocabulary:
        return start
    tokens, measured = None, None
    if config.vocab_size == "auto":
        assert probe is not None
        split = split_token_budget(model, tokenizer, calibration, config, probe, resume_dir)
        tokens, measured = split.tokens, split.measured
        facts = {**facts, "considered_vocabularies": [list(item) for item in split.considered]}
    base_loss = None if validation_loss is None else on_main_process(lambda: validation_loss(model, tokenizer))
    if config.vocab_size == "auto" and tokens is None:
        return replace(start, facts=facts, measured=measured, base_loss=base_loss)
    trimmed = prune_vocabulary_for(model, tokenizer, calibration.domain, config, tokens)
    facts = {**facts, **trimmed.plan.provenance}
    done = _Progress(
        trimmed.model,
        trimmed.tokenizer,
        _rest_of_budget(config, model, trimmed.model),
        facts,
        trimmed.plan.vocabulary,
        _vocabulary_only_plan(trimmed, facts, config),
        not config.prunes_units or _budget_met(config, model, trimmed.model),
        measured,
        base_loss,
    )
    if done.is_finished:
        return done
    if validation_loss is None:
        check_units_budget(model, config, num_rows(trimmed.model))
        return done
    increase = on_main_process(lambda: validation_loss(done.model, done.tokenizer)) / (base_loss or 1) - 1
    if increase > (config.max_loss_increase or 0):
        raise BudgetError(
            f"max_loss_increase is {config.max_loss_increase:g}, but with {num_rows(done.model):,} of "
            f"{num_rows(model):,} tokens alone the loss on the validation text grows by {increase:.4f}. Keep more "
            f"tokens, or allow more."
        )
    return replace(done, increase=increase)


def _prune_units(
    begun: _Progress,
    calibration: CalibrationSet,
    validation_loss: ValidationLoss | None,
    resume_dir: Path | None,
) -> PrunedModel:
    """Remove neurons and KV groups, reconstruct, and refit the head where the config asks for it."""
    model, tokenizer, config = begun.model, begun.tokenizer, begun.config
    refit = None  # for the sizes that are tried; the result has samples of its own
    if config.refit_lm_head and validation_loss is not None:
        refit = _refit_samples(model, tokenizer, calibration, config)

    def loss(candidate: PreTrainedModel) -> float:
        assert validation_loss is not None
        if refit is not None and candidate is not model:
            refit_rows(candidate, refit)  # as the result will be
        return validation_loss(candidate, tokenizer)

    try:
        plan, reconstruct = plan_and_reconstruct(
            model,
            calibration.samples(tokenizer),
            config,
            loss=None if validation_loss is None else loss,
            base_loss=begun.base_loss,
            provenance=begun.facts,
            resume_dir=resume_dir,
            measured=begun.measured,
        )
    except BudgetError:
        if begun.vocabulary_plan is None or validation_loss is None:
            raise
        # The smaller vocabulary alone is within the limit, and nothing beside it is.
        within: dict[str, Any] = {
            "max_loss_increase": config.max_loss_increase,
            "increase": begun.increase,
            "trials": [],
        }
        alone = begun.vocabulary_plan
        return PrunedModel(model, tokenizer, replace(alone, provenance={**alone.provenance, "loss_budget": within}))
    smaller = apply_plan(model, plan, reconstruct=reconstruct).eval()
    if config.refit_lm_head:
        samples = _refit_samples(smaller, tokenizer, calibration, config)
        plan = replace(plan, provenance={**plan.provenance, "refit": refit_rows_in_all_processes(smaller, samples)})
    return PrunedModel(smaller, tokenizer, plan)


def _refit_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, calibration: CalibrationSet, config: PrunerConfig
) -> torch.Tensor:
    count = num_refit_samples(model, config.num_calibration_samples, config.max_seq_length)
    return calibration.samples(tokenizer, count)


def _rest_of_budget(config: PrunerConfig, model: PreTrainedModel, trimmed: PreTrainedModel) -> PrunerConfig:
    """Return the config for the units of a model with a smaller vocabulary: what is left of the budget."""
    budget = ParameterBudget.of(config, model.num_parameters())
    if budget.remove_params is None:
        return config
    target = min(budget.total_params - budget.remove_params, trimmed.num_parameters())
    return replace(config, pruning_ratio=None, target_params=target)


def _budget_met(config: PrunerConfig, model: PreTrainedModel, trimmed: PreTrainedModel) -> bool:
    """Return whether the removed tokens are all that was asked for."""
    budget = ParameterBudget.of(config, model.num_parameters()).remove_params
    ratios = config.mlp_ratio or config.attention_ratio or config.max_loss_increase
    return budget is not None and not ratios and model.num_parameters() - trimmed.num_parameters() >= budget


def _vocabulary_only_plan(trimmed: TrimmedModel, facts: Mapping[str, Any], config: CalibrationConfig) -> PruningPlan:
    """Return the plan of a run that removes tokens alone."""
    counted = trimmed.plan.provenance["vocabulary"]["tokens_counted"]
    own = {"config": config.to_dict(), "num_calibration_tokens": counted, "versions": versions()}
    return replace(trimmed.plan, provenance={**facts, **own})
