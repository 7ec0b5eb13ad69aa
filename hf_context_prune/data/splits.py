"""Splits by document: held-out text, and text apart from the calibration text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import ConfigError, DataError

from .decontamination import drop_overlapping
from .documents import TextDocument, TextSource, load_documents, stable_hash


def hold_out_documents(
    source: TextSource, *, fraction: float = 0.1, max_documents: int | None = None, seed: int = 0
) -> tuple[TextSource, TextSource]:
    """Splits off documents for evaluation.

    Documents of one ``doc``, and documents with the same text, stay on one side. The choice depends on the seed and the
    names alone, not on the order of the input, and takes its share of every ``source``.

    Args:
        source: Documents to split.
        fraction: Share of the documents to hold out, in (0, 1).
        max_documents: Hold out at most that many.
        seed: Chooses the documents.

    Returns:
        (rest, held out), each in the order of the input and with at least one document.

    Raises:
        DataError: There is only one distinct document.
        ConfigError: ``fraction`` or ``max_documents`` is out of range.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out fraction is {fraction}, but must lie strictly between 0 and 1")
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"max_documents is {max_documents}, but must be at least 1")
    leader = _groups(source.documents)
    strata: dict[str, list[str]] = {}
    stratum_of: dict[str, str] = {}
    for document in source.documents:
        group = leader[document.doc]
        stratum_of[group] = min(document.source, stratum_of.get(group, document.source))
    for group, stratum in stratum_of.items():
        strata.setdefault(stratum, []).append(group)
    total = len(stratum_of)
    if total < 2:
        raise DataError(
            f"{source.name}: {total} distinct document(s), but a split by document needs at least 2; "
            "give data whose records are separate documents"
        )
    wanted = min(max(1, round(fraction * total)), max_documents or total, total - 1)
    # Largest remainders: every source gives its share to within one document, and the sum is exact.
    quota = {stratum: wanted * len(groups) / total for stratum, groups in strata.items()}
    take = {stratum: int(share) for stratum, share in quota.items()}
    by_remainder = sorted(quota, key=lambda stratum: (take[stratum] - quota[stratum], stratum))
    for stratum in by_remainder[: wanted - sum(take.values())]:
        take[stratum] += 1
    held = {
        group
        for stratum, groups in strata.items()
        for group in sorted(groups, key=lambda group: stable_hash("hold-out", seed, group))[: take[stratum]]
    }
    sides: tuple[list[TextDocument], list[TextDocument]] = ([], [])
    for document in source.documents:
        sides[leader[document.doc] in held].append(document)
    rest, held_out = (TextSource.from_documents(side, name=source.name, revision=source.revision) for side in sides)
    return rest, held_out


def _groups(documents: Iterable[TextDocument]) -> dict[str, str]:
    """Maps each ``doc`` to the least name of those that it is tied to by an equal text."""
    leader: dict[str, str] = {}

    def find(doc: str) -> str:
        while leader[doc] != doc:
            doc = leader[doc]
        return doc

    first_with: dict[bytes, str] = {}
    for document in documents:
        leader.setdefault(document.doc, document.doc)
        other = first_with.setdefault(stable_hash(document.text.strip()), document.doc)
        low, high = sorted((find(document.doc), find(other)))
        leader[high] = low
    return {doc: find(doc) for doc in leader}


def apart_from_general(held_out: TextSource, how: str, general: TextSource) -> tuple[TextSource, str]:
    """Held-out text without what the general calibration text has, and the sentence on it."""
    left, dropped = drop_overlapping(held_out, general)
    if not len(left):
        raise DataError(
            f"Every held-out document is also in the general text {general.name} that general_data_ratio calibrates "
            f"on, so figures on it would say nothing. Give other text to mix in, or other held-out text (--eval-data)."
        )
    if dropped:
        how += f" {dropped:,} of these documents were dropped: the general text that is calibrated on has them too."
    return left, how


def split_text(
    data: Any,  # noqa: ANN401
    eval_data: Any,  # noqa: ANN401
    config: PrunerConfig,
    tokenizer: Any,  # noqa: ANN401
    *,
    use: str = "calibration",
    withholds: bool = False,
) -> tuple[TextSource, TextSource, str]:
    """The text for a use, the text for the figures, and a sentence on how they were kept apart.

    With `withholds`, the use itself needs a second document, so text of their own for the figures would not do.
    """
    options = {"text_column": config.text_column, "tokenizer": tokenizer, "seed": config.pruning_seed}
    text = load_documents(data, **options)
    if eval_data is None:
        try:
            rest, given = hold_out_documents(text, seed=config.pruning_seed)
        except DataError as error:
            if withholds:
                raise
            raise DataError(f"{error}, or where only the figures need it, text of their own (--eval-data)") from error
        how = f"{len(given):,} of {len(text):,} documents of {text.name} were held out before {use}, by document."
        remedy = "Give held-out text of its own (--eval-data), or text that repeats itself less."
    else:
        rest, given = text, load_documents(eval_data, **options)
        how = f"Text of its own ({given.name}), beside the {use} text {text.name}."
        remedy = f"Give other text, or leave --eval-data out to hold out documents of {text.name}."
    held_out, dropped = drop_overlapping(given, rest)
    if not len(held_out):
        what = "held-out document" if eval_data is None else f"document of the evaluation text {given.name}"
        raise DataError(
            f"Every {what} is also in the {use} text {text.name} (over a quarter of its 13-word sequences are); "
            f"figures on it would say nothing. {remedy}"
        )
    if dropped:
        how += (
            f" {dropped:,} of these {len(given):,} documents were dropped: the {use} text has over a quarter of "
            "their 13-word sequences too."
        )
    return rest, held_out, how
