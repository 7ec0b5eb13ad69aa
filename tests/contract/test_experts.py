"""Whole experts removed, for every family with a mixture of experts, and the contract of the other units there."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hf_context_prune.errors import LoadError
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.registry import get_model_class
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pipelines.architecture.contract import masked, without_experts
from hf_context_prune.pruning.allocation.widths import count_base_parameters
from hf_context_prune.pruning.surgery import apply_plan, kept_entries
from hf_context_prune.storage.loading import load_meta_model, load_model
from hf_context_prune.storage.saving import save_pruned
from tests.support.experts import expert_plan, neuron_plan, without_neurons
from tests.support.marks import nightly_beside
from tests.support.tiny import MOE_CASES, MOE_COVERING, case, tokens

IDS = tokens(2, 24)
BY_NIGHT = nightly_beside(MOE_COVERING, MOE_CASES)
MOST = 4e-5
"""Difference of logits whose sums run in another order; those of Qwen3.5 reach 5."""
ALIKE, BY_LAYER = (4, 4, 4), (6, 4, 4)
"""Experts that stay in every layer that has them."""


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("name", MOE_CASES)
def test_sliced_equals_a_router_that_gives_minus_infinity(name):
    model = case(name)
    before, dense = {key: value.clone() for key, value in model.state_dict().items()}, logits(model)
    for counts in (ALIKE, BY_LAYER):
        plan = expert_plan(model, counts)
        smaller = apply_plan(model, plan)
        expected = logits(without_experts(model, plan))
        most = 1e-5 * max(1.0, expected.abs().max().item())  # of the largest, as one sum in another order
        torch.testing.assert_close(logits(smaller), expected, atol=most, rtol=1e-5)
        assert torch.isfinite(expected).all()
        assert (dense - expected).abs().max() > 1e-2
        assert smaller.num_parameters() < model.num_parameters()
        vary = len({widths.experts for widths in plan.widths if widths.experts}) > 1
        kind = get_model_class(SPECS[model.config.model_type]) if vary else type(model)
        assert type(smaller) is kind
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MOE_CASES)
def test_neurons_inside_experts_go_as_if_their_output_were_zero(name, tmp_path):
    model = case(name)
    for counts in (None, ALIKE, BY_LAYER):
        whole = PruningPlan.identity(model.config.model_type, ModelView.of(model).geometry)
        plan = neuron_plan(whole if counts is None else expert_plan(model, counts), model)
        smaller = apply_plan(model, plan)
        expected = logits(without_experts(without_neurons(model, plan), plan))
        most = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(logits(smaller), expected, atol=most, rtol=1e-5)
        assert (logits(model) - expected).abs().max() > 1e-3
        vary = len({widths.experts for widths in plan.widths} - {0}) > 1
        assert (type(smaller) is type(model)) == (not vary)
        assert count_base_parameters(smaller, plan) == model.num_parameters()
        folder = save_pruned(smaller, tmp_path / f"{counts}", plan=plan)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert torch.equal(logits(again), logits(smaller))
        assert PruningPlan.load(folder / "pruning_plan.json") == plan
        assert load_meta_model(folder).num_parameters() == smaller.num_parameters()
        old, new = dict(model.named_parameters()), dict(smaller.named_parameters())
        entries = dict(kept_entries(model, plan))
        assert {key for key in old if old[key].shape != new[key].shape} == entries.keys()
        assert all(torch.equal(old[key].flatten()[places], new[key]) for key, places in entries.items())


@pytest.mark.parametrize("name", BY_NIGHT)
def test_experts_go_beside_other_units_and_layers(name):
    model = case(name)
    for variable in (True, False):
        plan = expert_plan(model, BY_LAYER if variable else ALIKE, units=True, variable=variable)
        smaller = apply_plan(model, plan)
        expected = logits(masked(model, plan))
        torch.testing.assert_close(logits(smaller), expected, atol=MOST, rtol=1e-5)
        assert read_geometry(smaller.config, SPECS[model.config.model_type]).layers == plan.widths


@pytest.mark.parametrize("name", BY_NIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_reloads_bit_equal(name, dtype, tmp_path):
    model = case(name)
    model = model.to(dtype) if dtype == torch.float32 else as_loaded(model, dtype, tmp_path / "half")
    for counts in (ALIKE, BY_LAYER):
        plan = expert_plan(model, counts, units=counts is BY_LAYER)
        smaller = apply_plan(model, plan)
        folder = save_pruned(smaller, tmp_path / f"{counts}", plan=plan)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert type(again) is type(smaller)
        assert again.dtype == dtype
        assert torch.equal(logits(again), logits(smaller))
        assert PruningPlan.load(folder / "pruning_plan.json") == plan
        assert ("auto_map" in json.loads((folder / "config.json").read_text())) == (type(smaller) is not type(model))
        own = load_meta_model(folder)
        assert own.num_parameters() == smaller.num_parameters()


def as_loaded(model, dtype, folder):
    """The model as `from_pretrained` reads it in another dtype: some families keep their routers in float32."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("name", BY_NIGHT)
def test_a_native_folder_is_compared_with_its_config_and_loaded(name, tokenizer, tmp_path):
    model = case(name)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path, device="cpu").model
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    path = tmp_path / "config.json"
    count = SPECS[model.config.model_type].experts.count
    path.write_text(json.dumps(json.loads(path.read_text()) | {count: 6}))
    with pytest.raises(LoadError, match="experts"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("name", BY_NIGHT)
def test_generates_with_a_cache_and_learns(name):
    model = case(name)
    smaller = apply_plan(model, expert_plan(model, units=True))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    cached = smaller.generate(IDS, past_key_values=DynamicCache(config=smaller.config), **options)
    assert torch.equal(cached, smaller.generate(IDS, use_cache=False, **options))
    smaller.train()
    smaller(input_ids=IDS, labels=IDS).loss.backward()
    gates = [one for name, one in smaller.named_parameters() if name.endswith(("gate.weight", "router.weight"))]
    assert gates
    assert all(gate.grad is not None for gate in gates)


@pytest.mark.parametrize("name", BY_NIGHT)
def test_a_pruned_model_can_be_pruned_again_and_its_weights_are_found_in_the_old(name):
    model = case(name)
    plan = expert_plan(model, (6, 6, 6))
    once = apply_plan(model, plan)
    old, new = dict(model.named_parameters()), dict(once.named_parameters())
    entries = dict(kept_entries(model, plan))
    assert {key for key in old if old[key].shape != new[key].shape} == entries.keys()
    assert all(torch.equal(old[key].flatten()[places], new[key]) for key, places in entries.items())
    again = expert_plan(once, ALIKE, seed=1)
    expected = logits(without_experts(once, again))
    torch.testing.assert_close(logits(apply_plan(copy.deepcopy(once), again)), expected, atol=MOST, rtol=1e-5)
