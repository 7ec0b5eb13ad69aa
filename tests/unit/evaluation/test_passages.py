"""Passages: the token budget, the documents that they come from, and that no tokenizer changes them."""

import pytest

from hf_context_prune.data.documents import TextDocument, TextSource
from hf_context_prune.evaluation.passages import SHORT_CHARS, WINDOW_CHARS, Passages
from hf_context_prune.evaluation.windows import group_records
from tests.support.tiny_tokenizers import byte_tokenizer

WORDS = [f"word{index}" for index in range(20)]


def corpus(*sizes, records=1):
    """Documents of so many words, in one or more records."""
    documents = []
    for index, size in enumerate(sizes):
        words = [WORDS[(index + place) % len(WORDS)] for place in range(size)]
        for part in range(records):
            documents.append(TextDocument(" ".join(words[part::records]), f"doc{index}", f"source{index % 3}"))
    return TextSource.from_documents(documents, name="corpus")


def num_tokens(source, tokenizer):
    return sum(len(tokenizer(record.text, add_special_tokens=False)["input_ids"]) for record in source.documents)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos_token="<s>")


@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("most", [1, 7, 100, 1_000, 5_000, 40_000])
def test_a_cap_is_a_cap_and_long_documents_share_it(tokenizer, most, records):
    source = corpus(*[4_000] * 12, *[30] * 20, records=records)
    passages = Passages.of(source, tokenizer, max_tokens=most)
    assert 0 < num_tokens(passages.text, tokenizer) <= most
    assert passages == Passages.of(source, tokenizer, max_tokens=most)
    whole = {doc: " ".join(record.text for record in records) for doc, records in group_records(source, None).items()}
    for record in passages.text.documents:
        assert record.text in whole[record.doc]
        if most > 1_000:  # cut between words
            assert set(record.text.split()) <= set(WORDS)


@pytest.mark.parametrize(("chars", "expected"), [(WINDOW_CHARS, 50), (SHORT_CHARS, 125)])
def test_a_budget_has_a_window_each_of_many_documents(tokenizer, chars, expected):
    """The first documents that filled the budget were two contracts of forty-six."""
    source = corpus(*[5_000] * 300)
    passages = Passages.of(source, tokenizer, max_tokens=100_000, passage_chars=chars)
    docs = {record.doc for record in passages.text.documents}
    assert len(docs) == pytest.approx(expected, rel=0.05)
    lengths = [len(record.text) for record in passages.text.documents]
    assert 0.9 * chars < min(lengths) <= max(lengths) <= 1.1 * chars
    assert num_tokens(passages.text, tokenizer) > 80_000
    assert passages.describe() == f"A passage each of {len(docs)} of 300 documents was measured."
    other = Passages.of(source, tokenizer, max_tokens=100_000, passage_chars=chars, seed=1)
    assert {record.doc for record in other.text.documents} != docs


def test_passages_are_longer_where_there_are_fewer_documents(tokenizer):
    passages = Passages.of(corpus(*[5_000] * 10), tokenizer, max_tokens=100_000)
    lengths = [len(record.text) for record in passages.text.documents]
    assert len(lengths) == 10
    assert min(lengths) > 4 * WINDOW_CHARS


def test_what_short_documents_leave_goes_to_long_ones(tokenizer):
    passages = Passages.of(corpus(*[20] * 9, 5_000), tokenizer, max_tokens=5_000)
    lengths = {record.doc: len(record.text) for record in passages.text.documents}
    assert len(lengths) <= 10
    assert num_tokens(passages.text, tokenizer) > 2_500
    assert max(lengths.values()) > 20 * min(lengths.values())


def test_a_text_within_the_budget_stays_whole(tokenizer):
    source = corpus(10, 20, 30)
    for most in (10_000, None):
        passages = Passages.of(source, tokenizer, max_tokens=most)
        assert (passages.text, passages.max_chars, passages.describe()) == (source, None, "")


def test_the_characters_alone_decide_whatever_order_and_tokenizer(tokenizer):
    source = corpus(*[2_000] * 40)
    passages = Passages.of(source, tokenizer, max_tokens=9_000)
    assert Passages.within(source, passages.max_chars) == passages
    turned = TextSource.from_documents(reversed(source.documents), name="corpus")
    again = Passages.within(turned, passages.max_chars)
    assert sorted(record.text for record in again.text.documents) == sorted(
        record.text for record in passages.text.documents
    )


def test_text_without_spaces_is_cut_too(tokenizer):
    source = TextSource.from_documents([TextDocument("字" * 3_000, str(index), "one") for index in range(4)])
    passages = Passages.of(source, tokenizer, max_tokens=3_000)
    assert 2_000 < num_tokens(passages.text, tokenizer) <= 3_000
