"""What is known of a model's weights: each is read once in a run, and never remembered beyond it."""

from __future__ import annotations

import pytest
import torch

from hf_context_prune.errors import NumericsError
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils import tensor_facts
from hf_context_prune.utils.tensor_facts import is_finite, remember_weights, values_digest
from tests.support.tiny import tiny_model


@pytest.fixture
def read(monkeypatch):
    """Names of the functions that read a tensor."""
    seen = []
    for name in ("all_finite", "_digest"):
        real = getattr(tensor_facts, name)
        monkeypatch.setattr(
            tensor_facts, name, lambda tensor, name=name, real=real: (seen.append(name), real(tensor))[1]
        )
    return seen


def test_each_weight_is_read_once_in_a_run(read):
    model = tiny_model("llama")
    count = len(list(model.parameters()))
    alone = resume_key(model, [])
    check_weights_finite(model)
    check_weights_finite(model)
    assert read.count("all_finite") == 2 * count
    read.clear()
    with remember_weights(model):
        for _ in range(2):
            check_weights_finite(model)
            assert resume_key(model, []) == alone
        assert read.count("all_finite") == read.count("_digest") == count + len(list(model.buffers()))
        other = torch.ones(3)
        assert is_finite(other)
        assert values_digest(other) == values_digest(torch.ones(3))


def test_nothing_is_remembered_afterwards():
    model = tiny_model("llama")
    with remember_weights(model):
        check_weights_finite(model)
        before = resume_key(model, [])
    with torch.no_grad():
        model.lm_head.weight.data[0, 0] = torch.nan
    assert resume_key(model, []) != before
    with pytest.raises(NumericsError, match="lm_head"):
        check_weights_finite(model)
    with remember_weights(model), pytest.raises(NumericsError, match="lm_head"):
        check_weights_finite(model)
