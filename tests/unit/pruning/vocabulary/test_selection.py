"""Counting tokens, and choosing which to keep: sizes are exact, and what must stay or go does."""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_context_prune.data.documents import TextDocument, TextSource
from hf_context_prune.errors import BudgetError, DataError, VocabularyError
from hf_context_prune.pruning.vocabulary.selection import (
    EXPECTED_WEIGHT,
    TokenCounts,
    VocabularySize,
    choose_tokens,
    count_tokens,
    expected_scores,
)
from hf_context_prune.pruning.vocabulary.tokens import TokenTable
from tests.support.tiny_tokenizers import KINDS, corpus, quick, state_of, tokenizer_of


@cache
def counted(kind):
    """Table, counts of the made-up text, and its raw scores."""
    source = TextSource.from_documents([TextDocument(corpus(), "0", "s")])
    counts = count_tokens(tokenizer_of(kind), source)
    return TokenTable(state_of(kind)), counts, counts.occurrences


def test_occurrences_and_documents_against_single_encodings():
    tokenizer = tokenizer_of("llama3")
    tokenizer.model_max_length = 4  # longer texts are counted whole
    texts = ["the court the court", "", "the dose", "法院"] * 150
    documents = [TextDocument(text, str(place // 3), "s") for place, text in enumerate(texts)]
    counts = count_tokens(tokenizer, TextSource.from_documents(documents))
    occurrences, by_document = Counter(), {}
    for document in documents:
        ids = tokenizer.encode(document.text, add_special_tokens=False)
        occurrences.update(ids)
        by_document.setdefault(document.doc, set()).update(ids)
    assert counts.occurrences == occurrences
    assert counts.documents == Counter(index for ids in by_document.values() for index in ids)
    assert tokenizer.convert_tokens_to_ids("<|begin|>") not in counts.occurrences


def test_text_without_tokens_is_refused():
    for texts in ([], [""], ["Z\x7f"]):
        documents = [TextDocument(text, str(place), "s") for place, text in enumerate(texts)]
        source = TextSource.from_documents(documents, name="nothing.txt")
        with pytest.raises(DataError, match=r"nothing\.txt"):
            count_tokens(tokenizer_of("smollm2"), source)


def test_expected_scores_are_documents_and_a_share_of_the_expectation():
    counts = TokenCounts(Counter({0: 50, 2: 1}), Counter({0: 6, 2: 2}))
    scores = expected_scores(counts, [0.5, 0.25, 0.0, 0.25])
    assert scores == pytest.approx({i: d + EXPECTED_WEIGHT * 8 * p for i, (d, p) in enumerate(
        [(6, 0.5), (0, 0.25), (2, 0.0), (0, 0.25)]
    )})  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_any_size_is_reached_exactly_and_closed(kind):
    table, counts, _scores = counted(kind)
    must = table.mandatory()

    @quick
    @given(st.integers(0, len(table) - len(must)), st.sampled_from([1, 8, 64]), st.integers(0, 10**6))
    def check(more, multiple, seed):
        tokens, draw = len(must) + more, random.Random(seed)
        some = {index: draw.random() for index in table.contents}
        possible = [index for index in table.contents if not table.closure(index) & must - {index}]
        keep = draw.sample(possible, 1)
        if len(must | table.closed(keep)) > tokens:
            keep = []
        size = VocabularySize(tokens, pad_to_multiple_of=multiple)
        if tokens < len(table) <= size.round_up(tokens):
            with pytest.raises(BudgetError, match=r"rounds up to all .* tokens, so none would be removed"):
                choose_tokens(table, some, counts, size, keep=keep)
            return
        kept = choose_tokens(table, some, counts, size, keep=keep)
        assert len(kept) == min(-(-tokens // multiple) * multiple, len(table))
        assert kept >= must.union(keep)
        assert table.closed(kept) == kept
        again = choose_tokens(table, some, counts, size, keep=keep)
        assert again == kept

    check()


def test_the_best_scores_are_kept():
    table, counts, scores = counted("gpt2")
    must = table.mandatory()
    kept = choose_tokens(table, scores, counts, VocabularySize(len(must) + 30, pad_to_multiple_of=1))
    lost = [index for index in table.contents if index not in kept]
    # A token that is not kept has a lower score than every kept one, unless it needs more room than it would take.
    best_lost = max(lost, key=lambda index: scores[index])
    needed = {part for index in kept for part in table.closure(index) - {index}}
    worst = min((index for index in kept - must - needed), key=lambda index: scores[index])
    assert scores[best_lost] <= scores[worst] or len(table.closure(best_lost) - kept) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_coverage(kind, subtests):
    table, counts, scores = counted(kind)
    total, sizes = sum(counts.occurrences.values()), []
    for coverage in (0.2, 0.9, 0.99, 1.0):
        with subtests.test(coverage):
            kept = choose_tokens(table, scores, counts, VocabularySize(coverage=coverage, pad_to_multiple_of=1))
            assert sum(counts.occurrences[index] for index in kept) >= coverage * total
            rounded = choose_tokens(table, scores, counts, VocabularySize(coverage=coverage, pad_to_multiple_of=16))
            assert len(rounded) == min(-(-len(kept) // 16) * 16, len(table))
            sizes.append(len(kept))
    assert kept == table.mandatory() | table.closed(counts.occurrences)
    assert sizes[0] < sizes[2]


@pytest.mark.parametrize("kind", KINDS)
def test_min_count(kind, subtests):
    table, counts, scores = counted(kind)
    for least in (1, 20, 10**9):
        with subtests.test(least):
            frequent = {index for index, count in counts.occurrences.items() if count >= least}
            kept = choose_tokens(table, scores, counts, VocabularySize(min_count=least, pad_to_multiple_of=1))
            assert kept == table.mandatory() | table.closed(frequent)


def test_too_small_a_size_names_the_least():
    table, counts, scores = counted("gpt2")
    with pytest.raises(BudgetError, match=r"vocab_size is 100,.*\b258\b.*\b320\b"):
        choose_tokens(table, scores, counts, VocabularySize(100))
    with pytest.raises(BudgetError, match=r"257,.*\b258\b.*\b258\b"):
        choose_tokens(table, scores, counts, VocabularySize(257, pad_to_multiple_of=1))
    for size in (VocabularySize(258, pad_to_multiple_of=1), VocabularySize(257)):
        assert (
            len(choose_tokens(table, scores, counts, size))
            == -(-size.tokens // size.pad_to_multiple_of) * size.pad_to_multiple_of
        )
    with pytest.raises(BudgetError, match=r"461,.*\b460\b"):
        choose_tokens(table, scores, counts, VocabularySize(461, pad_to_multiple_of=1))


def test_what_is_made_from_a_removed_token_goes_with_it():
    table, counts, scores = counted("gpt2")
    gone = table.vocab["Ġc"]
    made = {index for index in table.contents if gone in table.closure(index)}
    assert len(made) > 2
    with pytest.raises(BudgetError, match=r"vocab_coverage is 1, .* 9[0-9]\.[0-9]+%"):
        choose_tokens(table, scores, counts, VocabularySize(coverage=1.0, pad_to_multiple_of=1), remove=[gone])
    kept = choose_tokens(table, scores, counts, VocabularySize(min_count=1, pad_to_multiple_of=1), remove=[gone])
    assert not kept & made
    assert len(choose_tokens(table, scores, counts, VocabularySize(len(table)), remove=[gone])) == len(table) - len(
        made
    )
    least = choose_tokens(table, scores, counts, VocabularySize(min_count=1, pad_to_multiple_of=1), remove=[gone])
    assert not least & made
    assert table.closed(least) == least


def test_a_token_that_must_stay_cannot_be_removed():
    for kind, token in (("gpt2", "<|im_start|>"), ("gpt2", "a"), ("llama2", "<0xE4>")):
        table, counts, scores = counted(kind)
        index = {**table.vocab, **table.added}[token]
        with pytest.raises(VocabularyError, match=re.escape(repr(token)) + ".* must stay"):
            choose_tokens(table, scores, counts, VocabularySize(coverage=0.9), remove=[index])


def test_a_token_cannot_be_kept_and_removed():
    table, counts, scores = counted("gpt2")
    part, whole = table.vocab["Ġc"], table.vocab["Ġcourt"]
    assert part in table.closure(whole)
    with pytest.raises(VocabularyError, match="must stay"):
        choose_tokens(table, scores, counts, VocabularySize(coverage=0.9), keep=[whole], remove=[part])
    with pytest.raises(VocabularyError, match=r"\b99999\b"):
        choose_tokens(table, scores, counts, VocabularySize(coverage=0.9), remove=[99_999])
