"""Token ids in configs, and the rows that tokens have in a model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig

from hf_context_prune.errors import PlanError
from hf_context_prune.modeling.token_rows import (
    build_vocabulary_config,
    iter_token_ids,
    num_rows,
    renumber_token_ids,
    token_cost,
    token_modules,
    token_rows,
)
from tests.support.tiny import COVERING, VOCABULARY, case, tiny_config

NEW = {1: 0, 2: 1, 5: 2, 7: 3, 8: 4, 9: 5}


def test_the_ids_that_a_generation_config_relies_on(subtests):
    for values, named in (
        ({"eos_token_id": 2}, {("eos_token_id", 2)}),
        ({"eos_token_id": [2, 5]}, {("eos_token_id", 2), ("eos_token_id", 5)}),
        ({"eos_token_id": []}, set()),
        ({"pad_token_id": -1, "eos_token_id": [2, -1]}, {("eos_token_id", 2)}),
        ({"bos_token_id": None, "pad_token_id": 0}, {("pad_token_id", 0)}),
        ({"decoder_start_token_id": [1, 7]}, {("decoder_start_token_id", 1), ("decoder_start_token_id", 7)}),
        ({"forced_bos_token_id": 8}, {("forced_bos_token_id", 8)}),
        ({"forced_eos_token_id": [9]}, {("forced_eos_token_id", 9)}),
        ({"forced_decoder_ids": [[1, 5], [2, None]]}, {("forced_decoder_ids", 5)}),
        ({"suppress_tokens": [3], "bad_words_ids": [[4]], "sequence_bias": {(6,): 1.0}, "max_new_tokens": 7}, set()),
        ({"my_token_ids": [7, 8]}, {("my_token_ids", 7), ("my_token_ids", 8)}),
    ):
        with subtests.test(**values):
            assert set(iter_token_ids(GenerationConfig(**values))) == named


def test_the_ids_that_a_model_config_relies_on(subtests):
    ids = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": None}
    for family in ("llama", "gemma3_text", "gpt2", "opt"):
        with subtests.test(family):
            config = tiny_config(family, **ids)
            assert sorted(iter_token_ids(config)) == [("bos_token_id", 1), ("eos_token_id", 2), ("eos_token_id", 5)]


def test_renumbering_a_generation_config(subtests):
    for name, before, after in (
        ("eos_token_id", 2, 1),
        ("eos_token_id", [2, 5], [1, 2]),
        ("pad_token_id", -1, -1),
        ("pad_token_id", None, None),
        ("bos_token_id", 1, 0),
        ("decoder_start_token_id", [1, 7], [0, 3]),
        ("forced_eos_token_id", [9], [5]),
        ("forced_decoder_ids", [[1, 5], [2, None]], [[1, 2], [2, None]]),
        # A sequence that loses a token can't occur.
        ("suppress_tokens", [3, 5, 4, 7], [2, 3]),
        ("suppress_tokens", [3], []),
        ("begin_suppress_tokens", [9, 3], [5]),
        ("bad_words_ids", [[5], [3], [7, 8], [7, 3]], [[2], [3, 4]]),
        ("bad_words_ids", [[3]], None),
        ("force_words_ids", [[5, 7], [3]], [[2, 3]]),
        ("force_words_ids", [[[5], [3, 7]], [[3]]], [[[2]]]),
        ("sequence_bias", {(5, 7): 1.5, (3,): -1.0}, [[[2, 3], 1.5]]),
        ("sequence_bias", [[[5], 1.5], [[7, 3], -1.0]], [[[2], 1.5]]),
        ("sequence_bias", [[[3], 1.5]], None),
    ):
        with subtests.test(name, before=before):
            config = GenerationConfig(**{name: before, "max_new_tokens": 7, "top_k": 5})
            renumber_token_ids(config, NEW)
            assert getattr(config, name) == after
            assert (config.max_new_tokens, config.top_k) == (7, 5)


@pytest.mark.parametrize("name", ["eos_token_id", "forced_decoder_ids"])
def test_an_id_that_has_no_new_one_is_refused(name):
    config = GenerationConfig(**{name: {"eos_token_id": [2, 3], "forced_decoder_ids": [[0, 3]]}[name]})
    with pytest.raises(PlanError, match=f"GenerationConfig.{name} .* token 3"):
        renumber_token_ids(config, NEW)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_config_with_another_vocabulary(family):
    config = tiny_config(family, bos_token_id=1, eos_token_id=[2, 5], pad_token_id=7)
    before = copy.deepcopy(config.to_dict())
    smaller = build_vocabulary_config(config, [7, 5, 2, 9, 1])
    assert config.to_dict() == before
    changed = {"vocab_size": 5, "bos_token_id": 4, "eos_token_id": [2, 1], "pad_token_id": 0}
    assert smaller.to_dict() == before | changed


@pytest.mark.parametrize("name", COVERING)
def test_rows_and_cost_of_a_token(name):
    model = case(name)
    before, rows = model.num_parameters(), token_rows(model)
    assert num_rows(model) == VOCABULARY
    assert all(len(tensor) == VOCABULARY for tensor in rows.values())
    assert {id(tensor) for tensor in rows.values()} >= {
        id(parameter) for parameter in model.parameters() if VOCABULARY in parameter.shape
    }
    model.resize_token_embeddings(VOCABULARY - 10)
    assert before - model.num_parameters() == 10 * token_cost(model)


@pytest.mark.parametrize(
    ("name", "heads", "cost"),
    [
        ("llama", ["lm_head.weight"], 96),
        ("llama-mqa-tied", ["lm_head.weight"], 48),
        ("phi", ["lm_head.weight", "lm_head.bias"], 97),
        ("phi-mha", ["lm_head.weight", "lm_head.bias"], 49),
    ],
)
def test_tied_untied_and_biased_heads(name, heads, cost):
    model = case(name)
    assert sorted(token_rows(model)) == sorted(["model.embed_tokens.weight", *heads])
    assert token_cost(model) == cost
    tied = model.config.tie_word_embeddings
    assert (token_rows(model)["lm_head.weight"] is token_rows(model)["model.embed_tokens.weight"]) == tied
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in token_rows(model).items())


def test_a_model_without_a_head():
    base = case("llama").model
    assert token_modules(base) == [base.embed_tokens]
    assert list(token_rows(base)) == ["embed_tokens.weight"]
    assert token_cost(base) == 48
