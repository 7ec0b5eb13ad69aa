"""A model with calibration text -> the smaller model: one budget for tokens, neurons, KV groups and layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import PrunerConfig, ThresholdConfig
from hf_context_prune.errors import BudgetError, ConfigError
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.layer_choice import LayerOrder, choose_layers
from hf_context_prune.pruning.allocation.loss_search import Candidate, find_smallest
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.thresholds.magnitudes import measure_sample_magnitudes
from hf_context_prune.pruning.thresholds.prune import prune_below_thresholds
from hf_context_prune.pruning.vocabulary.prune import prune_vocabulary_for
from hf_context_prune.utils.distributed import on_main_process

from .depth import count_removed, deepest, removable_layers
from .depth_search import DepthSearch
from .experts import remove_experts
from .model_builder import ModelBuilder, ModelSize, PrunedModel, vocabulary_only_plan
from .unit_curves import TokenProbe, measure_units

ValidationLoss = Callable[[PreTrainedModel, PreTrainedTokenizerBase], float]
"""Loss of a model with its tokenizer, above 0 and comparable between tokenizers, on text that is not calibrated on."""


def prune_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: CalibrationSet,
    config: PrunerConfig | ThresholdConfig,
    *,
    validation_loss: ValidationLoss | None = None,
    token_probe: TokenProbe | None = None,
    provenance: Mapping[str, Any] | None = None,
    resume_dir: Path | None = None,
) -> PrunedModel:
    """Prune by a config: the vocabulary first, since it changes what the layers see; then the layers; then the rows.

    Args:
        model: The base model; left as it is.
        tokenizer: Its tokenizer; left as it is.
        calibration: Calibration text.
        config: All choices.
        validation_loss: For `max_loss_increase`.
        token_probe: For a budget that tokens share (`PrunerConfig.searches_tokens`); its base loss also decides on the
            native architecture.
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
    if config.searches_tokens and token_probe is None:
        raise ConfigError("How many tokens stay is found by measuring; pass token_probe=, or call prune().")
    if config.prunes_experts:
        choice, fewer, rest = remove_experts(model, calibration.samples(tokenizer), config, resume_dir)
        found = prune_model(
            fewer,
            tokenizer,
            calibration,
            rest,
            token_probe=None if token_probe is None else token_probe.against(fewer, tokenizer),
            provenance=provenance,
            resume_dir=resume_dir,
        )
        return found._replace(plan=choice.in_base(model, found.plan, config))
    depth = None
    if (count := count_removed(model, config)) > 0:
        candidates = removable_layers(model, config)
        depth = choose_layers(model, calibration.samples(tokenizer), count, candidates, state_dir=resume_dir)
    measured = None
    if config.shares_budget:
        measured = measure_units(model, tokenizer, calibration, config, token_probe, resume_dir, depth)
    whole = ModelBuilder(model, tokenizer, calibration, config, dict(provenance or {}), resume_dir, measured, depth)
    builder: ModelBuilder | DepthSearch = whole
    if (most := deepest(model, config)) is not None:
        candidates = removable_layers(model, config)
        order = LayerOrder(model, calibration.samples(tokenizer), candidates, state_dir=resume_dir)
        builder = DepthSearch(whole, order, len(most.order), token_probe)
    if config.max_loss_increase is None or validation_loss is None:
        return builder.build(*builder.size(config), to_files=resume_dir is not None)
    return _find_smallest(builder, config, validation_loss)


def _prune_by_thresholds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: CalibrationSet,
    config: ThresholdConfig,
    facts: dict[str, Any],
) -> PrunedModel:
    """Run the paper's protocol: what goes follows from thresholds, not from a budget."""
    magnitudes = None
    if config.prunes_layers:
        magnitudes = measure_sample_magnitudes(model, calibration.samples(tokenizer))
    trimmed = prune_vocabulary_for(model, tokenizer, calibration.domain, config) if config.prunes_vocabulary else None
    if magnitudes is not None:
        return PrunedModel(*prune_below_thresholds(model, tokenizer, config, magnitudes, trimmed, facts))
    assert trimmed is not None  # a ThresholdConfig has one threshold at least
    plan = vocabulary_only_plan(trimmed, {**facts, **trimmed.plan.provenance}, config)
    return PrunedModel(trimmed.model, trimmed.tokenizer, plan)


def _find_smallest(
    builder: ModelBuilder | DepthSearch, config: PrunerConfig, validation_loss: ValidationLoss
) -> PrunedModel:
    """Find the smallest model whose loss on the validation text is within `max_loss_increase`."""
    limit, total = config.max_loss_increase, builder.total
    assert limit is not None
    base = on_main_process(lambda: validation_loss(builder.model, builder.tokenizer))
    if not builder.most_removable:
        if not any(layer.neurons for layer in ModelView.of(builder.model).widths):
            raise BudgetError(
                "Nothing can be removed: max_loss_increase finds how many neurons, KV groups and tokens go, and this "
                "model can lose none of them. Its experts go by a number of your own (experts_ratio)."
            )
        raise BudgetError(
            f"Nothing can be removed: MLP widths stay multiples of round_to={config.round_to}, and the layers are no "
            f"wider. Give a smaller round_to."
        )

    def budget(share: float) -> PrunerConfig:
        return replace(config, max_loss_increase=None, pruning_ratio=share)

    def build(size: ModelSize) -> Candidate[PrunedModel]:
        found = builder.build(size, {})
        loss = on_main_process(lambda: validation_loss(found.model, found.tokenizer))
        return Candidate(found, 1 - found.model.num_parameters() / total, loss)

    predict = None
    if known := builder.base_loss:

        def predict(share: float) -> float:
            return builder.predicted(budget(share)) / known

    found, facts = find_smallest(
        limit,
        base,
        sizes=lambda share: builder.size(budget(share))[0],
        build=build,
        reconstruction=config.reconstruction,
        smallest=max(1, builder.fixed_params) / total,
        largest=builder.most_removable / total,
        predict=predict,
    )
    return found._replace(plan=replace(found.plan, provenance={**found.plan.provenance, "loss_budget": facts}))
