"""How many tokens to keep under one budget with the other units."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.errors import BudgetError, DataError
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.modeling.token_rows import num_rows, token_cost
from hf_context_prune.pruning.allocation.adaptive import predicted_loss
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.calibration.samples import tokenize_calibration_samples
from hf_context_prune.pruning.vocabulary.prune import build_vocabulary_pruner
from hf_context_prune.pruning.vocabulary.selection import VocabularySize
from hf_context_prune.utils.distributed import on_main_process

from .planner import LayerMeasurements, Planner

SHARES = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0833)
"""Sizes of the vocabulary that are tried, as shares of its rows."""


_PROBE_TOKENS = 8_000


@dataclass(frozen=True)
class TokenBudget:
    """How many tokens a budget leaves, and what that was weighed against.

    Attributes:
        tokens: Tokens to keep; None: all.
        measured: What the other units cost, for the plan.
        considered: (tokens, nats a token that their loss costs, nats a token of the other units that must go then).
    """

    tokens: int | None
    measured: LayerMeasurements
    considered: tuple[tuple[int, float, float], ...]


def split_token_budget(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    text: TextSource,
    config: PrunerConfig,
    general: TextSource | None = None,
    resume_dir: Path | None = None,
) -> TokenBudget:
    """Weigh tokens against other units: the split whose losses add up to the least.

    What a vocabulary costs is measured (before any refit) on documents that its tokens were not counted on; what the
    other units cost is what adaptive allocation measures of them. Gains count as nothing lost, and no vocabulary is
    smaller than what reaches the budget alone.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        text: Calibration text.
        config: With `vocab_auto` and a budget for all parameters.
        general: For `general_data_ratio`.
        resume_dir: Where the measured widths are kept, to go on from; None keeps nothing.

    Raises:
        BudgetError: No split reaches the budget.
    """
    samples = tokenize_calibration_samples(text, tokenizer, config, general)
    budget = ParameterBudget.of(config, model.num_parameters())
    rows, cost = num_rows(model), token_cost(model)
    alone = rows - math.ceil((budget.remove_params or 0) / cost)
    curve = on_main_process(lambda: _vocabulary_curve(model, tokenizer, text, config, alone))
    planner = Planner(model, samples, config, resume_dir=resume_dir)
    assert planner.measured is not None
    measured = planner.measured
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
        most = (rows - min(tokens for tokens, _ in curve)) * cost + planner.most_removable(config)
        raise BudgetError(
            f"Asked to remove {budget.remove_params:,} of {budget.total_params:,} parameters; tokens, neurons and KV "
            f"groups together can give {most:,} ({most / budget.total_params:.4f} of all). Ask for less."
        )
    best = min(considered, key=lambda item: (item[1] + item[2], -item[0]))[0]
    return TokenBudget(None if best == curve[0][0] else best, measured, tuple(considered))


def _vocabulary_curve(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    text: TextSource,
    config: PrunerConfig,
    alone: int,
) -> list[tuple[int, float]]:
    """(tokens, loss increase in nats a token of the full tokenizer), from all tokens down to `alone`."""
    try:
        rest, withheld = hold_out_documents(text, seed=config.pruning_seed)
    except DataError as error:
        raise DataError(
            f"vocab_auto weighs vocabularies on documents withheld from the calibration text {text.name}, which is a "
            f"single one. Give text of several documents, or fix the number of tokens (vocab_size)."
        ) from error
    options = {"max_seq_length": config.max_seq_length}
    base = document_losses(model, tokenizer, withheld, max_tokens=_PROBE_TOKENS, **options)  # type: ignore[arg-type]
    docs, tokens = [loss.doc for loss in base], sum(loss.num_tokens for loss in base)
    pruner = build_vocabulary_pruner(model, tokenizer, rest, config)
    rows, multiple = num_rows(model), config.pad_to_multiple_of
    curve = [(rows, 0.0)]
    least = max(alone // multiple * multiple, pruner.fewest(multiple))  # what reaches the budget alone, if any does
    sizes = {VocabularySize(multiple=multiple).rounded(int(rows * share)) for share in SHARES}
    sizes = {size for size in (*sizes, least) if least <= size < rows}
    if len(pruner.table) < rows:  # padding costs nothing to remove
        sizes.add(len(pruner.table))
    for size in tqdm(
        sorted(sizes, reverse=True), desc="Weighing vocabularies", unit="size", name="hf_context_prune.vocabulary"
    ):
        if size > len(pruner.table):  # padded rows
            continue
        trimmed = pruner.trim(VocabularySize(size, multiple=multiple), refit=False)
        losses = document_losses(trimmed.model, trimmed.tokenizer, withheld, docs=docs, **options)  # type: ignore[arg-type]
        excess = sum(loss.nll for loss in losses) - sum(loss.nll for loss in base)
        curve.append((trimmed.model.config.vocab_size, max(0.0, excess / tokens)))
    return curve
