"""Documents -> one run of tokens: a stretch of each, as long as it has to be for the tokens that are wanted."""

from __future__ import annotations

import heapq
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .balance import group_by_source
from .documents import TextDocument, TextSource, stable_hash

_DOCUMENTS = 100  # so many documents give the tokens, where there are as many
_SHORTEST_STRETCH = 200  # tokens: with less context than that, activations are those of beginnings
_SAMPLES_PER_DOCUMENT = 4  # so that a few long documents don't make up all the text
_CHARS_PER_TOKEN = 16  # of a long text, so much is tokenised
_BATCH = 64


@dataclass(frozen=True)
class LongestStretches:
    """Most tokens that a document gives.

    Attributes:
        first: Until there are `until` tokens.
        later: Beyond.
        until: A number of tokens; 0 where all documents give `later`.
        usual: Most that `later` becomes before `first` grows as well.
    """

    first: int
    later: int
    until: int
    usual: int

    @classmethod
    def of(cls, num_samples: int, length: int, *, varies: bool) -> LongestStretches:
        """Return the stretches for some samples.

        Args:
            num_samples: Number of samples.
            length: Tokens of each.
            varies: More samples follow, to which a document gives one at most.
        """
        usual = _SAMPLES_PER_DOCUMENT * length
        hundredth = num_samples * length // _DOCUMENTS
        longest = min(usual, max(hundredth, min(length, _SHORTEST_STRETCH)))
        return cls(longest, min(length, longest) if varies else longest, num_samples * length if varies else 0, usual)

    def grown(self) -> LongestStretches:
        """Return longer ones, for too few documents. What `until` covers stays as it is for as long as possible."""
        if self.until and self.later < self.usual:
            return LongestStretches(self.first, min(2 * self.later, self.usual), self.until, self.usual)
        return LongestStretches(2 * self.first, 2 * self.later, self.until, self.usual)

    def after(self, count: int) -> int:
        """Return the most that the next document gives, once there are `count` tokens."""
        return self.first if count < self.until else self.later

    @property
    def window(self) -> int:
        """Characters of a long text that are tokenised."""
        return _CHARS_PER_TOKEN * max(self.usual, self.first, self.later)


def join_stretches(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    needed: int,
    longest: LongestStretches,
    *,
    seed: int,
    balance_sources: bool,
) -> list[int]:
    """Join stretches of documents until there are enough tokens.

    Args:
        source: Documents to read.
        tokenizer: A ``transformers`` tokenizer.
        needed: Number of tokens.
        longest: Most tokens that a document gives, unless there would be too few.
        seed: Seed of the order of the documents, and of the places of the stretches.
        balance_sources: As for [`tokenize_samples`][].

    Returns:
        Token ids, at least `needed` where the documents hold as many.
    """
    # The word in the hash fixes the order of the documents, so it keeps its old name.
    order = sorted(source.documents, key=lambda document: stable_hash("blocks", seed, document.doc))
    queues: dict[str, Sequence[TextDocument]] = {"": order}
    if balance_sources:
        queues = dict(group_by_source(order))
    stretches = dict.fromkeys(queues, longest)
    while True:
        tokens, cut_short = _gather(queues, stretches, tokenizer, needed, seed)
        if not cut_short:
            return tokens
        for name in cut_short:
            stretches[name] = stretches[name].grown()


def _gather(
    queues: dict[str, Sequence[TextDocument]],
    stretches: dict[str, LongestStretches],
    tokenizer: PreTrainedTokenizerBase,
    needed: int,
    seed: int,
) -> tuple[list[int], list[str]]:
    """Join the next document of the queue that has given the fewest tokens, until there are enough.

    Returns:
        (token ids, the queues that ran out before, although documents of theirs were cut).
    """
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    batch = max(1, _BATCH // len(queues))
    readers = {
        name: _tokenized(documents, tokenizer, stretches[name].window, seed, batch)
        for name, documents in queues.items()
    }
    tokens: list[int] = []
    cut: set[str] = set()
    cut_short: list[str] = []
    given = [(0, name) for name in queues]  # in order, as a heap has to be
    while given and len(tokens) < needed:
        count, name = heapq.heappop(given)
        if (found := next(readers[name], None)) is None:
            cut_short += [name] if name in cut else []
            continue
        most = stretches[name].after(len(tokens))
        if len(found.ids) > most or not found.whole:
            cut.add(name)
        first = found.draw.randrange(len(found.ids) - most + 1) if len(found.ids) > most else 0
        stretch = found.ids[first : first + most]
        if tokens and stretch and separator is not None:
            tokens.append(separator)
        tokens.extend(stretch)
        heapq.heappush(given, (count + len(stretch), name))
    return tokens, cut_short


class _Tokenized(NamedTuple):
    """A tokenised document, with the generator that chooses its stretch."""

    ids: list[int]
    whole: bool
    draw: random.Random


def _tokenized(
    documents: Sequence[TextDocument], tokenizer: PreTrainedTokenizerBase, window: int, seed: int, batch: int
) -> Iterator[_Tokenized]:
    """Tokenise documents, some at a time; of a very long one, a window of so many characters."""
    for start in range(0, len(documents), batch):
        chunk = documents[start : start + batch]
        draws = [random.Random(stable_hash("stretch", seed, document.doc)) for document in chunk]
        texts = [_cut_window(document.text, window, draw) for document, draw in zip(chunk, draws, strict=True)]
        # verbose=False: a document longer than the model's context is fine here: it is cut into samples.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document, text, draw, ids in zip(chunk, texts, draws, encoded, strict=True):
            yield _Tokenized(ids, len(text) == len(document.text), draw)


def _cut_window(text: str, num_chars: int, draw: random.Random) -> str:
    """Return a random stretch of a very long text, from the start of a word, so that tokenising it stays cheap."""
    if len(text) <= num_chars:
        return text
    start = draw.randrange(len(text) - num_chars + 1)
    if start:
        space = re.compile(r"\s").search(text, start, start + num_chars // 2)
        start = space.start() if space else start
    return text[start : start + num_chars]
