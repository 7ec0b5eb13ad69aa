"""One budget for tokens, neurons and KV groups: how many tokens should go, by what each kind of unit costs in loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from .allocation import Budget, predicted_loss
from .config import PrunerConfig
from .data import TextSource, hold_out_documents, token_blocks
from .distributed import on_main_process
from .embeddings import num_rows, token_cost
from .errors import BudgetError
from .evaluation import count_parameters, document_losses
from .plan import PruningPlan, fingerprint
from .planning import Measured, Planner, plan_and_repair
from .search_text import SearchText
from .surgery import apply_plan
from .vocabulary import TrimmedModel, VocabularyPruner, VocabularySize

SHARES = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0833)
"""Sizes of the vocabulary that are tried, as shares of its rows."""
_PROBE_TOKENS = 8_000


@dataclass(frozen=True)
class Split:
    """How many tokens a budget leaves, and what that was weighed against.

    Attributes:
        tokens: Tokens to keep; None: all.
        measured: What the other units cost, for the plan.
        considered: (tokens, nats a token that their loss costs, nats a token of the other units that must go then).
    """

    tokens: int | None
    measured: Measured
    considered: tuple[tuple[int, float, float], ...]


def pruner_of(model: PreTrainedModel, tokenizer: Any, text: TextSource, config: PrunerConfig) -> VocabularyPruner:  # noqa: ANN401
    """The vocabulary pruner that a config describes."""
    return VocabularyPruner(
        model,
        tokenizer,
        text,
        criterion=config.vocab_criterion,
        num_samples=config.num_calibration_samples,
        max_seq_length=config.max_seq_length,
        seed=config.pruning_seed,
    )


def trimmed_for(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    text: TextSource,
    config: PrunerConfig,
    tokens: int | None = None,
) -> TrimmedModel:
    """The model with the vocabulary that a config asks for, or with a number of tokens that was found."""
    size = VocabularySize(
        tokens or config.vocab_size,
        None if tokens else config.vocab_coverage,
        None if tokens else config.vocab_min_count,
        config.vocab_multiple,
    )
    return on_main_process(
        lambda: pruner_of(model, tokenizer, text, config).trim(size, refit=config.reconstruction != "none")
    )


def rest_of_budget(config: PrunerConfig, model: PreTrainedModel, trimmed: PreTrainedModel) -> PrunerConfig:
    """The config for the units of a trimmed model: what is left of a budget for all parameters."""
    budget = Budget.of(config, count_parameters(model))
    if budget.remove_params is None:
        return config
    target = min(budget.total_params - budget.remove_params, count_parameters(trimmed))
    return replace(config, pruning_ratio=None, target_params=target)


def split_budget(model: PreTrainedModel, tokenizer: Any, text: TextSource, config: PrunerConfig) -> Split:  # noqa: ANN401
    """Weigh tokens against other units: the split whose losses add up to the least.

    What a vocabulary costs is measured (before any refit) on documents that its tokens were not counted on; what the
    other units cost is what adaptive allocation measures of them.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        text: Calibration text.
        config: With `vocab_auto` and a budget for all parameters.

    Raises:
        BudgetError: No split reaches the budget.
    """
    samples = token_blocks(
        text,
        tokenizer,
        num_samples=config.num_calibration_samples,
        max_seq_length=config.max_seq_length,
        seed=config.pruning_seed,
    )
    planner = Planner(model, samples, config)
    assert planner.measured is not None
    measured = planner.measured
    curve = on_main_process(lambda: _vocabulary_curve(model, tokenizer, text, config))
    budget = Budget.of(config, count_parameters(model))
    rows, cost = num_rows(model), token_cost(model)
    considered = []
    for tokens, loss in curve:
        remove = (budget.remove_params or 0) - (rows - tokens) * cost
        if remove <= 0:
            considered.append((tokens, loss, 0.0))
            continue
        if remove > planner.most_removable(config):
            continue
        widths = planner.widths(
            replace(config, pruning_ratio=None, target_params=budget.total_params - remove, vocab_auto=False)
        )
        assert measured.curves is not None
        considered.append((tokens, loss, predicted_loss(measured.curves, widths)))
    if not considered:
        raise BudgetError(
            f"Asked to remove {budget.remove_params:,} of {budget.total_params:,} parameters; tokens, neurons and KV "
            f"groups together can't give that many. Ask for less."
        )
    best = min(considered, key=lambda item: (item[1] + item[2], -item[0]))[0]
    return Split(None if best == curve[0][0] else best, measured, tuple(considered))


def _vocabulary_curve(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    text: TextSource,
    config: PrunerConfig,
) -> list[tuple[int, float]]:
    """(tokens, loss increase in nats a token of the full tokenizer), from all tokens down."""
    rest, withheld = hold_out_documents(text, seed=config.pruning_seed)
    options = {"max_seq_length": config.max_seq_length}
    base = document_losses(model, tokenizer, withheld, max_tokens=_PROBE_TOKENS, **options)  # type: ignore[arg-type]
    docs, tokens = [loss.doc for loss in base], sum(loss.num_tokens for loss in base)
    pruner = pruner_of(model, tokenizer, rest, config)
    rows = num_rows(model)
    curve = [(rows, 0.0)]
    sizes = {math.ceil(int(rows * share) / config.vocab_multiple) * config.vocab_multiple for share in SHARES} - {rows}
    for size in tqdm(
        sorted(sizes, reverse=True), desc="Weighing vocabularies", unit="size", name="hf_context_prune.vocabulary"
    ):
        try:
            trimmed = pruner.trim(VocabularySize(size, multiple=config.vocab_multiple), refit=False)
        except BudgetError:  # fewer than must stay, or more than the tokenizer has (padded rows)
            continue
        losses = document_losses(trimmed.model, trimmed.tokenizer, withheld, docs=docs, **options)  # type: ignore[arg-type]
        excess = sum(loss.nll for loss in losses) - sum(loss.nll for loss in base)
        curve.append((trimmed.model.config.vocab_size, excess / tokens))
    return curve


def smaller_model(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    text: TextSource,
    config: PrunerConfig,
    *,
    search: SearchText | None = None,
    provenance: dict[str, Any] | None = None,
    resume_dir: Path | None = None,
) -> tuple[PreTrainedModel, Any, PruningPlan]:
    """Prune by a config: tokens first, since they change what the units see; then units, with the rest of the budget.

    Args:
        model: The dense model; left as it is.
        tokenizer: Its tokenizer; left as it is.
        text: Calibration text.
        config: All choices.
        search: For `max_loss_increase`.
        provenance: Goes into the plan, beside the config and versions.
        resume_dir: Where walks keep their finished blocks, to go on from; None keeps nothing.

    Returns:
        (the smaller model, its tokenizer, the plan).
    """
    dense, full, facts = model, tokenizer, dict(provenance or {})
    vocabulary, measured, base_loss = None, None, None
    asked = config
    if config.prunes_vocabulary:
        split = split_budget(model, tokenizer, text, config) if config.vocab_auto else None
        if search is not None:
            base_loss = on_main_process(lambda: search.bits_per_byte(dense, full))
        if split is not None:
            measured, facts["considered_vocabularies"] = split.measured, [list(item) for item in split.considered]
        if split is None or split.tokens is not None:
            trimmed = trimmed_for(model, tokenizer, text, config, None if split is None else split.tokens)
            model, tokenizer, vocabulary = trimmed.model, trimmed.tokenizer, trimmed.plan.vocabulary
            facts |= trimmed.plan.provenance
            if not config.prunes_units:
                facts |= {"config": config.to_dict(), "num_calibration_tokens": 0}
                return model, tokenizer, replace(trimmed.plan, provenance=facts)
            config = rest_of_budget(config, dense, model)
    samples = token_blocks(
        text,
        tokenizer,
        num_samples=config.num_calibration_samples,
        max_seq_length=config.max_seq_length,
        seed=config.pruning_seed,
    )
    plan, repair = plan_and_repair(
        model,
        samples,
        config,
        loss=None if search is None else lambda pruned: search.bits_per_byte(pruned, tokenizer),
        base_loss=base_loss,
        provenance=facts,
        resume_dir=resume_dir,
        measured=measured,
    )
    smaller = apply_plan(model, plan, repair=repair).eval()
    if vocabulary is not None:
        plan = replace(
            plan,
            vocabulary=vocabulary,
            model_fingerprint=fingerprint(dense),
            provenance={**plan.provenance, "config": asked.to_dict()},
        )
    return smaller, tokenizer, plan


def vocabulary_note(plan: PruningPlan, text: TextSource) -> tuple[str, ...]:
    """A sentence on the vocabulary for the report; none where all tokens stay."""
    if plan.vocabulary is None:
        return ()
    facts = plan.provenance["vocabulary"]
    refit = facts["refit"]
    repaired = "their rows are as they were"
    if refit is not None and refit["share"]:
        repaired = (
            f"their rows were refitted ({refit['before']:.3f} -> {refit['after']:.3f} nats a token, withheld blocks)"
        )
    return (
        f"Vocabulary: {len(plan.vocabulary.kept):,} of {facts['tokens_before']:,} tokens, {facts['coverage']:.2%} of "
        f"the token occurrences in {text.name}; {repaired}. Losses a token don't compare between the two tokenizers; "
        f"bits per byte do.",
    )
