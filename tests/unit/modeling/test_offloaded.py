"""A model that accelerate spread over CPU and disk is pruned and evaluated from where its weights lie."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_context_prune import EvalOptions, PrunerConfig, RecoveryConfig, evaluate, prune, recover
from hf_context_prune.errors import UnsupportedArchitectureError
from hf_context_prune.modeling import offloaded
from hf_context_prune.modeling.layer_device import layer_device
from hf_context_prune.modeling.offloaded import _hook_of, map_offloaded
from hf_context_prune.pruning.calibration.calibrate import calibrate
from hf_context_prune.pruning.vocabulary.prune import prune_vocabulary
from hf_context_prune.storage.loading import load_model
from hf_context_prune.utils.memory import memory_limit, own_memory
from tests.support.marks import TINY_TEXT
from tests.support.tiny import model_and_text, tiny_model, tokens

pytestmark = TINY_TEXT
CONFIG = PrunerConfig(mlp_ratio=0.5, max_seq_length=32, num_calibration_samples=16)
QUICK = EvalOptions(max_tokens=300, benchmark=False, memory=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_and_text(tmp_path_factory.mktemp("offloaded"), "data.jsonl")


def load_on_disk(folder, offload, **options):
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    where |= {"model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=where, offload_folder=offload, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_on_the_disk_is_mapped_and_the_model_stays_as_it_is(place, tmp_path, dtype):
    model = load_on_disk(place / "base", tmp_path, dtype=dtype)
    mapped = map_offloaded(model)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in mapped.parameters())
    assert mapped.model.layers[0].mlp.up_proj.weight.data_ptr() == model.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert mapped.generation_config.to_dict() == model.generation_config.to_dict()
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(mapped(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not any(_hook_of(module) for module in mapped.modules())
    assert map_offloaded(mapped) is mapped


def test_it_is_pruned_and_evaluated_as_the_model_in_memory(place, tmp_path):
    tokenizer, data = AutoTokenizer.from_pretrained(place / "base"), place / "data.jsonl"
    expected = prune(place / "base", data, CONFIG, eval_options=QUICK)
    found = prune(load_on_disk(place / "base", tmp_path), data, CONFIG, tokenizer=tokenizer, eval_options=QUICK)
    assert found.plan.layers == expected.plan.layers
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name]), name
    assert found.report.loss == expected.report.loss
    found.save_pretrained(tmp_path / "out")
    reloaded = load_model(tmp_path / "out").model.state_dict()
    assert all(torch.equal(tensor, reloaded[name]) for name, tensor in found.model.state_dict().items())
    before = evaluate(place / "base", data, eval_options=QUICK, max_seq_length=64)
    after = evaluate(
        load_on_disk(place / "base", tmp_path), data, eval_options=QUICK, tokenizer=tokenizer, max_seq_length=64
    )
    assert after.loss == before.loss


def test_it_is_trained_and_calibrated_as_the_model_in_memory(place, tmp_path):
    own, offloaded_model = load_model(place / "base"), load_on_disk(place / "base", tmp_path)
    trained = [
        recover(
            model, place / "data.jsonl", RecoveryConfig(max_steps=2, max_seq_length=32), tokenizer=own.tokenizer
        ).model.state_dict()
        for model in (own.model, offloaded_model)
    ]
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())
    batches = [{"input_ids": tokens()}]
    sums = [
        calibrate(model, batches, statistics={"gram"}).targets[1, "mlp"].gram for model in (own.model, offloaded_model)
    ]
    assert torch.equal(*sums)
    smaller = prune_vocabulary(
        offloaded_model, own.tokenizer, place / "data.jsonl", vocab_size=300, pad_to_multiple_of=1
    )
    assert smaller.model.config.vocab_size == 300


def test_layers_that_run_elsewhere_will_do_so_one_at_a_time(monkeypatch):
    own = tiny_model("llama")
    model = cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu", 0))
    mapped = map_offloaded(model)
    assert layer_device(mapped) == torch.device("cpu", 0)
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in mapped.state_dict().items())
    monkeypatch.setattr(offloaded, "free_memory", lambda: -1)
    with pytest.raises(UnsupportedArchitectureError, match=r"lie on an accelerator.*without a device_map"):
        map_offloaded(model)


def test_no_speed_is_measured_of_a_model_that_does_not_fit(place):
    timed = EvalOptions(max_tokens=300, memory=False)
    with memory_limit(own_memory()):
        report = evaluate(place / "base", place / "data.jsonl", eval_options=timed, max_seq_length=64)
    assert report.speed is None
    assert "No speed was measured: a model that does not fit into memory" in report.notes[-1]
