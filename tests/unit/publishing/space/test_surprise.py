"""The surprise of two models at a text, piece by piece, whatever tokens each cuts it into."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hf_context_prune import load_model
from hf_context_prune.errors import ConfigError
from hf_context_prune.pruning.vocabulary.prune import prune_vocabulary
from hf_context_prune.publishing.space.surprise import Span, bits_per_byte, compare_surprise, join_words
from hf_context_prune.publishing.space.views import surprise_html
from tests.support.tiny import texts

TEXT = "the court finds that\n  the naïve 患者 was given a dose 🚀 of care."


@pytest.fixture(scope="module")
def base(tiny_space):
    return load_model(tiny_space / "base")


@pytest.fixture(scope="module")
def trimmed(base):
    pruned = prune_vocabulary(base.model, base.tokenizer, texts(), vocab_size=280, pad_to_multiple_of=1, refit=False)
    return replace(base, model=pruned.model, tokenizer=pruned.tokenizer)


def lead(loaded):
    return [loaded.tokenizer.bos_token_id]


def whole_bits(loaded, text):
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    inputs = torch.tensor([[*lead(loaded), *ids]])
    with torch.no_grad():
        logits = loaded.model(input_ids=inputs).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, inputs[0, 1:], reduction="sum")) / math.log(2)


def test_other_tokens_are_compared_by_piece(base, trimmed):
    ours, theirs = (loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"] for loaded in (base, trimmed))
    assert len(ours) < len(theirs)
    spans = compare_surprise(base, trimmed, TEXT, lead)
    assert "".join(span.text for span in spans) == TEXT
    assert 1 < len(spans) <= len(ours)
    assert sum(span.base for span in spans) == pytest.approx(whole_bits(base, TEXT), rel=1e-4)
    assert sum(span.pruned for span in spans) == pytest.approx(whole_bits(trimmed, TEXT), rel=1e-4)


def test_a_model_has_lost_nothing_against_itself(base):
    spans = compare_surprise(base, base, TEXT, lead)
    assert all(span.lost == 0 for span in spans)
    assert "lost-" not in surprise_html(spans).partition('class="pieces"')[2]


def test_text_beyond_the_positions_is_left_out(base, trimmed):
    long = TEXT * 40
    spans = compare_surprise(base, trimmed, long, lead)
    shown = "".join(span.text for span in spans)
    assert 0 < len(shown) < len(long)
    assert long.startswith(shown)


def test_a_tokenizer_that_knows_no_places(base):
    class Slow:
        is_fast, bos_token_id = False, 1

    with pytest.raises(ConfigError, match="does not tell where its tokens lie"):
        compare_surprise(base, replace(base, tokenizer=Slow()), TEXT, lead)


def test_words_are_joined_from_pieces():
    spans = [
        Span("The", 1.0, 2.0),
        Span(" inst", 1.0, 3.0),
        Span("itution", 0.5, 4.0),
        Span("\n", 1.0, 1.0),
        Span("x", 2, 2),
    ]
    assert join_words(spans) == [
        Span("The", 1.0, 2.0),
        Span(" institution", 1.5, 7.0),
        Span("\n", 1.0, 1.0),
        Span("x", 2, 2),
    ]
    assert bits_per_byte(spans) == (5.5 / 17, 12.0 / 17)


def test_colours_tooltips_and_the_table_tell_the_same():
    html = surprise_html(
        (Span("<b>", 1.0, 1.0), Span(" court", 1.0, 3.0), Span(" fish", 4.0, 2.9), Span(" sea", 0.5, 9))
    )
    assert '<span title="dense 1.0 bits, pruned 1.0 bits: about as likely">&lt;b&gt;</span>' in html
    assert '<span class="lost-2" title="dense 1.0 bits, pruned 3.0 bits: 4.0 times less likely">court</span>' in html
    assert 'class="gained-1" title="dense 4.0 bits, pruned 2.9 bits: 2.1 times more likely"' in html
    assert 'class="lost-4"' in html
    rows = html.partition("<tbody>")[2]
    assert rows.index("<td>sea</td>") < rows.index("<td>court</td>")  # what lost most comes first
    assert "fish" not in rows
    assert surprise_html(()).strip() == ""
