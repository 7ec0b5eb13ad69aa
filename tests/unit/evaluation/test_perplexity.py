"""Losses per document against a plain loop, and the statistics on top of them."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from hf_context_prune.data.documents import TextDocument, TextSource
from hf_context_prune.errors import ConfigError, DataError, NumericsError
from hf_context_prune.evaluation.losses import DocumentLoss, compare_losses, losses_by_source, summarize_losses
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.evaluation.windows import EncodedDocument, batch_windows, context_token, cut_windows
from tests.support.tiny_tokenizers import BYTE_LETTERS, byte_tokenizer

VOCAB_SIZE = len(BYTE_LETTERS) + 2
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64)


def tiny_model(config=LLAMA, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # far from uniform, so that a wrong context shows in the loss
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def text_source(*texts, docs=None):
    names = docs or [f"doc{index}" for index in range(len(texts))]
    records = [TextDocument(text, doc, "test") for text, doc in zip(texts, names, strict=True)]
    return TextSource.from_documents(records)


TEXTS = (
    "Short.",
    "The lessee shall keep — naïvely — ½ of it.",
    "x",
    "A document of more than several windows. " * 2,
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def losses_by_hand(model, tokenizer, text, window):
    """A plain loop: one forward pass a token, nothing batched, padded or cached."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    losses = []
    with torch.no_grad():
        for position in range(1, len(ids)):
            start = (position - 1) // window * window
            logits = model(torch.tensor([ids[start:position]])).logits[0, -1]
            losses.append(-torch.log_softmax(logits.double(), -1)[ids[position]].item())
    return losses


@pytest.mark.parametrize("window", [7, 64])
def test_losses_equal_a_plain_loop(model, tokenizer, window):
    results = document_losses(model, tokenizer, text_source(*TEXTS), max_seq_length=window, batch_tokens=100)
    assert [result.doc for result in results] == ["doc0", "doc1", "doc2", "doc3"]
    for result, text in zip(results, TEXTS, strict=True):
        expected = losses_by_hand(model, tokenizer, text, window)
        assert result.num_tokens == len(expected) == result.num_bytes == len(text.encode())
        assert result.nll == pytest.approx(sum(expected), rel=1e-5)


def test_every_token_is_a_target_once_after_its_predecessor():
    records = [list(range(100, 123)), [7], [], list(range(200, 210))]
    windows = list(cut_windows([EncodedDocument("d", "s", 0, records)], 99, 10))
    assert [token for window in windows for token in window.targets] == [*itertools.chain(*records)]
    before = {99: {100, 7, 200}} | {token: {token + 1} for token in [*range(100, 122), *range(200, 209)]}
    for window in windows:
        assert len(window.inputs) == len(window.targets) <= 10
        assert all(target in before[token] for token, target in zip(window.inputs, window.targets, strict=True))


def test_batches_hold_every_window_and_keep_the_budget():
    windows = list(cut_windows([EncodedDocument("d", "s", 0, [[1] * n for n in (30, 30, 5, 9, 1, 2)])], 0, 30))
    windows.sort(key=lambda window: -len(window.inputs))
    batches = list(batch_windows(windows, 20))
    assert [window for batch in batches for window in batch] == windows
    assert [len(batch) for batch in batches] == [1, 1, 2, 2]


def test_a_model_without_opinions_pays_log_vocabulary_a_token(tokenizer):
    flat = LlamaForCausalLM(LLAMA)
    torch.nn.init.zeros_(flat.lm_head.weight)
    for result in document_losses(flat, tokenizer, text_source(*TEXTS), max_seq_length=16):
        assert result.nll == pytest.approx(result.num_tokens * math.log(VOCAB_SIZE), rel=1e-6)


FAMILIES = {
    "llama": LLAMA,
    "gpt2": GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=64),
    "gemma2": Gemma2Config(
        **SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=8
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_do_not_depend_on_the_batching(tokenizer, family):
    model = tiny_model(FAMILIES[family])
    source = text_source(*TEXTS)
    alone = document_losses(model, tokenizer, source, max_seq_length=24, batch_tokens=1)
    for batch_tokens in (50, 4096):
        together = document_losses(model, tokenizer, source, max_seq_length=24, batch_tokens=batch_tokens)
        assert [a.nll for a in alone] == pytest.approx([b.nll for b in together], rel=1e-5)


def test_half_precision_is_summed_in_double(tokenizer):
    model = tiny_model()
    exact = document_losses(model, tokenizer, text_source(*TEXTS), max_seq_length=16)
    half = document_losses(model.to(torch.bfloat16), tokenizer, text_source(*TEXTS), max_seq_length=16)
    assert [a.nll for a in exact] == pytest.approx([b.nll for b in half], rel=0.05)


def test_the_models_mode_is_given_back(tokenizer):
    model = tiny_model().train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    document_losses(model, tokenizer, text_source("text"), max_seq_length=16)
    assert {name: module.training for name, module in model.named_modules()} == before
    bad = text_source("text", docs=["x"])
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(NumericsError):
        document_losses(model, tokenizer, bad, max_seq_length=16)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_records_of_one_document_are_one_document(model, tokenizer):
    split = document_losses(
        model, tokenizer, text_source("one", "other", "two", docs=["a", "b", "a"]), max_seq_length=16
    )
    single = document_losses(model, tokenizer, text_source("one", "two"), max_seq_length=16)
    assert [result.doc for result in split] == ["a", "b"]
    assert split[0].nll == pytest.approx(single[0].nll + single[1].nll, rel=1e-5)
    assert (split[0].num_tokens, split[0].num_bytes) == (6, 6)


def test_a_token_budget_takes_whole_documents(model, tokenizer):
    source = text_source(*(f"document number {index:02d}" for index in range(20)))  # 18 tokens each
    results = document_losses(model, tokenizer, source, max_seq_length=16, max_tokens=100)
    assert len(results) == 5
    assert all(result.num_tokens == 18 for result in results)
    docs = [result.doc for result in results]
    assert docs == sorted(docs, key=lambda doc: int(doc[3:]))  # the order of the source
    assert results == document_losses(model, tokenizer, source, max_seq_length=16, max_tokens=100)
    other = document_losses(model, tokenizer, source, max_seq_length=16, max_tokens=100, seed=1)
    assert [result.doc for result in other] != docs
    assert len(document_losses(model, tokenizer, source, max_seq_length=16, max_tokens=1)) == 1
    chosen = document_losses(model, tokenizer, source, max_seq_length=16, docs=docs)
    assert [result.doc for result in chosen] == docs


def test_unknown_docs_are_refused(model, tokenizer):
    with pytest.raises(DataError, match="'nowhere'"):
        document_losses(model, tokenizer, text_source("text"), max_seq_length=16, docs=["nowhere"])


def test_empty_text_is_refused(model, tokenizer, subtests):
    for texts in [(), ("",), ("", "")]:
        with subtests.test(texts=texts), pytest.raises(DataError, match="no text to score"):
            document_losses(model, tokenizer, text_source(*texts), max_seq_length=16)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    small = tiny_model(LlamaConfig(**(SIZES | {"vocab_size": 100}), intermediate_size=48))
    with pytest.raises(DataError, match=rf"the id {VOCAB_SIZE - 2} \('<s>'\).*only 100 token rows"):
        document_losses(small, tokenizer, text_source("text"), max_seq_length=16)


def test_eos_leads_where_there_is_no_bos_and_neither_is_refused(model, tokenizer):
    lead = byte_tokenizer(eos_token="<s>")
    source = text_source(*TEXTS)
    assert document_losses(model, lead, source, max_seq_length=16) == document_losses(
        model, tokenizer, source, max_seq_length=16
    )
    with pytest.raises(DataError, match="neither a bos nor an eos"):
        document_losses(model, byte_tokenizer(unk_token="<s>"), source, max_seq_length=16)


def test_a_bos_that_only_pads_leads_nothing(subtests):
    for names, lead in (
        ({"bos_token": "<s>", "eos_token": "a", "pad_token": "<s>"}, "a"),  # Qwen2.5 in GGUF files
        ({"bos_token": "<s>", "eos_token": "a", "pad_token": "b"}, "<s>"),  # SmolLM2
        ({"bos_token": "<s>", "pad_token": "<s>"}, "<s>"),
    ):
        with subtests.test(**names):
            tokenizer = byte_tokenizer(**names)
            assert context_token(tokenizer) == tokenizer.convert_tokens_to_ids(lead)
    adds = byte_tokenizer(bos_token="<s>", eos_token="a", pad_token="<s>")
    adds._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", adds.bos_token_id)])
    assert context_token(adds) == adds.bos_token_id


def test_non_finite_logits_name_the_document(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("Z", add_special_tokens=False)["input_ids"][0]] = math.nan
    source = text_source("fine", "a Z in it", "fine too", docs=["good", "bad", "well"])
    with pytest.raises(NumericsError, match="'bad'"):
        document_losses(model, tokenizer, source, max_seq_length=16)


IMPOSSIBLE_LENGTHS = [
    ({"max_seq_length": 65}, "the model has 64 positions"),
    ({"max_seq_length": 0}, "max_seq_length is 0"),
    ({"max_seq_length": 16, "batch_tokens": 0}, "batch_tokens is 0"),
    ({"max_seq_length": 16, "max_tokens": 0}, "max_tokens is 0"),
]


def test_impossible_lengths_are_refused(model, tokenizer, subtests):
    for options, message in IMPOSSIBLE_LENGTHS:
        with subtests.test(options=options, message=message), pytest.raises(ConfigError, match=message):
            document_losses(model, tokenizer, text_source("text"), **options)


def random_losses(seed=0, count=60):
    """Losses of a base and of a pruned model: documents differ a lot, the models by a tenth of a nat."""
    random = np.random.default_rng(seed)
    base, pruned = [], []
    for index in range(count):
        tokens = int(random.integers(50, 500))
        nats = random.normal(3.0, 0.6)
        sizes = {"doc": f"d{index}", "source": "test", "num_tokens": tokens, "num_bytes": 4 * tokens}
        base.append(DocumentLoss(nll=nats * tokens, **sizes))
        pruned.append(DocumentLoss(nll=(nats + random.normal(0.1, 0.02)) * tokens, **sizes))
    return base, pruned


def test_a_summary_holds_ratios_of_sums_within_their_intervals():
    losses, _ = random_losses()
    summary = summarize_losses(losses, seed=3, n_resamples=500)
    nll, tokens = sum(loss.nll for loss in losses), sum(loss.num_tokens for loss in losses)
    assert summary.nats_per_token.value == pytest.approx(nll / tokens)
    assert summary.bits_per_byte.value == pytest.approx(nll / math.log(2) / (4 * tokens))
    assert summary.perplexity.value == pytest.approx(math.exp(nll / tokens))
    for estimate in (summary.nats_per_token, summary.bits_per_byte, summary.perplexity):
        low, high = estimate.interval
        assert low < estimate.value < high
    assert summary.perplexity.interval == pytest.approx([math.exp(bound) for bound in summary.nats_per_token.interval])
    assert (summary.num_documents, summary.num_tokens, summary.num_bytes) == (60, tokens, 4 * tokens)
    assert (summary.seed, summary.n_resamples) == (3, 500)
    assert summary == summarize_losses(losses, seed=3, n_resamples=500)
    assert summary != summarize_losses(losses, seed=4, n_resamples=500)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits = 0
    for trial in range(100):
        values = np.random.default_rng(trial).normal(2.0, 0.5, 50)
        losses = [DocumentLoss(f"d{i}", "s", 100 * value, 100, 400) for i, value in enumerate(values)]
        low, high = summarize_losses(losses, seed=trial, n_resamples=400).nats_per_token.interval
        hits += low < 2.0 < high
    assert 85 <= hits <= 99


def losses_of_sources(seed, sources, documents):
    """Documents of one source are alike: sources differ by half a nat, documents of a source by a tenth."""
    random = np.random.default_rng(seed)
    return [
        DocumentLoss(f"{source}-{index}", f"s{source}", 100 * (mean + random.normal(0, 0.1)), 100, 400)
        for source, mean in enumerate(random.normal(2.0, 0.5, sources))
        for index in range(documents)
    ]


def test_intervals_cover_the_truth_of_other_sources_too():
    hits, narrow = 0, 0
    for trial in range(60):
        losses = losses_of_sources(trial, 12, 8)
        low, high = summarize_losses(losses, seed=trial, n_resamples=400).nats_per_token.interval
        hits += low < 2.0 < high
        alike = [dataclasses.replace(loss, source="one") for loss in losses]
        low, high = summarize_losses(alike, seed=trial, n_resamples=400).nats_per_token.interval
        narrow += low < 2.0 < high
    assert 48 <= hits <= 60
    assert narrow < 40  # documents alone would claim too much


def test_few_sources_have_a_range_in_place_of_an_interval():
    losses = losses_of_sources(0, 4, 20)
    for summary in (summarize_losses(losses), summarize_losses(losses[::10])):  # eighty documents, and eight
        means = [one.models["base"] for one in losses_by_source({"base": losses})]
        assert summary.bits_per_byte.interval is None
    assert summarize_losses(losses).bits_per_byte.span == pytest.approx((min(means), max(means)))
    assert summarize_losses(losses).perplexity.span[0] < summarize_losses(losses).perplexity.value
    comparison = compare_losses(losses, losses)
    assert comparison.bits_per_byte_ratio.span == (1, 1)
    five = summarize_losses(losses_of_sources(0, 5, 20)).bits_per_byte
    assert five.span is None
    assert five.interval is not None


def test_losses_by_source():
    losses = losses_of_sources(0, 3, 5)
    pruned = [dataclasses.replace(loss, nll=2 * loss.nll) for loss in losses]
    found = losses_by_source({"base": losses, "pruned": pruned})
    assert [(one.number, one.num_documents) for one in found] == [(1, 5), (2, 5), (3, 5)]
    for one in found:
        own = [loss for loss in losses if loss.source == f"s{one.number - 1}"]
        assert one.models["base"] == pytest.approx(summarize_losses(own).bits_per_byte.value)
        assert one.models["pruned"] == pytest.approx(2 * one.models["base"])
    assert losses_by_source({"base": losses[:5]}) == ()


def test_a_single_document_has_no_interval():
    loss = DocumentLoss("d", "s", 20.0, 10, 40)
    assert summarize_losses([loss]).bits_per_byte.interval is None
    assert summarize_losses([loss]).perplexity.interval is None
    assert compare_losses([loss], [loss]).excess_nats_per_token.interval is None


def test_a_paired_comparison_is_narrower_than_two_separate_intervals():
    base, pruned = random_losses()
    comparison = compare_losses(base, pruned[::-1])  # paired by document, not by place
    assert comparison.num_documents == 60
    excess = comparison.excess_nats_per_token
    assert excess.value == pytest.approx(0.1, abs=0.02)
    assert 0 < excess.interval[0] < excess.value < excess.interval[1]
    summaries = [summarize_losses(losses) for losses in (base, pruned)]
    unpaired = sum(summary.nats_per_token.interval[1] - summary.nats_per_token.interval[0] for summary in summaries)
    assert excess.interval[1] - excess.interval[0] < unpaired / 4
    bits = [summary.bits_per_byte.value for summary in summaries]
    assert comparison.bits_per_byte_difference.value == pytest.approx(bits[1] - bits[0])
    assert comparison.bits_per_byte_ratio.value == pytest.approx(bits[1] / bits[0])
    assert comparison.bits_per_byte_ratio.interval[0] > 1


def test_a_model_against_itself_has_no_excess():
    base, _ = random_losses()
    comparison = compare_losses(base, base)
    assert comparison.excess_nats_per_token.interval == (0, 0)
    assert comparison.bits_per_byte_ratio.interval == pytest.approx((1, 1))


def test_other_token_counts_leave_bits_per_byte_only():
    base, pruned = random_losses()
    recut = [DocumentLoss(loss.doc, loss.source, loss.nll, loss.num_tokens + 3, loss.num_bytes) for loss in pruned]
    comparison = compare_losses(base, recut)
    assert comparison.excess_nats_per_token is None
    assert comparison.bits_per_byte_ratio == compare_losses(base, pruned).bits_per_byte_ratio


def test_unmatched_documents_are_refused():
    base, pruned = random_losses()
    with pytest.raises(DataError, match=r"different documents: 1 .*'d59'"):
        compare_losses(base, pruned[:-1])
    with pytest.raises(DataError, match="'d0' occurs twice"):
        compare_losses([*base, base[0]], pruned)
    other = DocumentLoss("d0", "test", 1.0, base[0].num_tokens, 1)
    with pytest.raises(DataError, match="the texts differ"):
        compare_losses(base, [other, *pruned[1:]])
    with pytest.raises(DataError, match="no document losses"):
        compare_losses([], [])
    with pytest.raises(DataError, match="no document losses"):
        summarize_losses([])


def test_impossible_statistics_are_refused():
    base, _ = random_losses()
    with pytest.raises(ConfigError, match="n_resamples is 0"):
        summarize_losses(base, n_resamples=0)
    with pytest.raises(NumericsError, match="perplexity"):
        summarize_losses([DocumentLoss("d", "s", 8000.0, 10, 40)])
