"""Losses of up to three models on one text, and the general text that shows what a pruned model forgot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data import TextSource, load_documents
from ..errors import DataError
from ..overlap import drop_overlapping
from .perplexity import compare_losses, document_losses, summarize_losses
from .report import DatasetFacts, LossFacts, TextLosses

Pair = tuple[Any, Any]
"""A model and its tokenizer."""


@dataclass(frozen=True)
class GeneralText:
    """Text of no domain, with the facts of the report."""

    source: TextSource
    facts: DatasetFacts


def read_general(data: Any, *, apart_from: TextSource | None, tokenizer: Any, seed: int) -> GeneralText | None:  # noqa: ANN401
    """The general text that a report is asked to have; None where none is asked for.

    Args:
        data: What `load_documents` reads, or None.
        apart_from: Calibration text; documents that share over a quarter of their 13-word sequences with it go.
        tokenizer: For chat messages.
        seed: Of the order of a streamed data set.

    Raises:
        DataError: Nothing is left of it, or it can't be read.
    """
    if data is None:
        return None
    source = load_documents(data, tokenizer=tokenizer, seed=seed)
    how = "The text that was given, as it is."
    if apart_from is not None:
        source, dropped = drop_overlapping(source, apart_from)
        if not len(source):
            raise DataError(
                f"Every document of the general text {source.name} is also in the calibration text {apart_from.name} "
                f"(over a quarter of its 13-word sequences are). Give other text, or leave --general-data out."
            )
        how = f"Text of its own ({source.name}), beside the calibration text {apart_from.name}."
        if dropped:
            how += f" {dropped:,} of its documents were dropped, as they are in the calibration text too."
    return GeneralText(source, DatasetFacts(source.name, source.revision, source.fingerprint, how))


def losses_on(
    source: TextSource,
    base: Pair,
    *,
    pruned: Pair | None = None,
    recovered: Pair | None = None,
    max_seq_length: int,
    max_tokens: int | None,
    seed: int,
) -> LossFacts:
    """Measure models on the same documents of a text; those that are not given are None in the facts."""
    first = document_losses(*base, source, max_seq_length=max_seq_length, max_tokens=max_tokens)
    docs = [loss.doc for loss in first]
    summaries, against = {}, {}
    for name, pair in (("pruned", pruned), ("recovered", recovered)):
        if pair is not None:
            losses = document_losses(*pair, source, max_seq_length=max_seq_length, docs=docs)
            summaries[name] = summarize_losses(losses, seed=seed)
            against[name] = compare_losses(first, losses, seed=seed)
    return LossFacts(
        base=summarize_losses(first, seed=seed),
        pruned=summaries.get("pruned"),
        comparison=against.get("pruned"),
        recovered=summaries.get("recovered"),
        recovered_comparison=against.get("recovered"),
    )


def general_losses(text: GeneralText | None, base: Pair, **how: Any) -> TextLosses | None:  # noqa: ANN401
    """As `losses_on`, of the general text, if there is one."""
    return None if text is None else TextLosses(text.facts, losses_on(text.source, base, **how))
