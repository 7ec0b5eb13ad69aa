"""The real tokenizer and model with a smaller vocabulary, on real text: nothing is lost, kept text is exact."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_context_prune import EvalOptions, PrunerConfig, prune
from hf_context_prune.data.documents import TextSource
from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.generation import generate_completion
from hf_context_prune.pruning.vocabulary.prune import TrimmedModel, VocabularyPruner
from hf_context_prune.pruning.vocabulary.selection import VocabularySize

pytestmark = [pytest.mark.real, pytest.mark.slow]

SHARED = Path(__file__).parents[3] / "shared" / "data"
MINIMUM = 320  # 313 tokens must stay, rounded up to a multiple of 64
EVERY = {"licences": 2, "shared": 10}
"""One of so many documents is read."""


@pytest.fixture(scope="module")
def pruner(smollm2, licences):
    return VocabularyPruner(smollm2.model, smollm2.tokenizer, licences.calibration, criterion="frequency")


@pytest.fixture(scope="module", params=[8_192, MINIMUM])
def trimmed(pruner, request) -> TrimmedModel:
    return pruner.trim(VocabularySize(request.param), refit=False)


def licence_documents(licences) -> Iterator[str]:
    source: TextSource
    for source in (licences.calibration, licences.held_out):
        yield from (document.text for document in source.documents)


def shared_documents() -> Iterator[str]:
    for file in sorted(SHARED.glob("*/corpus.*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    for file in sorted(SHARED.glob("*/mcq.jsonl")):
        with file.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                yield from (row["question"], row.get("context") or "", *row["choices"])


@pytest.mark.parametrize("corpus", ["licences", "shared"])
def test_no_text_loses_anything(corpus, smollm2, licences, trimmed):
    if corpus == "shared" and not SHARED.is_dir():
        pytest.skip("the six domains are not beside this checkout (../shared/data)")
    texts = licence_documents(licences) if corpus == "licences" else shared_documents()
    texts = islice(texts, 0, None, EVERY[corpus])
    full, small, vocabulary = smollm2.tokenizer, trimmed.tokenizer, trimmed.plan.vocabulary
    documents = kept = 0
    while batch := list(islice(texts, 512)):
        old, new = full(batch)["input_ids"], small(batch)["input_ids"]
        assert small.batch_decode(new) == full.batch_decode(old)
        mapped = [vocabulary.to_new(ids) for ids in old]
        whole = [index for index, ids in enumerate(mapped) if None not in ids]
        assert [new[index] for index in whole] == [mapped[index] for index in whole]
        documents, kept = documents + len(batch), kept + sum(bool(mapped[index]) for index in whole)
    assert documents > (150 if corpus == "licences" else 4_000)
    assert kept > 0 or len(vocabulary.kept) == MINIMUM


def test_logits_of_kept_text_are_exact(smollm2, licences, trimmed):
    if len(trimmed.plan.vocabulary.kept) == MINIMUM:
        text = "a b c (1) ... <|im_start|>user\n"
    else:
        text = next(iter(licences.calibration.documents)).text
    old = smollm2.tokenizer(text)["input_ids"]
    old = [index for index in old if index in trimmed.plan.vocabulary.new_ids][:64]
    new = trimmed.plan.vocabulary.to_new(old)
    assert len(new) > 5
    with torch.no_grad():
        dense, logits = (
            copy.deepcopy(model).double()(input_ids=torch.tensor([ids])).logits
            for model, ids in ((smollm2.model, old), (trimmed.model, new))
        )
        torch.testing.assert_close(logits, dense[..., list(trimmed.plan.vocabulary.kept)], atol=1e-10, rtol=1e-10)
        rounded = trimmed.model(input_ids=torch.tensor([new])).logits  # other shapes are summed in another order
        torch.testing.assert_close(rounded.double(), logits, atol=1e-4, rtol=1e-5)


def test_the_least_vocabulary_is_named(pruner):
    with pytest.raises(BudgetError, match=r"313 tokens must stay .* at least 320"):
        pruner.trim(VocabularySize(256))


def test_tokens_and_neurons_in_one_budget_open_with_plain_transformers(smollm2, licences, tmp_path):
    config = PrunerConfig(
        pruning_ratio=0.25,
        vocab_size=8_192,
        allocation="uniform",
        reconstruction="least_squares",
        native_architecture=True,
        round_to=8,
        criterion="wanda",
        num_calibration_samples=12,
        max_seq_length=64,
    )
    quick = EvalOptions(max_tokens=1_000, benchmark=False, memory=False)
    result = prune(smollm2, licences.calibration, config, eval_data=licences.held_out, eval_options=quick)
    assert 0.25 <= result.report.size.achieved_ratio < 0.254
    assert result.plan.provenance["vocabulary"]["tokens_before"] == 49_152
    folder = result.save_pretrained(tmp_path / "mini-gpt")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert model.num_parameters() == result.report.size.pruned_parameters
    assert len(tokenizer) == model.config.vocab_size == 8_192
    assert tokenizer.convert_ids_to_tokens(model.config.eos_token_id) == "<|im_end|>"
    for prompt in ("THE SOFTWARE IS PROVIDED", "法院 🎉 naïve"):
        assert tokenizer.decode(tokenizer.encode(prompt)) == prompt
        assert generate_completion(model, tokenizer, prompt) == generate_completion(
            result.model, result.tokenizer, prompt
        )
    chat = [{"role": "user", "content": "May I copy it?"}]
    text = smollm2.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == text
