"""Samples begin as the tokenizer begins a text, and more of them are of more documents."""

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from hf_context_prune.data.documents import TextDocument, TextSource
from hf_context_prune.data.samples import leading_token, tokenize_samples
from hf_context_prune.evaluation.perplexity import document_losses
from tests.support.tiny import tiny_model, tiny_tokenizer

TEXT = "The lessee shall keep the premises in good repair until the term of this lease ends. " * 12


@pytest.fixture(scope="module")
def plain():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def led(plain):
    """As Llama's: its own <s> comes before every text."""
    tokenizer = copy.deepcopy(plain)
    special = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    return tokenizer


def source(*texts):
    return TextSource.from_documents([TextDocument(text, f"d{index}", "test") for index, text in enumerate(texts)])


def test_only_what_the_tokenizer_adds_itself(plain, led):
    assert plain.bos_token_id is not None
    assert leading_token(plain) is None
    assert leading_token(led) == led.bos_token_id
    led_by_another = copy.deepcopy(led)
    led_by_another.bos_token = "</s>"
    assert leading_token(led_by_another) is None


def test_every_block_begins_with_it(plain, led):
    options = {"num_samples": 3, "max_seq_length": 16}
    without, blocks = (tokenize_samples(source(TEXT), own, **options) for own in (plain, led))
    assert blocks.shape == without.shape == (3, 16)
    assert (blocks[:, 0] == led.bos_token_id).all()
    # The text goes on from block to block without a gap.
    text = blocks[:, 1:].flatten().tolist()
    assert plain.decode(text) in TEXT
    assert led.bos_token_id not in text
    short = tokenize_samples(source(TEXT), led, num_samples=1, max_seq_length=4096, warn_if_short=False)
    assert short[0].tolist() == led.encode(TEXT)
    assert tokenize_samples(source(TEXT), led, num_samples=20, max_seq_length=1).shape == (20, 1)


@pytest.mark.parametrize("window", [7, 64])
def test_every_window_begins_with_it_and_is_scored_once(led, window):
    model = tiny_model("llama").eval()
    (loss,) = document_losses(model, led, source(TEXT), max_seq_length=window)
    ids = led.encode(TEXT)[1:]
    expected = 0.0
    with torch.no_grad():
        for start in range(0, len(ids), window):
            part = ids[start : start + window]
            logits = model(torch.tensor([[led.bos_token_id, *part[:-1]]])).logits[0].double()
            expected += float(torch.nn.functional.cross_entropy(logits, torch.tensor(part), reduction="sum"))
    assert loss.num_tokens == len(ids)
    assert loss.nll == pytest.approx(expected, rel=1e-5)


def test_beyond_the_first_samples_each_document_gives_one(plain):
    text = source(*(f"word{number} " * 40 for number in range(600)))
    options = {"max_seq_length": 16, "seed": 0}
    few = tokenize_samples(text, plain, num_samples=400, **options)
    dense = tokenize_samples(text, plain, num_samples=800, **options)
    varied = tokenize_samples(text, plain, num_samples=800, varied_after=400, **options)
    assert torch.equal(varied[:400], few)
    assert torch.equal(dense[:400], few)

    def count_documents(samples):
        return (samples == plain.eos_token_id).sum() + 1

    assert count_documents(varied[400:]) > 3 * count_documents(dense[400:])
    # Where the documents are too few for that, they give more, and there are as many samples.
    assert len(tokenize_samples(text, plain, num_samples=1600, varied_after=400, **options)) == 1600
