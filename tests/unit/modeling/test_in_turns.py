"""A model that does not fit into memory runs layer by layer over many batches, and gives the same bits."""

from __future__ import annotations

import sys

import pytest
import torch

from hf_context_prune.data.documents import load_documents
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.modeling import in_turns
from hf_context_prune.modeling.architectures import layers_of, spec_of
from hf_context_prune.modeling.in_turns import fits_with_weights, forward_in_turns
from hf_context_prune.modeling.patching import bfloat16_layers
from hf_context_prune.storage.loading import load_model
from hf_context_prune.utils.memory import memory_limit
from tests.support.tiny import COVERING, case, texts, tiny_model, tiny_tokenizer, tokens


def given():
    batches = [{"input_ids": tokens(2, 12, seed=seed)} for seed in range(3)]
    batches[1]["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    batches[1]["attention_mask"][0, 9:] = 0
    return batches


@pytest.mark.parametrize("name", [*COVERING, "opt", "gemma3_text"])
@pytest.mark.parametrize("head", [True, False])
def test_layers_take_turns_and_give_the_same_bits(name, head):
    model = case(name)
    turns = []
    for index, layer in enumerate(layers_of(model, spec_of(model.config))):
        projection = layer.get_submodule(spec_of(model.config).mlp_output)
        projection.register_forward_pre_hook(lambda module, args, index=index: turns.append(index))
    with torch.inference_mode(), bfloat16_layers(model):
        together = [output[0] for output in forward_in_turns(model, given(), head=head)]
        assert turns == [0, 1, 2] * 3
        turns.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(in_turns, "fits_with_weights", lambda model: False)
            with memory_limit(0):  # no room for any hidden state: each batch has a turn of its own
                alone = [output[0] for output in forward_in_turns(model, given(), head=head)]
            assert turns == [0, 1, 2] * 3
            turns.clear()
            in_turn = [output[0] for output in forward_in_turns(model, iter(given()), head=head)]
        assert turns == [0] * 3 + [1] * 3 + [2] * 3
    for first, second, third in zip(together, alone, in_turn, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


@pytest.mark.skipif(sys.platform != "linux", reason="which weights lie in files is known on Linux")
def test_losses_of_a_model_beyond_the_limit_are_the_same(tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    source = load_documents(texts(8), tokenizer=tokenizer)
    expected = document_losses(model, tokenizer, source, max_seq_length=32, batch_tokens=64)
    with memory_limit(0):
        assert fits_with_weights(model)  # its weights are in memory: turns would save nothing
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        model = load_model(tmp_path).model
        assert not fits_with_weights(model)
        assert document_losses(model, tokenizer, source, max_seq_length=32, batch_tokens=64) == expected


def test_no_batch_gives_nothing():
    with memory_limit(0):
        assert list(forward_in_turns(tiny_model("llama"), [])) == []
