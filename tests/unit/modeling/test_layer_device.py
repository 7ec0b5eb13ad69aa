"""Layers that run on another device than the one where the weights lie, one at a time."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hf_context_prune import EvalOptions, PrunerConfig, prune
from hf_context_prune.modeling import layer_device as module
from hf_context_prune.modeling.architectures import layers_of, spec_of
from hf_context_prune.modeling.layer_device import in_hand, layer_device, place, run_layers_on
from hf_context_prune.storage.loading import load_model
from tests.support.marks import TINY_TEXT
from tests.support.tiny import model_and_text, tiny_model

OTHER = torch.device("cpu", 0)
"""The CPU by another name, which no model that lies on the CPU has."""
CONFIG = PrunerConfig(pruning_ratio=0.2, native_architecture=False, max_seq_length=32, num_calibration_samples=16)
QUICK = EvalOptions(max_tokens=300, benchmark=False, memory=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_and_text(tmp_path_factory.mktemp("device"), "data.jsonl")


def test_a_layer_in_hand_is_the_same_module_with_weights_elsewhere(monkeypatch):
    model = tiny_model("llama")
    layer = model.model.layers[1]
    before = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    objects = list(layer.parameters())
    monkeypatch.setattr(module, "move", lambda value, device: value.clone())
    with in_hand(layer, OTHER):
        assert all(tensor.data_ptr() != before[name] for name, tensor in layer.state_dict().items())
        assert all(one is other for one, other in zip(layer.parameters(), objects, strict=True))
    assert {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()} == before


def test_a_model_without_room_stays_where_it_is(monkeypatch):
    model, gpu = tiny_model("llama"), torch.device("cuda", 3)
    assert layer_device(model) == torch.device("cpu")
    monkeypatch.setattr(module, "free_memory", lambda device: model.get_memory_footprint())
    assert place(model, gpu) is model
    assert layer_device(model) == gpu
    assert model.device.type == "cpu"


@pytest.fixture
def away(monkeypatch):
    """The bytes of the copies of weights that exist at each move: a device with memory of its own."""
    held, sizes = [], []

    def move(value, device):
        copy = value.clone()
        held.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        sizes.append(sum(size for storage, size in held if not storage.expired()))
        return copy

    monkeypatch.setattr(module, "move", move)
    return sizes


@TINY_TEXT
@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
def test_a_run_whose_layers_go_elsewhere_ends_the_same(family, folder, away):
    """In search, walk and evaluation, layers leave one at a time, and come back."""
    tiny_model(family).save_pretrained(folder / "base")
    expected = prune(folder / "base", folder / "data.jsonl", CONFIG, eval_options=QUICK)
    base = load_model(folder / "base")
    homes = {name: tensor.data_ptr() for name, tensor in base.model.state_dict().items()}
    run_layers_on(base.model, OTHER)
    away.clear()
    found = prune(base, folder / "data.jsonl", CONFIG, eval_options=QUICK)
    layers = layers_of(base.model, spec_of(base.model.config))
    largest = max(sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in layers)
    assert 0 < max(away) < 1.5 * largest  # a norm or two may wait for the garbage collector
    assert {name: tensor.data_ptr() for name, tensor in base.model.state_dict().items()} == homes
    assert layer_device(found.model) == OTHER
    assert found.plan.layers == expected.plan.layers
    assert found.report.loss == expected.report.loss
    after = found.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in expected.model.state_dict().items())


@TINY_TEXT
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_run_whose_layers_go_to_a_gpu(folder):
    tiny_model("llama").save_pretrained(folder / "base")
    expected = prune(load_model(folder / "base", device="cpu"), folder / "data.jsonl", CONFIG, eval_options=QUICK)
    base = load_model(folder / "base", device="cpu")
    run_layers_on(base.model, torch.device("cuda", 0))
    found = prune(base, folder / "data.jsonl", CONFIG, eval_options=QUICK)
    assert all(parameter.device.type == "cpu" for parameter in (*base.model.parameters(), *found.model.parameters()))
    assert found.plan.widths == expected.plan.widths
    ratio = found.report.loss.last.bits_per_byte.value / expected.report.loss.last.bits_per_byte.value
    assert ratio == pytest.approx(1, abs=0.01)
