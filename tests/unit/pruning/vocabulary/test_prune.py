"""A smaller vocabulary: kept text has the same tokens and logits as before, and nothing else changed."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_context_prune.errors import PlanError
from hf_context_prune.modeling.plan import PruningPlan, fingerprint
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.modeling.token_rows import num_rows
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.pruning.vocabulary.prune import VocabularyPruner, prune_vocabulary
from hf_context_prune.pruning.vocabulary.selection import VocabularySize
from hf_context_prune.storage.saving import save_pruned
from tests.support.marks import TINY_TEXT
from tests.support.tiny import VARIANTS
from tests.support.tiny_domain import ALL, documents, model_for, shared_tokenizer
from tests.support.tiny_tokenizers import tokenizer_of

pytestmark = TINY_TEXT

PAIRS = [
    *(("llama-mqa-tied", "llama3"), ("gpt2", "gemma"), ("gpt_neox", "llama3"), ("gemma2", "gemma")),
    *(("granite", "llama3"), ("phi", "gemma"), ("opt", "llama3")),
    ("qwen2", "qwen2-class"),  # AutoTokenizer opens whatever lies beside a qwen2 model as Qwen2Tokenizer
]


@cache
def example(name, kind):
    """Model, tokenizer, and both after pruning: one for many tests, nothing may change it."""
    tokenizer = shared_tokenizer(kind)
    model = model_for(name, tokenizer, spare_rows=13 if kind == "gemma" else 0)
    return model, tokenizer, prune_vocabulary(model, tokenizer, documents(), **ALL, refit=False)


def logits(model, ids):
    ids = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


def both_ids(tokenizer, trimmed, text):
    old, new = tokenizer(text)["input_ids"][:64], trimmed.tokenizer(text)["input_ids"][:64]
    assert trimmed.plan.vocabulary.to_new(old) == new
    assert trimmed.plan.vocabulary.to_old(new) == old
    return old, new


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_kept_text_has_the_same_tokens_and_logits(name, kind, tmp_path):
    model, tokenizer, trimmed = example(name, kind)
    kept = trimmed.plan.vocabulary.kept
    assert len(kept) == num_rows(trimmed.model) == trimmed.model.config.vocab_size == len(trimmed.tokenizer)
    assert len(kept) < len(tokenizer) <= num_rows(model) == trimmed.plan.vocabulary.dense
    for document in documents().documents[:2]:
        old, new = both_ids(tokenizer, trimmed, document.text)
        expected = logits(model, old)[:, list(kept)]
        torch.testing.assert_close(logits(trimmed.model, new), expected, atol=1e-5, rtol=1e-5)
    trimmed.plan.save(tmp_path / "plan.json")
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert plan == trimmed.plan
    again = apply_plan(model, plan)
    assert torch.equal(logits(again, new), logits(trimmed.model, new))


@pytest.mark.parametrize("name", [name for name, _ in PAIRS])
def test_what_is_saved_is_stock_and_bit_equal(name, tmp_path):
    model, tokenizer, trimmed = example(name, "qwen2-class" if name == "qwen2" else "llama3")
    folder = save_pruned(trimmed.model, tmp_path / "out", tokenizer=trimmed.tokenizer, plan=trimmed.plan)
    again, smaller = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(again) is getattr(transformers, SPECS[VARIANTS.get(name, (name,))[0]].model_class)
    assert type(smaller) is type(tokenizer)
    text = "the court finds a 法院 zebra"
    ids = smaller(text)["input_ids"]
    assert ids == trimmed.tokenizer(text)["input_ids"]
    assert smaller.decode(ids) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert torch.equal(logits(again, ids), logits(trimmed.model, ids))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    moved = trimmed.plan.vocabulary.to_new(getattr(model.config, key) for key in names)
    for config in (again.config, again.generation_config):
        assert [getattr(config, key) for key in names] == moved
    assert smaller.eos_token_id == moved[1]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_it_generates_what_the_full_model_would_without_the_other_tokens(name, kind):
    model, tokenizer, trimmed = example(name, kind)
    vocabulary = trimmed.plan.vocabulary
    options = {"max_new_tokens": 12, "do_sample": False}
    prompt = tokenizer("the court finds", return_tensors="pt")
    gone = [index for index in range(num_rows(model)) if index not in vocabulary.new_ids]
    expected = model.generate(**prompt, suppress_tokens=gone, **options)
    got = trimmed.model.generate(**trimmed.tokenizer("the court finds", return_tensors="pt"), **options)
    assert vocabulary.to_old(got[0].tolist()) == expected[0].tolist()
    assert trimmed.tokenizer.decode(got[0]) == tokenizer.decode(expected[0])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_every_id_of_the_configs_moves(name):
    tokenizer = shared_tokenizer("llama3")
    end, tool, mask, rare = tokenizer.convert_tokens_to_ids(["<|end|>", "<tool>", "[mask]", "法"])
    word = tokenizer.convert_tokens_to_ids("Ġcourt")
    model = model_for(name, tokenizer, eos_token_id=[end, tool])
    model.generation_config.update(eos_token_id=[end, mask], suppress_tokens=[rare, word], bad_words_ids=[[rare, word]])
    trimmed = prune_vocabulary(model, tokenizer, documents(), **ALL)
    new = trimmed.plan.vocabulary.new_ids
    pad, generation = tokenizer.pad_token_id, trimmed.model.generation_config
    assert trimmed.model.config.eos_token_id == [new[end], new[tool]]
    assert generation.eos_token_id == [new[end], new[mask]]
    assert trimmed.model.config.pad_token_id == generation.pad_token_id == new[pad]
    assert trimmed.model.get_input_embeddings().padding_idx in (None, new[pad])
    assert rare not in new
    assert (generation.suppress_tokens, generation.bad_words_ids) == ([new[word]], None)
    assert model.generation_config.suppress_tokens == [rare, word]
    assert trimmed.tokenizer.convert_ids_to_tokens(new[tool]) == "<tool>"


@pytest.mark.parametrize("spare_rows", [0, 13])
def test_removing_no_token_changes_nothing(spare_rows):
    tokenizer = shared_tokenizer("llama3")
    model = model_for("llama", tokenizer, spare_rows=spare_rows)
    trimmed = prune_vocabulary(model, tokenizer, documents(), vocab_size=len(tokenizer))
    assert trimmed.plan.vocabulary.kept == tuple(range(len(tokenizer)))
    assert trimmed.tokenizer.get_vocab() == tokenizer.get_vocab()
    ids = tokenizer("the court 法院")["input_ids"]
    assert torch.equal(logits(trimmed.model, ids), logits(model, ids)[:, : len(tokenizer)])


@pytest.mark.parametrize("criterion", ["expected", "frequency"])
def test_the_same_seed_gives_the_same_and_nothing_given_is_changed(criterion):
    tokenizer = tokenizer_of("gpt2")
    model = model_for("llama", tokenizer).train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    files, options = tokenizer.backend_tokenizer.to_str(), copy.deepcopy(tokenizer.init_kwargs)
    source = documents(length=200)
    first, second = (
        prune_vocabulary(model, tokenizer, source, vocab_size=300, pad_to_multiple_of=1, criterion=criterion, seed=3)
        for _ in range(2)
    )
    assert first.plan == second.plan
    assert first.plan.provenance["vocabulary"]["criterion"] == criterion
    assert first.tokenizer.backend_tokenizer.to_str() == second.tokenizer.backend_tokenizer.to_str()
    assert all(torch.equal(value, second.model.state_dict()[key]) for key, value in first.model.state_dict().items())
    assert not any(module.training for module in first.model.modules())
    assert not first.model.lm_head.weight.requires_grad
    assert first.model.model.embed_tokens.weight.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.init_kwargs) == (files, options)


def test_only_one_criterion_reads_what_the_model_expects():
    tokenizer = shared_tokenizer("gpt2")
    model, unseen = model_for("phi", tokenizer), tokenizer.convert_tokens_to_ids("Ġrevenue")
    with torch.no_grad():
        model.lm_head.bias[unseen] = 30.0
    kept = {
        criterion: prune_vocabulary(
            model, tokenizer, documents(), vocab_size=300, pad_to_multiple_of=1, criterion=criterion, refit=False
        ).plan.vocabulary.kept
        for criterion in ("expected", "frequency")
    }
    assert unseen in kept["expected"]
    assert unseen not in kept["frequency"]
    assert {len(ids) for ids in kept.values()} == {300}


def test_facts_of_a_run():
    _, tokenizer, trimmed = example("llama", "llama3")
    texts = [document.text for document in documents().documents]
    counted = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    assert trimmed.plan.provenance["vocabulary"] == {
        "criterion": "expected",
        "tokens_before": len(tokenizer),
        "tokens_counted": counted,
        "coverage": 1.0,
        "refit": None,
    }
    model = model_for("llama", tokenizer)
    refitted = prune_vocabulary(model, tokenizer, documents(length=200), vocab_coverage=0.5, pad_to_multiple_of=1)
    facts = refitted.plan.provenance["vocabulary"]
    assert 0.5 <= facts["coverage"] < 1
    assert facts["refit"]["after"] <= facts["refit"]["before"]
    assert facts["tokens_counted"] > counted


def test_tokens_to_keep_and_to_remove():
    tokenizer = shared_tokenizer("gpt2")
    model = model_for("llama", tokenizer)
    trimmed = prune_vocabulary(model, tokenizer, documents(), **ALL, keep=["Ġrevenue"], remove=["Ġcourt"], refit=False)
    vocab = trimmed.tokenizer.get_vocab()
    assert "Ġrevenue" in vocab
    assert "Ġcourt" not in vocab
    text = "the court finds revenue"
    assert trimmed.tokenizer.tokenize("x revenue") == ["x", "Ġrevenue"]
    assert trimmed.tokenizer.decode(trimmed.tokenizer(text)["input_ids"]) == text


def test_a_plan_for_other_tokens_is_refused():
    model, tokenizer, trimmed = example("llama", "llama3")
    with pytest.raises(PlanError, match=r"467 embedding rows.*\b480\b"):
        apply_plan(model_for("llama", tokenizer, spare_rows=13), trimmed.plan)
    other = copy.deepcopy(model)
    lost = next(index for index in range(467) if index not in trimmed.plan.vocabulary.new_ids)
    other.generation_config.eos_token_id = [tokenizer.eos_token_id, lost]
    with pytest.raises(PlanError, match=f"GenerationConfig.eos_token_id names the token {lost}"):
        apply_plan(other, trimmed.plan)
    both = replace(trimmed.plan, model_fingerprint=fingerprint(trimmed.model))
    with pytest.raises(PlanError, match="embedding rows"):
        apply_plan(trimmed.model, both)


def test_one_measurement_gives_any_size():
    tokenizer = shared_tokenizer("gpt2")
    model = model_for("gpt2", tokenizer)
    pruner = VocabularyPruner(model, tokenizer, documents(), num_samples=8, max_seq_length=32)
    kept = [
        set(pruner.trim(VocabularySize(size, pad_to_multiple_of=1)).plan.vocabulary.kept) for size in (280, 320, 400)
    ]
    assert [len(ids) for ids in kept] == [280, 320, 400]
    assert kept[0] < kept[1] < kept[2]
    alone = VocabularyPruner(model, tokenizer, documents(), num_samples=8, max_seq_length=32)
    assert set(alone.trim(VocabularySize(320, pad_to_multiple_of=1)).plan.vocabulary.kept) == kept[1]
