"""Splits by document: what is calibrated on, and what is held out and measured on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_context_prune.errors import ConfigError, DataError

from .balance import count_sources
from .decontamination import drop_overlapping
from .documents import TextData, TextDocument, TextSource, load_documents, stable_hash


def hold_out_documents(
    source: TextSource, *, fraction: float = 0.1, max_documents: int | None = None, seed: int = 0
) -> tuple[TextSource, TextSource]:
    """Split off documents that are not calibrated on.

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
    """Map each ``doc`` to the least name among those that it is tied to by an equal text."""
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


@dataclass(frozen=True)
class TextSplit:
    """Text of one domain, split by document into what is calibrated (or trained) on and what is measured on.

    Attributes:
        calibration: Documents to calibrate or train on.
        test: Documents that the reported numbers are measured on; none of them is in `calibration`.
        how: A sentence for the report on how the two were kept apart.
    """

    calibration: TextSource
    test: TextSource
    how: str

    @property
    def test_name(self) -> str | None:
        """The name of test text of its own; None where the test documents were held out of the other text."""
        return None if self.test.name == self.calibration.name else self.test.name

    @classmethod
    def of(
        cls,
        data: TextData,
        eval_data: TextData | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_column: str | None = None,
        seed: int = 0,
        use: str = "calibration",
        withholds: bool = False,
    ) -> TextSplit:
        """Read the text, and hold out a tenth of its documents unless there is test text of its own.

        Test documents that share over a quarter of their 13-word sequences with the calibration text are dropped.

        Args:
            data: Text of the domain: what [`load_documents`][] reads.
            eval_data: Test text; None holds out documents of `data`.
            tokenizer: Renders chat messages.
            text_column: Column with the text.
            seed: Chooses the documents that are held out.
            use: What `calibration` is for, as messages name it.
            withholds: The use itself needs a second document, so test text of its own would not help with a single one.

        Raises:
            DataError: A text can't be read, there is one document where two are needed, or no test document is left.
        """
        options: dict[str, Any] = {"text_column": text_column, "tokenizer": tokenizer, "seed": seed}
        text = load_documents(data, **options)
        if eval_data is None:
            try:
                rest, given = hold_out_documents(text, seed=seed)
            except DataError as error:
                if withholds:
                    raise
                raise DataError(f"{error}, or give test text of its own (--eval-data)") from error
            how = f"{len(given):,} of {len(text):,} documents of {text.name} were held out before {use}, by document"
            sources, tested = count_sources(text), count_sources(given)
            if tested < sources:
                how += f", of {tested:,} of its {sources:,} sources"
            how += "."
            what = "held-out document"
            remedy = "Give test text of its own (--eval-data), or text with fewer repetitions."
        else:
            rest, given = text, load_documents(eval_data, **options)
            how = f"The documents are of {given.name}; the {use} text is {text.name}."
            what = f"document of the evaluation text {given.name}"
            remedy = f"Give other text, or leave --eval-data out to hold out documents of {text.name}."
        test, dropped = drop_overlapping(given, rest)
        if not len(test):
            raise DataError(
                f"Every {what} is also in the {use} text {text.name} (over a quarter of its 13-word sequences are), so "
                f"numbers measured on it would say nothing. {remedy}"
            )
        if dropped:
            how += (
                f" {dropped:,} of these {len(given):,} documents were dropped, because the {use} text has over a "
                f"quarter of their 13-word sequences."
            )
        return cls(rest, test, how)

    def without(self, general: TextSource) -> TextSplit:
        """Return the same split without the test documents that general calibration text repeats.

        Raises:
            DataError: No test document is left.
        """
        left, dropped = drop_overlapping(self.test, general)
        if not len(left):
            raise DataError(
                f"Every held-out document is also in the general text {general.name} that general_data_ratio "
                f"calibrates on, so numbers measured on it would say nothing. Give other general text, or other test "
                f"text (--eval-data)."
            )
        how = self.how
        if dropped:
            how += f" {dropped:,} of these documents were dropped, because the general calibration text has them too."
        return replace(self, test=left, how=how)
