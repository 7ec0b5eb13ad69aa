"""Whole layers removed, for every entry of the architecture table and its variants."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_context_prune.errors import UnsupportedArchitectureError
from hf_context_prune.modeling.depth import new_name, shorten_config
from hf_context_prune.modeling.geometry import WITHOUT_ATTENTION, read_geometry
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.registry import get_model_class
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pipelines.architecture.contract import masked, random_plan
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.saving import save_pruned
from tests.support.layers import depth_plan, without_layers
from tests.support.marks import nightly_beside
from tests.support.tiny import CASES, COVERING, case, tiny_config, tiny_model, tokens

IDS = tokens(2, 24)
STAY = {"gemma4_text": "hidden_size_per_layer_input=8", "gpt2-n_inner": "scale_attn_by_inverse_layer_idx=True"}
"""Models whose layers must all stay, and what the message names."""
SHORTER = [name for name in CASES if name not in STAY]
SOME = [name for name in COVERING if name not in STAY]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


DEEP_GEMMA4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
}


def skipping(model, plan):
    """The dense model, in which the removed layers return what they are given."""
    skipped = copy.deepcopy(model)
    view = ModelView.of(skipped)
    outputs = view.spec.layer_outputs
    for index in plan.removed_layers:
        view.layers[index].forward = lambda hidden, *_, **__: (hidden, *[None] * (outputs - 1)) if outputs else hidden
    return skipped


def removable(name):
    """The first layer, and the second where it is not the only one with attention."""
    kinds = getattr(case(name).config, "layer_types", None) or ()
    return (0,) if set(kinds[:1]) & set(WITHOUT_ATTENTION) else (0, 1)


@pytest.mark.parametrize("name", SHORTER)
def test_sliced_equals_skipped_and_is_saved_as_stock(name, tmp_path):
    model = case(name)
    for gone in removable(name):
        plan = depth_plan(model, gone)
        smaller, expected = apply_plan(model, plan), logits(skipping(model, plan))
        torch.testing.assert_close(logits(smaller), expected, atol=1e-5, rtol=1e-5)
        assert (logits(model) - expected).abs().max() > 1e-2
        assert type(smaller) is type(model)
        folder = save_pruned(smaller, tmp_path / f"{gone}", plan=plan)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert torch.equal(logits(again), logits(smaller))
        assert PruningPlan.load(folder / "pruning_plan.json").removed_layers == (gone,)
        check_shortened(folder, spec_of(model), len(plan.kept_layers))


def spec_of(model):
    return SPECS[model.config.model_type]


def check_shortened(folder, spec, count):
    """What runtimes and exports read of a folder: as many layers by number as by lists, and a stock config."""
    values = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in values
    named = [values[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in values]
    assert set(named) == {count}
    by_layer = ("layer_types", "no_rope_layers", "layer_rope_theta", "attention_layers", "mlp_layer_types")
    assert {len(values[name]) for name in by_layer if values.get(name)} <= {count}
    with safe_open(folder / "model.safetensors", "pt") as file:
        inside = [name for name in file.keys() if f"{spec.layers}." in f"{name}."]  # noqa: SIM118 - no mapping
    assert {int(name.removeprefix(f"{spec.layers}.").partition(".")[0]) for name in inside} == set(range(count))


@pytest.mark.parametrize("name", nightly_beside(SOME, SHORTER))
def test_layers_and_units_go_together(name, tmp_path):
    model = case(name)
    for variable in (True, False):
        units = random_plan(model, variable=variable)
        plan = without_layers(units, 0)
        smaller = apply_plan(model, plan)
        expected = logits(skipping(masked(model, units), plan))
        torch.testing.assert_close(logits(smaller), expected, atol=5e-5, rtol=1e-5)  # of recurrences, other chunks
        half = apply_plan(copy.deepcopy(model).bfloat16(), plan)
        folder = save_pruned(half, tmp_path / f"{variable}")
        again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert torch.equal(logits(again), logits(half))
        assert read_geometry(again.config, SPECS[model.config.model_type]).layers == plan.kept_widths
    assert isinstance(smaller, type(model) | get_model_class(SPECS[model.config.model_type]))


@pytest.mark.parametrize("name", nightly_beside(SOME, SHORTER))
def test_generates_with_a_cache_and_learns(name):
    model = case(name)
    smaller = apply_plan(model, depth_plan(model, 0))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(smaller.generate(IDS, **options), smaller.generate(IDS, use_cache=False, **options))
    numbers = [module.layer_idx for module in smaller.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    assert set(numbers) <= {0, 1}
    smaller.train()
    smaller(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


@pytest.mark.parametrize("name", STAY)
def test_models_whose_layers_belong_together_are_refused_by_name(name):
    model = case(name)
    with pytest.raises(UnsupportedArchitectureError, match=STAY[name]):
        apply_plan(model, depth_plan(model, 1))


def test_a_gemma_4_without_shared_keys_and_embeddings_by_layer_may_lose_layers():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = tiny_model(
        "gemma4_text", num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=0, hidden_size_per_layer_input=0
    )
    plan = depth_plan(model, 0)
    smaller = apply_plan(model, plan)
    torch.testing.assert_close(logits(smaller), logits(skipping(model, plan)), atol=1e-5, rtol=1e-5)
    assert smaller.config.layer_types == kinds[1:]


def test_a_hybrid_keeps_a_layer_with_attention():
    model = tiny_model("lfm2")
    with pytest.raises(
        UnsupportedArchitectureError, match=r"One layer with attention must stay .* layers 0, 2 have none"
    ):
        apply_plan(model, depth_plan(model, 1))


REFUSED = (
    ("olmo_hybrid", {}, (0, 2), "its config refuses them .*at least one 'linear_attention' layer"),
    (
        "gemma4_text",
        {**DEEP_GEMMA4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
        (3,),
        "its config makes them layers of sliding_attention, full_attention, full_attention",
    ),
    ("ernie4_5_moe", {"num_hidden_layers": 4, "moe_layer_interval": 2}, (1,), "Or name 2 neighbours in removable"),
    ("ernie4_5_moe", {"num_hidden_layers": 4, "moe_layer_end_index": 0}, (0,), "by a rule .*Or remove experts"),
)


@pytest.mark.parametrize(("family", "options", "gone", "said"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_layers_that_a_config_can_not_keep_alone(family, options, gone, said):
    model = tiny_model(family, **options)
    with pytest.raises(UnsupportedArchitectureError, match=f"This {family} model can't keep layers .*{said}"):
        apply_plan(model, depth_plan(model, *gone))


def test_a_pruned_model_loses_layers_too():
    model = tiny_model("llama")
    once = apply_plan(model, random_plan(model))
    plan = depth_plan(once, 1)
    twice = apply_plan(once, plan)
    torch.testing.assert_close(logits(twice), logits(skipping(once, plan)), atol=1e-5, rtol=1e-5)
    widths = read_geometry(once.config, SPECS["llama"]).layers
    assert read_geometry(twice.config, SPECS["llama"]).layers == (widths[0], widths[2])


def test_every_value_by_layer_is_shortened():
    config = tiny_config("qwen2", num_hidden_layers=6, use_sliding_window=True, max_window_layers=4, sliding_window=16)
    shorter = shorten_config(config, SPECS["qwen2"], (0, 2, 3, 5))
    assert shorter.num_hidden_layers == 4
    assert shorter.layer_types == ["full_attention"] * 3 + ["sliding_attention"]
    assert shorter.max_window_layers == 3
    assert config.num_hidden_layers == len(config.layer_types) == 6
    config = tiny_config("gpt_neo", num_hidden_layers=4, attention_types=[[["global", "local"], 2]])
    shorter = shorten_config(config, SPECS["gpt_neo"], (0, 2, 3))
    assert shorter.attention_layers == ["global", "global", "local"]
    config = tiny_config("smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], eos_token_id=[2, 3, 4, 5])
    shorter = shorten_config(config, SPECS["smollm3"], (1, 3))
    assert shorter.no_rope_layers == [1, 0]
    assert shorter.eos_token_id == [2, 3, 4, 5]  # as many by chance


def test_new_names():
    assert new_name("model.layers.4.mlp", "model.layers", (1, 4)) == "model.layers.1.mlp"
    assert new_name("model.layers.4", "model.layers", (1, 4)) == "model.layers.1"
    assert new_name("model.layers.0.mlp", "model.layers", (1, 4)) is None
    assert new_name("model.norm", "model.layers", (1, 4)) == "model.norm"


def test_frozen_layers_stay_frozen():
    model = tiny_model("llama")
    model.model.layers[2].mlp.requires_grad_(requires_grad=False)
    smaller = apply_plan(model, depth_plan(model, 0))
    assert {name for name, parameter in smaller.named_parameters() if not parameter.requires_grad} == {
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
