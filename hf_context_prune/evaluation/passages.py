"""Passages of documents: a token budget spread over many documents, in place of the first few that fill it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_context_prune.data.balance import count_sources, share_evenly, split_by_source
from hf_context_prune.data.documents import TextDocument, TextSource, stable_hash

from .windows import group_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW_CHARS = 2_000
"""Characters of a passage whose loss is reported: about the 512 tokens of a window.

Shorter ones flatter a pruned model: with little context the base has to guess the domain, which the other knows.
"""
SHORT_CHARS = 800
"""Characters of a passage that sizes are compared on, where many documents matter more than the loss itself."""
_CHARS_PER_TOKEN = 6  # the first guess, too high on purpose: the budget is then lowered until it fits


@dataclass(frozen=True)
class Passages:
    """What is measured on: one passage of each of many documents, or a whole text.

    Attributes:
        text: The passages, each under the name of its document.
        max_chars: Characters that all passages may have together; None where the text is whole.
        num_documents: Number of documents of the text that they were cut from.
        num_sources: Number of its sources.
    """

    text: TextSource
    max_chars: int | None
    num_documents: int
    num_sources: int

    @classmethod
    def whole(cls, source: TextSource) -> Passages:
        """Take a whole text."""
        return cls(source, None, _count_documents(source), count_sources(source))

    @classmethod
    def of(
        cls,
        source: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int | None,
        passage_chars: int = WINDOW_CHARS,
        seed: int = 0,
        balance_sources: bool = False,
    ) -> Passages:
        """Cut passages of at most `max_tokens` tokens in all; a shorter text stays whole.

        Args:
            source: The text.
            tokenizer: Counts the tokens, without special tokens.
            max_tokens: Largest number of tokens; None takes the whole text.
            passage_chars: As for `within`.
            seed: Chooses documents and places.
            balance_sources: As for `within`.
        """
        if max_tokens is None:
            return cls.whole(source)
        max_chars = _CHARS_PER_TOKEN * max_tokens
        while True:
            found = cls.within(
                source, max_chars, passage_chars=passage_chars, seed=seed, balance_sources=balance_sources
            )
            tokens = _count_tokens(found.text, tokenizer)
            if tokens <= max_tokens or max_chars == 1:  # a single character may be several tokens
                return found
            if found.max_chars is None:
                max_chars = sum(len(record.text) for record in source.documents)
            max_chars = max(1, min(max_chars - 1, int(0.98 * max_chars * max_tokens / tokens)))

    @classmethod
    def within(
        cls,
        source: TextSource,
        max_chars: int,
        *,
        passage_chars: int = WINDOW_CHARS,
        seed: int = 0,
        balance_sources: bool = False,
    ) -> Passages:
        """Cut passages of at most `max_chars` characters in all, the same ones whatever the tokenizer.

        As many documents give a passage each as the budget has passages; there are more where documents are shorter,
        and the passages are longer where there are fewer documents.

        Args:
            source: The text.
            max_chars: Largest number of characters; a shorter text stays whole.
            passage_chars: Characters of a passage: `WINDOW_CHARS` where the loss is reported.
            seed: Chooses documents and places.
            balance_sources: Every source gives equally many characters, as far as it has them.
        """
        groups = group_records(source, None)
        sizes = {doc: sum(len(record.text) for record in records) for doc, records in groups.items()}
        if sum(sizes.values()) <= max_chars:
            return cls.whole(source)
        if balance_sources:
            return cls._within_each_source(source, max_chars, passage_chars, seed)
        order = sorted(groups)
        random.Random(seed).shuffle(order)
        wanted = max(1, max_chars // passage_chars)
        chosen, room = list[str](), 0
        for doc in order:
            if len(chosen) >= wanted and room >= max_chars:
                break
            chosen.append(doc)
            room += sizes[doc]
        cut: dict[str, list[TextDocument]] = {}
        left = max_chars
        for place, doc in enumerate(sorted(chosen, key=lambda doc: sizes[doc])):  # short ones leave room for long ones
            length = min(sizes[doc], left // (len(chosen) - place))
            cut[doc] = _cut_passage(groups[doc], length, seed)
            left -= sum(len(record.text) for record in cut[doc])
        passages = [record for doc in groups for record in cut.get(doc, ())]
        return cls._cut_from(source, passages, max_chars)

    @classmethod
    def _within_each_source(cls, source: TextSource, max_chars: int, passage_chars: int, seed: int) -> Passages:
        parts = split_by_source(source)
        shares = share_evenly([sum(len(record.text) for record in part.documents) for part in parts], max_chars)
        cut = [
            cls.within(part, share, passage_chars=passage_chars, seed=seed)
            for part, share in zip(parts, shares, strict=True)
            if share
        ]
        return cls._cut_from(source, [record for found in cut for record in found.text.documents], max_chars)

    @classmethod
    def _cut_from(cls, source: TextSource, passages: list[TextDocument], max_chars: int) -> Passages:
        text = TextSource.from_documents(passages, name=source.name, revision=source.revision)
        return cls(text, max_chars, _count_documents(source), count_sources(source))

    def describe(self) -> str:
        """Return a sentence on the choice; empty where the text is whole."""
        if self.max_chars is None:
            return ""
        documents, sources = _count_documents(self.text), count_sources(self.text)
        of_sources = f" (of {sources:,} of {self.num_sources:,} sources)" if sources < self.num_sources else ""
        return f"A passage each of {documents:,} of {self.num_documents:,} documents was measured{of_sources}."


def _count_documents(source: TextSource) -> int:
    return len({record.doc for record in source.documents})


def _count_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> int:
    texts = [record.text for record in source.documents]
    # verbose=False: a text longer than the model's positions is cut into windows later.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return sum(map(len, encoded))


def _cut_passage(records: list[TextDocument], length: int, seed: int) -> list[TextDocument]:
    """Cut a passage of at most `length` characters out of a document, between words where there are any."""
    spare = sum(len(record.text) for record in records) - length
    if spare <= 0:
        return records
    start = int.from_bytes(stable_hash("passage", seed, records[0].doc)[:4], "big") % (spare + 1)
    found = []
    for record in records:
        text = cut = record.text[start : start + length]
        if start:
            cut = cut[cut.find(" ") + 1 :]
        if start + length < len(record.text):
            cut = cut[: cut.rfind(" ")] if " " in cut else cut
        if text := cut if cut.strip() else text:
            found.append(replace(record, text=text))
        length -= max(0, min(length, len(record.text) - start))
        start = max(0, start - len(record.text))
        if length <= 0:
            break
    return found
