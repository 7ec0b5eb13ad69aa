"""What short runs of `prune` on tiny models share: options, and a model that knows its text."""

from __future__ import annotations

import copy
from functools import cache

import torch

from hf_context_prune import EvalOptions
from hf_context_prune.data.documents import load_documents
from hf_context_prune.data.samples import tokenize_samples
from tests.support.tiny import texts, tiny_model, tiny_tokenizer

QUICK = EvalOptions(max_tokens=600, benchmark=False, memory=False)
OPTIONS = {"max_seq_length": 32, "num_calibration_samples": 16}


def trained_model():
    """A tiny model that knows the text a little, so that what is removed from it is missed: a copy for every caller."""
    return copy.deepcopy(_trained_model())


@cache
def _trained_model():
    model = tiny_model("llama", initializer_range=0.05)
    samples = tokenize_samples(load_documents(texts(60)), tiny_tokenizer(), num_samples=64, max_seq_length=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        model(input_ids=samples, labels=samples).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False).eval()


def same_weights(model, other):
    """Whether two models have the same weights, bit by bit."""
    first, second = model.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
