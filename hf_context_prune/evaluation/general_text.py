"""Facts of the texts and losses of a report, and the general text that shows what a pruned model forgot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextData, TextSource, load_documents
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.errors import DataError
from hf_context_prune.evaluation.reports.report import DatasetFacts, LossFacts

from .losses import (
    DocumentLoss,
    LossComparison,
    LossSummary,
    compare_losses,
    compare_summaries,
    losses_by_source,
    summarize_losses,
)
from .passages import Passages

ModelAndTokenizer: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class GeneralText:
    """General text, with its facts.

    Attributes:
        source: The documents to measure on.
        how: Sentences on how they were kept apart from other text.
        calibration: The rest of the documents, where they are calibrated on; else None.
        whole: Name, revision and fingerprint of the whole text, for the plan.
    """

    source: TextSource
    how: str
    calibration: TextSource | None
    whole: dict[str, Any]


def read_general(
    data: TextData | None,
    *,
    apart_from: TextSource | None,
    test: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    hold_out: bool = False,
) -> GeneralText | None:
    """Read the general text of a report.

    Args:
        data: A text source, as [`load_documents`][] reads it; None gives None.
        apart_from: Calibration text; documents that share over a quarter of their 13-word sequences with it are
            dropped.
        test: The domain's text that is measured on; documents that share as much with it are dropped too.
        tokenizer: Renders chat messages.
        seed: Seed of the order of a streamed dataset.
        hold_out: Measure on a tenth of the documents only, since the rest is, or was, calibrated on.

    Raises:
        DataError: The text can't be read, or no document is left.
    """
    if data is None:
        return None
    source = load_documents(data, tokenizer=tokenizer, seed=seed)
    whole = source.identity
    how, rest, all_of_it, dropped = "The text that was given, as it is.", None, source, 0
    if hold_out:
        rest, given = hold_out_documents(source, seed=seed)
        source, dropped = drop_overlapping(given, rest)
        if not len(source):
            raise DataError(
                f"general_data_ratio calibrates on the general text {all_of_it.name}, which repeats all {len(given):,} "
                f"documents of it that were held out for the figures. Give text with fewer repetitions."
            )
    for text, kind in ((apart_from, "the calibration text"), (test, "the domain's test text")):
        if text is None:
            continue
        source, more = drop_overlapping(source, text)
        dropped += more
        if not len(source):
            raise DataError(
                f"Every document of the general text {all_of_it.name} is also in {kind} {text.name} (over a quarter of "
                f"its 13-word sequences are). Give text of no domain, or leave --general-data out."
            )
    if apart_from is not None:
        how = f"The documents are of {source.name}; the calibration text is {apart_from.name}."
        if rest is not None:
            how = f"A tenth of the documents of {all_of_it.name}, whose other documents are calibrated on too."
    if dropped:
        how += f" {dropped:,} of its documents were dropped, as they are in the domain's text too."
    return GeneralText(source, how, rest, whole)


def dataset_facts(passages: Passages, how: str, max_seq_length: int) -> DatasetFacts:
    """Return the facts of a text that is measured on.

    Args:
        passages: What is measured on.
        how: Sentences on how it was kept apart from other text.
        max_seq_length: Tokens per window.
    """
    text = passages.text
    held_out = f"{how} {passages.describe()}".strip()
    return DatasetFacts(text.name, text.revision, text.fingerprint, held_out, passages.max_chars, max_seq_length)


def build_loss_facts(
    base: Sequence[DocumentLoss] | LossSummary | None,
    others: Mapping[str, Sequence[DocumentLoss]],
    *,
    seed: int,
    what: str = "text",
) -> LossFacts:
    """Return losses on the same documents as facts of a report.

    Args:
        base: Losses of the base; a summary of them gives comparisons without intervals, and None gives none.
        others: Losses of the ``"pruned"`` and the ``"recovered"`` model, as far as they exist.
        seed: Seed of the intervals.
        what: What the log calls the text, where it names its sources.
    """
    summaries = {name: summarize_losses(losses, seed=seed) for name, losses in others.items()}
    against: dict[str, LossComparison] = {}
    if isinstance(base, LossSummary):
        against = {name: compare_summaries(base, summary) for name, summary in summaries.items()}
    elif base is not None:
        against = {name: compare_losses(base, losses, seed=seed) for name, losses in others.items()}
    known = {} if base is None or isinstance(base, LossSummary) else {"base": base}
    return LossFacts(
        base=base if base is None or isinstance(base, LossSummary) else summarize_losses(base, seed=seed),
        pruned=summaries.get("pruned"),
        comparison=against.get("pruned"),
        recovered=summaries.get("recovered"),
        recovered_comparison=against.get("recovered"),
        by_source=losses_by_source({**known, **others}, what=what),
    )
