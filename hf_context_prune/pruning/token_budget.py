"""How many tokens of the vocabulary to keep under one budget with neurons and KV groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import TextSource
from hf_context_prune.errors import BudgetError, PruningWarning
from hf_context_prune.modeling.token_rows import num_rows, token_cost
from hf_context_prune.pruning.allocation.adaptive import predicted_loss
from hf_context_prune.pruning.allocation.budget import ParameterBudget, share_below
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.vocabulary.prune import build_vocabulary_pruner
from hf_context_prune.pruning.vocabulary.selection import VocabularySize
from hf_context_prune.utils.distributed import on_main_process

from .measurements import LayerMeasurements
from .planner import Planner

SHARES = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0833)
"""Sizes of the vocabulary that are tried, as shares of its rows."""


@dataclass(frozen=True)
class VocabularyProbe:
    """Text that vocabularies are compared on, and the loss there. The caller measures: pruning knows no evaluation.

    Attributes:
        counted: The calibration text without the probe's documents: tokens are chosen on it.
        loss: Loss of a model with its tokenizer on the probe's documents, in nats per token of the base tokenizer.
        base_loss: The same of the base model.
    """

    counted: TextSource
    loss: Callable[[PreTrainedModel, PreTrainedTokenizerBase], float]
    base_loss: float


@dataclass(frozen=True)
class TokenBudget:
    """How many tokens a budget leaves, and what was compared.

    Attributes:
        tokens: Tokens to keep; None keeps all.
        measured: Loss of the layers at each width, for the plan.
        considered: For each vocabulary (its tokens, nats per token that its loss costs, nats per token that the other
            units cost that must then be removed).
    """

    tokens: int | None
    measured: LayerMeasurements
    considered: tuple[tuple[int, float, float], ...]


def split_token_budget(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: CalibrationSet,
    config: PrunerConfig,
    probe: VocabularyProbe,
    resume_dir: Path | None = None,
) -> TokenBudget:
    """Choose how much of a budget the vocabulary gives: the split with the least sum of losses.

    The loss of a vocabulary is measured before any refit, on documents that its tokens were not counted on; the loss of
    the other units is what adaptive allocation measures. Negative loss changes count as zero. No vocabulary is tried
    that would remove more than the whole budget.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        calibration: Calibration text.
        config: With ``vocab_size="auto"`` and a budget for all parameters.
        probe: Text to compare vocabularies on.
        resume_dir: Folder where the measured widths are kept, to resume from; None keeps nothing.

    Raises:
        BudgetError: No split reaches the budget.
    """
    budget = ParameterBudget.of(config, model.num_parameters())
    remove, rows, cost = budget.remove_params or 0, num_rows(model), token_cost(model)
    fewest = rows - math.ceil(remove / cost)
    curve = on_main_process(lambda: _vocabulary_curve(model, tokenizer, config, probe, fewest))
    planner = Planner(model, calibration.samples(tokenizer), config, resume_dir=resume_dir)
    measured = planner.measured
    assert measured is not None
    assert measured.curves is not None
    considered = []
    for tokens, loss in curve:
        rest = remove - (rows - tokens) * cost
        if rest <= 0:
            considered.append((tokens, loss, 0.0))
        elif rest <= planner.most_removable(config):
            widths = planner.widths(
                replace(config, pruning_ratio=None, target_params=budget.total_params - rest, vocab_size=None)
            )
            considered.append((tokens, loss, predicted_loss(measured.curves, widths)))
    if not considered:
        most = (rows - min(tokens for tokens, _ in curve)) * cost + planner.most_removable(config)
        raise BudgetError(
            f"Asked to remove {budget.remove_params:,} of {budget.total_params:,} parameters; tokens, neurons and KV "
            f"groups together can give {most:,} ({share_below(most, budget.total_params)} of all). Ask for less."
        )
    best = min(considered, key=lambda item: (item[1] + item[2], -item[0]))[0]
    return TokenBudget(None if best == curve[0][0] else best, measured, tuple(considered))


def _vocabulary_curve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PrunerConfig,
    probe: VocabularyProbe,
    fewest: int,
) -> list[tuple[int, float]]:
    """Return (tokens, loss increase in nats per token of the base tokenizer), from all tokens down to `fewest`."""
    pruner = build_vocabulary_pruner(model, tokenizer, probe.counted, config)
    rows, multiple = num_rows(model), config.pad_to_multiple_of
    curve = [(rows, 0.0)]
    least = max(fewest // multiple * multiple, pruner.fewest_tokens(multiple))
    sizes = {VocabularySize(pad_to_multiple_of=multiple).round_up(int(rows * share)) for share in SHARES}
    sizes = {size for size in (*sizes, least) if least <= size < rows}
    if len(pruner.table) < rows:  # removing padding costs nothing
        sizes.add(len(pruner.table))
    if not sizes:
        warnings.warn(
            f"vocab_size='auto' finds no size to try, so all {rows:,} vocabulary entries stay: with pad_to_multiple_of="
            f"{multiple:,} no multiple lies between the {least:,} entries that must stay and all of them.",
            PruningWarning,
            stacklevel=2,
        )
    for size in tqdm(
        sorted(sizes, reverse=True), desc="Weighing vocabularies", unit="size", name="hf_context_prune.vocabulary"
    ):
        if size > len(pruner.table):  # padded rows
            continue
        trimmed = pruner.trim(VocabularySize(size, pad_to_multiple_of=multiple), refit=False)
        excess = probe.loss(trimmed.model, trimmed.tokenizer) - probe.base_loss
        curve.append((trimmed.model.config.vocab_size, max(0.0, excess)))
    return curve
