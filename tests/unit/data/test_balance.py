"""Sources that count equally: equal parts of samples and passages, whatever their sizes."""

import pytest

from hf_context_prune.data.balance import check_sources, repeat_small_sources, share_evenly
from hf_context_prune.data.documents import TextDocument, TextSource, load_documents
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.errors import DataError
from hf_context_prune.evaluation.passages import Passages
from tests.support.tiny import tiny_tokenizer

WORDS = {"a": "court", "b": "dose", "c": "care"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def text_of(sizes):
    """A document of so many words for each number, of its source's own word."""
    documents = [
        TextDocument(f"{WORDS[source]} " * words, f"{source}{index}", source)
        for source, numbers in sizes.items()
        for index, words in enumerate(numbers)
    ]
    return TextSource.from_documents(documents)


def count_words(samples, tokenizer):
    decoded = tokenizer.decode(samples.flatten().tolist())
    return {source: decoded.count(word) for source, word in WORDS.items()}


def test_every_source_gives_as_many_tokens_as_far_as_it_has_them(tokenizer):
    text = text_of({"a": [60] * 60, "b": [60] * 20, "c": [20]})
    options = {"num_samples": 32, "max_seq_length": 32}
    by_size = count_words(tokenize_samples(text, tokenizer, **options), tokenizer)
    assert by_size["a"] > 2 * by_size["b"]
    found = count_words(tokenize_samples(text, tokenizer, **options, balance_sources=True), tokenizer)
    assert found["c"] == 20  # all that there is
    assert found["a"] + found["b"] > 200
    assert abs(found["a"] - found["b"]) <= 32  # a stretch


def test_documents_of_a_small_source_give_more(tokenizer):
    text = text_of({"a": [60] * 60, "b": [2000]})
    samples = tokenize_samples(text, tokenizer, num_samples=32, max_seq_length=32, balance_sources=True)
    found = count_words(samples, tokenizer)
    assert found["b"] >= 0.9 * found["a"] > 0


def test_more_balanced_samples_only_continue(tokenizer):
    text = text_of({"a": [40] * 60, "b": [300] * 6, "c": [100] * 10})
    options = {"max_seq_length": 32, "balance_sources": True}
    few = tokenize_samples(text, tokenizer, num_samples=8, **options)
    many = tokenize_samples(text, tokenizer, num_samples=32, varied_after=8, **options)
    assert many[:8].equal(few)
    assert many.equal(tokenize_samples(text, tokenizer, num_samples=32, varied_after=8, **options))
    other = tokenize_samples(text, tokenizer, num_samples=8, **options, seed=1)
    assert not other.equal(few)


def test_samples_are_of_a_hundred_documents_where_the_text_has_them(tokenizer):
    text = TextSource.from_documents([TextDocument("court " * 3000, f"d{n}", "a") for n in range(300)])
    for samples, length, documents in ((64, 512, 100), (128, 512, 100), (8, 512, 20), (4, 32, 4)):
        found = tokenize_samples(text, tokenizer, num_samples=samples, max_seq_length=length)
        assert (found == tokenizer.eos_token_id).sum() + 1 >= documents
        assert len(found) == samples


def test_passages_of_equal_parts(tokenizer):
    text = text_of({"a": [400] * 60, "b": [400] * 10, "c": [20]})
    for max_chars in (6_000, 20_000):
        found = Passages.within(text, max_chars, balance_sources=True)
        sizes = {name: sum(len(d.text) for d in found.text.documents if d.source == name) for name in WORDS}
        assert sizes["c"] == 100
        assert 0.95 < sizes["a"] / sizes["b"] < 1.05
        assert 0.95 * max_chars < sum(sizes.values()) <= max_chars
        assert found.num_documents == 71
        assert "sources" not in found.describe()
        assert found == Passages.within(text, max_chars, balance_sources=True)
    assert Passages.of(text, tokenizer, max_tokens=10**6, balance_sources=True).max_chars is None


def test_passages_tell_how_many_sources_they_have():
    text = text_of({"a": [60] * 60, "b": [60], "c": [60]})
    assert Passages.within(text, 2_000).describe().endswith("documents was measured (of 1 of 3 sources).")


def test_shares():
    assert share_evenly([5, 100, 100], 60) == [5, 27, 28]
    assert share_evenly([5, 7], 60) == [5, 7]
    assert share_evenly([], 60) == []


def test_documents_of_small_sources_are_repeated_up_to_four_times():
    repeated = repeat_small_sources(text_of({"a": [100], "b": [30, 10], "c": [1]}))
    sizes = {name: sum(len(d.text) for d in repeated.documents if d.source == name) for name in WORDS}
    assert sizes == {"a": 600, "b": 180, "c": 20} | {"b": sizes["b"]}
    assert 480 <= sizes["b"] <= 600
    assert len({document.doc for document in repeated.documents}) == len(repeated)


def test_a_text_of_one_source_says_how_to_name_several(tmp_path):
    text = load_documents(["the court", "the dose"])
    with pytest.raises(DataError, match=r"balance_sources.*all documents.*column 'source'.*leave balance_sources out"):
        check_sources(text)
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "the court finds"}\n')
    check_sources(load_documents(tmp_path))
    check_sources(load_documents([{"text": "the court", "source": "a"}, {"text": "the dose", "source": "b"}]))
