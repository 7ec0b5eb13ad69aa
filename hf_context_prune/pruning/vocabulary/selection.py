"""Choose which tokens to keep, by how often a domain uses them and how often the model expects them there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.utils import tqdm
from transformers import PreTrainedTokenizerBase

from hf_context_prune.config import DEFAULT_PAD_TO_MULTIPLE_OF
from hf_context_prune.data.documents import TextSource
from hf_context_prune.errors import BudgetError, ConfigError, DataError, VocabularyError

from .tokens import TokenTable

EXPECTED_WEIGHT = 0.3
"""Weight of the model's expectation beside the document counts; chosen on documents withheld from train text."""
_BATCH = 256


@dataclass
class TokenCounts:
    """How often a text uses each token.

    Attributes:
        occurrences: Occurrences of each id.
        documents: Documents that have each id at least once.
    """

    occurrences: Counter[int] = field(default_factory=Counter)
    documents: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Return the counts of two texts together."""
        return TokenCounts(self.occurrences + other.occurrences, self.documents + other.documents)

    def rare(self, share: float) -> set[int]:
        """Return the ids that occur in the text with at most this share of all occurrences."""
        total = self.occurrences.total()
        return {index for index, count in self.occurrences.items() if count / total <= share}


def count_tokens(tokenizer: PreTrainedTokenizerBase, source: TextSource) -> TokenCounts:
    """Count every token of a text.

    Raises:
        DataError: The text has no token.
    """
    counts = TokenCounts()
    seen: dict[str, set[int]] = {}
    with tqdm(total=len(source), desc="Counting tokens", unit="doc", name="hf_context_prune.vocabulary") as bar:
        for records in _batches(source.documents, _BATCH):
            encoded = tokenizer([record.text for record in records], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            for record, ids in zip(records, encoded, strict=True):
                counts.occurrences.update(ids)
                seen.setdefault(record.doc, set()).update(ids)
            bar.update(len(records))
    for ids in seen.values():
        counts.documents.update(ids)
    if not counts.occurrences:
        raise DataError(f"{source.name} has no token to count, so nothing says which tokens the domain needs.")
    return counts


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def expected_scores(counts: TokenCounts, expected: Sequence[float]) -> dict[int, float]:
    """Score tokens by the documents that use them, plus a share of how often the model expects them.

    Raw counts follow single documents (a name that one contract repeats); document counts do not. A text of any size
    lacks most rare words of its domain, while the model's mean probability of a token over the domain's contexts is
    above 0 for all of them.

    Args:
        counts: Counts in the train text.
        expected: Mean probability of each id over contexts of that text.
    """
    total, mass = sum(counts.documents.values()), sum(expected)
    return {
        index: counts.documents[index] + EXPECTED_WEIGHT * total * float(probability) / mass
        for index, probability in enumerate(expected)
    }


@dataclass(frozen=True)
class VocabularySize:
    """How many tokens stay, by exactly one of the four: tokens, coverage, min_count, above_share.

    Attributes:
        tokens: Number of tokens.
        coverage: Share of the text's token occurrences that must be kept tokens.
        min_count: Tokens that occur at least this often stay.
        above_share: Tokens with a larger share of all occurrences stay (the paper's embedding threshold).
        pad_to_multiple_of: The number of tokens is rounded up to a multiple of this.
    """

    tokens: int | None = None
    coverage: float | None = None
    min_count: int | None = None
    pad_to_multiple_of: int = DEFAULT_PAD_TO_MULTIPLE_OF
    above_share: float | None = None

    def round_up(self, tokens: int) -> int:
        """Round a number of tokens up to the next multiple."""
        return -(-tokens // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def check_removes(self, total: int, fewest: int = 1) -> None:
        """Refuse a number of tokens that is rounded up to all of them.

        Args:
            total: Tokens that there are.
            fewest: Tokens that must stay, for the message.

        Raises:
            BudgetError: Nothing would be removed, although fewer tokens are asked for.
        """
        if self.tokens is not None and self.tokens < total <= self.round_up(self.tokens):
            below = (total - 1) // self.pad_to_multiple_of * self.pad_to_multiple_of
            raise BudgetError(
                f"vocab_size is {self.tokens:,}, which pad_to_multiple_of={self.pad_to_multiple_of:,} rounds up to all "
                f"{total:,} tokens, so none would be removed. "
                + (f"Ask for at most {below:,}, or for" if below >= fewest else "Ask for")
                + " a smaller pad_to_multiple_of."
            )

    def check(self) -> None:
        """Refuse values out of range, and none or several sizes.

        Raises:
            ConfigError: A value is out of range, or not exactly one size is given.
        """
        sizes = (self.tokens, self.coverage, self.min_count, self.above_share)
        if sum(value is not None for value in sizes) != 1:
            raise ConfigError(
                "Give exactly one of vocab_size, vocab_coverage, vocab_min_count and embedding_threshold."
            )
        for name, value in (
            ("vocab_size", self.tokens),
            ("vocab_min_count", self.min_count),
            ("pad_to_multiple_of", self.pad_to_multiple_of),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be an integer of at least 1.")
        coverage = self.coverage
        if coverage is not None and (
            isinstance(coverage, bool) or not isinstance(coverage, int | float) or not 0 < coverage <= 1
        ):
            raise ConfigError(
                f"vocab_coverage is {coverage!r}; it must be a share above 0, up to 1: 0.995 keeps as many tokens as "
                f"make up 99.5 % of the text."
            )


def choose_tokens(
    table: TokenTable,
    scores: Mapping[int, float],
    counts: TokenCounts,
    size: VocabularySize,
    *,
    keep: Collection[int] = (),
    remove: Collection[int] = (),
) -> set[int]:
    """Return the tokens to keep: all mandatory tokens, then the best scores, each with the tokens it is made from.

    Args:
        table: The full vocabulary.
        scores: Higher is kept, by id.
        counts: Counts in the train text.
        size: How many tokens stay.
        keep: More ids that must stay.
        remove: Ids that must go, together with all tokens that are made from them.

    Raises:
        VocabularyError: A token to be removed must stay.
        BudgetError: Fewer tokens are asked for than must stay, or more than there are.
    """
    must = mandatory_tokens(table, size, keep, remove)
    gone = set(remove)
    possible = [index for index in table.contents if not table.closure(index) & gone] if gone else list(table.contents)
    limit = len(possible)
    if size.tokens is not None:
        limit = size.round_up(size.tokens)
    ranked = sorted(possible, key=lambda index: (-scores.get(index, 0.0), index))
    kept = set(must)
    if size.min_count is not None:
        kept |= table.closed(index for index in possible if counts.occurrences[index] >= size.min_count)
    elif size.above_share is not None:
        rare = counts.rare(size.above_share)
        kept |= table.closed(index for index in possible if counts.occurrences[index] and index not in rare)
    elif size.coverage is not None:
        kept = _cover(table, ranked, counts, size.coverage, kept)
        share = sum(counts.occurrences[index] for index in kept) / sum(counts.occurrences.values())
        if share < size.coverage and gone:
            raise BudgetError(
                f"vocab_coverage is {size.coverage:g}, but without the tokens to be removed (and those made from them) "
                f"the rest is {share:.2%} of the text. Ask for less, or remove fewer."
            )
    if size.tokens is None:
        limit = min(size.round_up(len(kept)), len(possible))
    return _fill(table, ranked, kept, limit)


def mandatory_tokens(
    table: TokenTable, size: VocabularySize, keep: Collection[int] = (), remove: Collection[int] = ()
) -> set[int]:
    """Return the tokens that stay with any text, and refuse a request that can't be met.

    Args:
        table: The full vocabulary.
        size: How many tokens stay.
        keep: More ids that must stay.
        remove: Ids that must go.

    Raises:
        VocabularyError: A token to be removed must stay.
        BudgetError: Fewer tokens are asked for than must stay, or more than there are.
    """
    must = table.mandatory() | table.closed(keep)
    _check_removable(table, must, remove)
    if size.tokens is not None:
        if size.round_up(size.tokens) < len(must):
            least = size.round_up(len(must))
            rounded = [f"at least {least:,}"] if least == len(must) or least < len(table) else []
            exact = [] if least == len(must) else [f"{len(must):,} and pad_to_multiple_of=1"]
            raise BudgetError(
                f"vocab_size is {size.tokens:,}, but {len(must):,} tokens must stay (special and added tokens, bytes "
                f"or single characters, and what the chat template and the config need). Ask for "
                f"{', or for '.join(rounded + exact)}."
            )
        if size.tokens > len(table):
            raise BudgetError(
                f"vocab_size is {size.tokens:,}, but the tokenizer has only {len(table):,} tokens. Ask for fewer."
            )
        size.check_removes(len(table), len(must))
    return must


def _check_removable(table: TokenTable, must: Collection[int], remove: Collection[int]) -> None:
    for index in sorted(remove):
        if index not in table.contents:
            raise VocabularyError(f"The token id {index} is to be removed, but the tokenizer has no such token.")
        if index in must:
            raise VocabularyError(
                f"The token {table.contents[index]!r} (id {index}) is to be removed, but it must stay: it is special, "
                f"a byte or single character, or needed by the chat template, the config, or a token that must stay."
            )


def _cover(table: TokenTable, ranked: Sequence[int], counts: TokenCounts, coverage: float, kept: set[int]) -> set[int]:
    """Add tokens by score until they cover a share of the text."""
    kept, total = set(kept), sum(counts.occurrences.values())
    covered = sum(counts.occurrences[index] for index in kept)
    for index in ranked:
        if covered >= coverage * total:
            break
        new = table.closure(index) - kept
        covered += sum(counts.occurrences[part] for part in new)
        kept |= new
    return kept


def _fill(table: TokenTable, ranked: Sequence[int], kept: set[int], limit: int) -> set[int]:
    """Add tokens by score, as long as they fit together with the tokens they are made from."""
    kept = set(kept)
    for index in ranked:
        if len(kept) >= limit:
            break
        new = table.closure(index) - kept
        if len(kept) + len(new) <= limit:
            kept |= new
    return kept
