"""Layers run in bfloat16 where the processor is faster so; head, other precisions and the model are unchanged."""

from __future__ import annotations

import pytest
import torch

from hf_context_prune.modeling.architectures import layers_of, spec_of
from hf_context_prune.modeling.patching import bfloat16_layers, patch_forwards
from hf_context_prune.utils import precision
from tests.support.tiny import COVERING, VOCABULARY, case


@pytest.fixture
def fast_bfloat16(monkeypatch):
    monkeypatch.setattr(precision, "FAST_PRECISION", "medium")
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: True)


def tokens():
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


ROUNDING = {"qwen3_5_text": 0.2, "granite_swa": 0.03}
"""Families of which more is lost: a recurrence hands errors on, and sinks leave less of the attention."""


@pytest.mark.parametrize("name", COVERING)
def test_fast_layers_round_little_and_leave_no_trace(name, fast_bfloat16):
    model, ids = case(name).eval(), tokens()
    layers = layers_of(model, spec_of(model.config))
    seen = []
    handles = [layer.register_forward_hook(lambda _, args, output: seen.append(output)) for layer in layers]
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        seen.clear()
        with bfloat16_layers(model):
            rounded = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(exact, again)
    assert not any("forward" in vars(layer) for layer in layers)
    assert rounded.dtype == torch.float32
    assert all((out[0] if isinstance(out, tuple) else out).dtype == torch.float32 for out in seen)  # residual stream
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < ROUNDING.get(name, 0.02)


def test_the_head_is_not_rounded(fast_bfloat16):
    model, ids = case("llama").eval(), tokens()
    states = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad(), bfloat16_layers(model):
        logits = model(input_ids=ids).logits
    handle.remove()
    torch.testing.assert_close(logits, states[0] @ model.lm_head.weight.detach().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_stay_as_they_are(dtype, fast_bfloat16):
    model, ids = case("llama").eval().to(dtype), tokens()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with bfloat16_layers(model):
            assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", ["medium", "highest"])
def test_nothing_is_rounded_that_would_not_be_faster(name, known, monkeypatch):
    monkeypatch.setattr(precision, "FAST_PRECISION", name)
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: known)
    with precision.bfloat16_autocast(torch.ones(1, 2, 3)):
        assert torch.is_autocast_enabled("cpu") == (known and name == "medium")
    assert not torch.is_autocast_enabled("cpu")


def test_forwards_come_back_after_an_error():
    model = case("llama").eval()
    layers = layers_of(model, spec_of(model.config))

    def fails(*args, **options):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), patch_forwards(layers, [fails] * len(layers)), torch.no_grad():
        model(input_ids=tokens())
    assert not any("forward" in vars(layer) for layer in layers)
