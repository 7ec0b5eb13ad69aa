"""Reconstruction, native architecture or not, the variable-width config's checks, and models that are refused."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from hf_context_prune.errors import SaveError, UnsupportedArchitectureError
from hf_context_prune.modeling.architectures import (
    TARGETS,
    check_supported,
    layers_of,
    output_projection,
    output_weight,
    unit_costs,
)
from hf_context_prune.modeling.geometry import LayerWidths, read_geometry
from hf_context_prune.modeling.native_fit import assess_native_fit
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan
from hf_context_prune.modeling.registry import get_model_class
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.pruning.surgery import apply_plan, kept_features
from hf_context_prune.storage.saving import save_pruned
from tests.support.limits import within
from tests.support.tiny import COVERING, VOCABULARY, case, tiny_config, tiny_model

IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def spec_of(model):
    return SPECS[model.config.model_type.removeprefix("context_pruned_")]


def plan_of(model, *layers):
    """The plan that keeps these (neurons, KV groups) of every layer."""
    geometry = read_geometry(model.config, spec_of(model))
    layers = layers * len(geometry.layers) if len(layers) == 1 else layers
    return PruningPlan(
        spec_of(model).model_type, geometry.layers, tuple(LayerPlan(tuple(n), tuple(g)) for n, g in layers)
    )


def variable(model):
    """A plan with other widths in every layer; the middle one keeps all its groups."""
    return plan_of(model, (range(30), (0, 2)), (range(5, 36), (0, 1, 2)), (range(3, 35), (1,)))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


# Repair


@pytest.mark.parametrize("name", ["llama", "llama-biased", "gpt2", "opt", "gpt_neox"])
def test_repair_is_asked_once_for_every_narrowed_projection(name):
    model = case(name)
    spec, geometry = spec_of(model), read_geometry(model.config, spec_of(model))
    neurons, groups = range(geometry.layers[0].neurons), range(geometry.layers[0].kv_groups)
    plan = plan_of(model, (range(1, 30), groups), (neurons, (0, 2)), (neurons, (1,)))
    calls = {}

    def reconstruct(layer, target, weight, bias, kept):
        calls[layer, target] = (weight.clone(), bias, kept)
        return 2 * weight[:, kept], None if bias is None else bias + 1

    smaller = apply_plan(model, plan, reconstruct=reconstruct)
    assert set(calls) == {(0, "mlp"), (1, "attention"), (2, "attention")}
    for (layer, target), (weight, bias, kept) in calls.items():
        old = output_projection(layers_of(model, spec)[layer], spec, target)
        new = output_projection(layers_of(smaller, spec)[layer], spec, target)
        assert torch.equal(weight, output_weight(old))  # [out, in], whatever the storage
        assert kept == kept_features(geometry, target, plan.layers[layer].kept(target))
        assert torch.equal(output_weight(new), 2 * output_weight(old)[:, kept])
        assert (bias is None) == (old.bias is None)
        if bias is not None:
            assert torch.equal(bias, old.bias)
            assert torch.equal(new.bias, old.bias + 1)
    for layer, target in {(layer, target) for layer in range(3) for target in TARGETS} - set(calls):
        old = output_projection(layers_of(model, spec)[layer], spec, target)
        assert torch.equal(output_projection(layers_of(smaller, spec)[layer], spec, target).weight, old.weight)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_repair_that_returns_views_shares_nothing_with_the_model(name):
    model = case(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_of(model, (range(20), range(2)))
    smaller = apply_plan(
        model, plan, reconstruct=lambda layer, target, weight, bias, kept: (weight[:, -len(kept) :], bias)
    )
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.fill_(7)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_repair_in_float64_is_stored_in_the_models_dtype():
    model = case("llama-biased").bfloat16()

    def reconstruct(layer, target, weight, bias, kept):
        return weight[:, kept].double(), bias.double()

    smaller = apply_plan(model, variable(model), reconstruct=reconstruct)
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(smaller), logits(apply_plan(model, variable(model))))


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-unbiased"])
def test_a_bias_where_the_architecture_has_none(name, tmp_path):
    model = case(name)
    spec, plan = spec_of(model), plan_of(case(name), (range(3, 33), (0, 2)))
    generator = torch.Generator().manual_seed(0)
    biases = {}

    def reconstruct(layer, target, weight, bias, kept):
        biases[layer, target] = torch.randn(weight.shape[0], generator=generator)
        return weight[:, kept], biases[layer, target]

    smaller = apply_plan(model, plan, reconstruct=reconstruct)
    plain = apply_plan(model, plan)
    for (layer, target), bias in biases.items():
        projection = output_projection(layers_of(smaller, spec)[layer], spec, target)
        assert torch.equal(projection.bias, bias)
        output_projection(layers_of(plain, spec)[layer], spec, target).register_forward_hook(
            lambda _, args, output, bias=bias: output + bias
        )
    torch.testing.assert_close(logits(smaller), logits(plain), atol=1e-5, rtol=1e-5)
    assert (logits(smaller) - logits(apply_plan(model, plan))).abs().max() > 1e-2

    target = tmp_path / "model"
    with pytest.raises(SaveError, match=rf"6 output projections carry a bias that {spec.config_class} has no field"):
        save_pruned(smaller, target)
    with pytest.raises(SaveError, match="reconstruction='least_squares'"):
        save_pruned(copy.deepcopy(smaller), target)
    with pytest.raises(SaveError, match="reloads as it is"):
        smaller.save_pretrained(target)  # what the Trainer and push_to_hub call
    assert list(tmp_path.iterdir()) == []


# What carries over


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-mqa-tied"])
def test_frozen_parameters_stay_frozen(name):
    model = case(name)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    smaller = apply_plan(model, plan_of(model, (range(20), (0,))))
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert {key: parameter.requires_grad for key, parameter in smaller.named_parameters()} == flags
    assert set(flags.values()) == {True, False}


def test_mode_name_and_generation_config_carry_over(model):
    model.generation_config.max_new_tokens = 77
    model.config.name_or_path = "some/model"
    for training in (True, False):
        smaller = apply_plan(model.train(training), variable(model))
        assert {module.training for module in smaller.modules()} == {training}
    assert smaller.config.name_or_path == "some/model"
    assert smaller.generation_config.max_new_tokens == 77
    smaller.generation_config.max_new_tokens = 5
    assert model.generation_config.max_new_tokens == 77


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("name", "copy_of"),
    [("llama", copy.deepcopy), ("opt", pickled), ("gpt_neox", copy.deepcopy), ("gemma3_text", pickled)],
)
def test_a_variable_width_model_is_copied_whole(name, copy_of):
    smaller = apply_plan(case(name), variable(case(name)))
    again = copy_of(smaller)
    assert type(again) is type(smaller)
    assert type(again).__name__.startswith("ContextPruned")
    assert again.config.to_dict() == smaller.config.to_dict()
    assert type(again.config) is type(smaller.config)
    assert torch.equal(logits(again), logits(smaller))
    with torch.no_grad():
        again.get_input_embeddings().weight.zero_()
    assert not torch.equal(logits(again), logits(smaller))


@pytest.mark.parametrize("name", COVERING)
def test_costs_are_what_a_unit_takes_with_it(name):
    model = case(name)
    spec = spec_of(model)
    geometry = read_geometry(model.config, spec)
    costs = unit_costs(model, spec, geometry)
    neurons, groups = geometry.layers[0].neurons, [layer.kv_groups for layer in geometry.layers]
    fewer = apply_plan(model, plan_of(model, *((range(neurons - 2), range(count)) for count in groups)))
    assert model.num_parameters() - fewer.num_parameters() == 3 * 2 * costs["mlp"]
    if max(groups) > 1:
        fewer = apply_plan(model, plan_of(model, *((range(neurons), range(max(0, count - 1))) for count in groups)))
        assert model.num_parameters() - fewer.num_parameters() == sum(map(bool, groups)) * costs["attention"]


# Stock or not


def fit(name, *widths, **overrides):
    config = tiny_config(name, **overrides)
    widths = widths * config.num_hidden_layers if len(widths) == 1 else widths
    return assess_native_fit(config, SPECS[name], [LayerWidths(*width) for width in widths])


def test_uniform_widths_fit_the_stock_architecture():
    for name, spec in SPECS.items():
        if spec.experts is None:
            found = fit(name, (20, 6 if spec.kv_heads is None else 3))
        else:
            config = tiny_config(name)
            found = assess_native_fit(config, spec, read_geometry(config, spec).layers)
        assert found.fits, name
        assert spec.config_class in found.reason
    assert fit("llama", (20, 2)).fits
    assert fit("qwen2", (1, 1)).fits


REFUSED_HEADS = [
    ("llama", 5, "LlamaConfig refuses 5 KV groups: The hidden size .48. is not a multiple"),
    ("opt", 5, "OPTForCausalLM refuses 5 KV groups: embed_dim must be divisible by num_heads"),
    ("opt", 4, "OPTForCausalLM derives its head size from the number of heads.* 4 heads"),
    ("gpt2", 5, "GPT2LMHeadModel refuses 5 KV groups: `embed_dim` must be divisible by num_heads"),
    ("gpt2", 3, "GPT2LMHeadModel derives its head size from the number of heads.* 3 heads"),
    ("gpt_neox", 5, "GPTNeoXConfig refuses 5 KV groups: The hidden size is not divisible"),
    ("gpt_neox", 2, "GPTNeoXForCausalLM derives its head size from the number of heads.* 2 heads"),
    ("phi", 2, "PhiForCausalLM derives its head size from the number of heads.* 2 heads"),
]


def test_head_counts_that_the_stock_architecture_refuses(subtests):
    for name, groups, said in REFUSED_HEADS:
        with subtests.test(name=name, groups=groups):
            found = fit(name, (20, groups), **({"num_key_value_heads": 6} if name == "llama" else {}))
            assert not found.fits
            assert re.search(said, found.reason), found.reason


def test_variable_widths_do_not_fit():
    for widths in (((20, 3), (20, 3), (21, 3)), ((20, 3), (20, 2), (20, 3))):
        found = fit("llama", *widths)
        assert not found.fits
        assert found.reason == "widths vary from layer to layer, which LlamaConfig can't express"


def test_a_variable_width_model_that_became_uniform_is_stock_again(model):
    once = apply_plan(model, variable(model))
    assert type(once).__name__ == "ContextPrunedLlamaForCausalLM"
    twice = apply_plan(once, plan_of(once, (range(25), (0,)), (range(1, 26), (2,)), (range(25), (0,))))
    assert type(twice) is LlamaForCausalLM
    assert "per_layer_config" not in twice.config.to_dict()
    assert (twice.config.intermediate_size, twice.config.num_key_value_heads) == (25, 1)


# The variable-width config


@pytest.fixture(scope="module")
def pruned_config():
    model = tiny_model("llama")
    return apply_plan(model, variable(model)).config


def edited(config, layer, **values):
    """A config.json with a layer's (or, with None, its global) values changed."""
    data = json.loads(json.dumps(config.to_dict()))
    (data if layer is None else data["per_layer_config"].setdefault(str(layer), {})).update(values)
    return data


BAD_WIDTHS = [
    (1, {"intermediate_size": 0}, r"per_layer_config\[1\]\.intermediate_size is 0; it must be from 1 to 40"),
    (1, {"intermediate_size": -3}, r"per_layer_config\[1\]\.intermediate_size is -3; it must be from 1 to 40"),
    (1, {"intermediate_size": True}, r"per_layer_config\[1\]\.intermediate_size is True \(bool\); .* integer"),
    (1, {"intermediate_size": 30.0}, r"per_layer_config\[1\]\.intermediate_size is 30\.0 \(float\)"),
    (1, {"intermediate_size": "30"}, r"per_layer_config\[1\]\.intermediate_size is '30' \(str\)"),
    (1, {"intermediate_size": None}, r"per_layer_config\[1\]\.intermediate_size is None"),
    (1, {"intermediate_size": 41}, r"per_layer_config\[1\]\.intermediate_size is 41; it must be from 1 to 40"),
    (0, {"num_key_value_heads": 0}, r"per_layer_config\[0\]\.num_key_value_heads is 0"),
    (0, {"num_key_value_heads": 4, "num_attention_heads": 8}, r"per_layer_config\[0\]\.num_\w+_heads is [48]; .* to"),
    (0, {"num_attention_heads": 3}, r"per_layer_config\[0\] has 3 query heads and 2 KV groups; .* 2 query heads"),
    (0, {"num_attention_heads": -4}, r"per_layer_config\[0\]\.num_attention_heads is -4"),
    (2, {"hidden_size": 24}, r"per_layer_config\[2\] sets hidden_size; .* varies only intermediate_size"),
    (2, {"wings": 24}, "wings"),
    (7, {"intermediate_size": 3}, r"\[0, 3\); got \[7\]"),
    (None, {"num_key_value_heads": 0}, "num_key_value_heads is 0;"),
    (None, {"num_attention_heads": -6}, "num_attention_heads is -6;"),
    (None, {"intermediate_size": 0}, "intermediate_size is 0;"),
    (None, {"intermediate_size": 31}, r"per_layer_config\[2\]\.intermediate_size is 32; it must be from 1 to 31"),
]


def test_widths_that_no_layer_could_have(pruned_config, tmp_path, monkeypatch, subtests):
    def fail(*args, **kwargs):
        raise AssertionError("a module was built")

    monkeypatch.setattr(nn.Module, "__init__", fail)
    for layer, values, said in BAD_WIDTHS:
        with subtests.test(layer=layer, values=values):
            data = edited(pruned_config, layer, **values)
            with pytest.raises((ValueError, StrictDataclassError), match=said):
                type(pruned_config).from_dict(data)
            (tmp_path / "config.json").write_text(json.dumps(data))
            for load in (AutoConfig, AutoModelForCausalLM, get_model_class(SPECS["llama"])):
                with pytest.raises((ValueError, StrictDataclassError), match=said):
                    load.from_pretrained(tmp_path)


def test_other_names_are_checked_under_their_own_names():
    for name, width, heads in (("gpt2", "n_inner", "n_head"), ("opt", "ffn_dim", "num_attention_heads")):
        model = case(name)
        config = apply_plan(model, variable(model)).config
        for attribute, value in ((width, 0), (heads, 7)):
            with pytest.raises(StrictDataclassError, match=rf"per_layer_config\[2\]\.{attribute} is {value}"):
                type(config).from_dict(edited(config, 2, **{attribute: value}))


WIDTHS_WITHOUT_WEIGHTS = [
    (1, {"intermediate_size": 40}, r"layers\.1\.mlp\.down_proj\.weight .*asks for \[48, 40\]"),
    (1, {"intermediate_size": 5}, r"layers\.1\.mlp\.down_proj\.weight .*asks for \[48, 5\]"),
    (1, {"intermediate_size": 48}, r"layers\.1\.mlp\.down_proj\.weight .*asks for \[48, 48\]"),
    (2, {"num_attention_heads": 6, "num_key_value_heads": 3}, r"\.2\.self_attn\.o_proj\.weight .*asks for \[48, 48\]"),
    (0, {"num_attention_heads": 2, "num_key_value_heads": 1}, r"\.0\.self_attn\.o_proj\.weight .*asks for \[48, 16\]"),
]


@pytest.mark.parametrize("shards", [1, 3])
def test_widths_that_the_weights_do_not_have(shards, tmp_path, monkeypatch, subtests):
    model = tiny_model("llama", intermediate_size=64)
    smaller = apply_plan(model, variable(model))
    smaller.save_pretrained(tmp_path, max_shard_size="40KB" if shards > 1 else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(smaller))
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    for layer, values, said in WIDTHS_WITHOUT_WEIGHTS:
        with subtests.test(layer=layer, values=values):
            (tmp_path / "config.json").write_text(json.dumps(edited(smaller.config, layer, **values)))
            for loader in (AutoModelForCausalLM, type(smaller)):
                with pytest.raises(ValueError, match=said) as error:
                    loader.from_pretrained(tmp_path)
                assert str(tmp_path.parent) not in str(error.value)
                assert tmp_path.name in str(error.value)


def test_a_huge_width_is_refused_before_it_is_allocated(tmp_path):
    smaller = apply_plan(tiny_model("llama"), variable(tiny_model("llama")))
    smaller.save_pretrained(tmp_path)
    data = edited(smaller.config, 0, intermediate_size=10**12)
    (tmp_path / "config.json").write_text(json.dumps(data | {"intermediate_size": 10**12}))
    with within(), pytest.raises(ValueError, match=r"mlp\.down_proj\.weight .*asks for \[48, 1000000000000\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# Models that are refused


def test_unknown_model_types_are_refused():
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20)
    with pytest.raises(UnsupportedArchitectureError, match=r"'bloom' is not supported: .*4 \* hidden_size"):
        check_supported(transformers.BloomForCausalLM(config))
    config = transformers.XGLMConfig(d_model=16, num_layers=1, attention_heads=2, ffn_dim=8, vocab_size=20)
    with pytest.raises(UnsupportedArchitectureError, match=r"'xglm' is not supported.*gpt2, .*llama.*check MODEL"):
        check_supported(transformers.XGLMForCausalLM(config))


def test_other_heads_of_a_known_type_are_refused():
    model = transformers.LlamaForSequenceClassification(tiny_config("llama"))
    with pytest.raises(UnsupportedArchitectureError, match=r"LlamaForSequenceClassification; .* LlamaForCausalLM"):
        check_supported(model)


class PeftLike(nn.Module):
    """As `peft.PeftModel`: no PreTrainedModel, but it lends the inner model's attributes."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


class AdapterLike(nn.Module):
    """As `peft.tuners.lora.Linear`: put in a projection's place, with its weight as an attribute."""

    def __init__(self, inner):
        super().__init__()
        self.base_layer = inner

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x)


def test_wrapped_models_are_refused(model):
    plan = variable(model)
    assert PeftLike(model).config is model.config
    for wrapped in (PeftLike(model), nn.DataParallel(model), nn.Linear(3, 3)):
        with pytest.raises(UnsupportedArchitectureError, match=rf"{type(wrapped).__name__}.*merge_and_unload"):
            check_supported(wrapped)
        with pytest.raises(UnsupportedArchitectureError):
            apply_plan(wrapped, plan)


def test_adapters_inside_are_refused(model):
    plan, layer = variable(model), model.model.layers[1]
    for path in ("mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"):
        inner = layer.get_submodule(path)
        layer.set_submodule(path, AdapterLike(inner))
        with pytest.raises(UnsupportedArchitectureError, match=rf"model\.layers\.1\.{path} .*AdapterLike"):
            apply_plan(model, plan)
        layer.set_submodule(path, inner)


def test_weights_that_are_not_there_or_not_numbers_are_refused(model):
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny_config("llama"))
    with pytest.raises(UnsupportedArchitectureError, match=r"model\.embed_tokens\.weight is on the meta device"):
        check_supported(empty)
    quantised = nn.Parameter(torch.zeros(48, 40, dtype=torch.int8), requires_grad=False)
    model.model.layers[1].mlp.down_proj.weight = quantised
    with pytest.raises(UnsupportedArchitectureError, match=r"layers\.1\.mlp\.down_proj\.weight has dtype torch\.int8"):
        check_supported(model)


def test_quantised_models_are_refused(model):
    model.is_quantized = True
    with pytest.raises(UnsupportedArchitectureError, match="quantised"):
        check_supported(model)


def test_a_reloaded_variable_model_saves_its_modeling_files_again(tmp_path):
    """Also through the plain `save_pretrained`, which the Trainer and `push_to_hub` call."""
    model = tiny_model("llama")
    geometry = read_geometry(model.config, SPECS["llama"])
    layers = tuple(LayerPlan(tuple(range(30 + index)), (0, 2)) for index in range(3))
    smaller = apply_plan(model, PruningPlan("llama", geometry.layers, layers))
    smaller.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    again.save_pretrained(tmp_path / "twice")
    for folder in ("plain", "twice"):
        auto_map = json.loads((tmp_path / folder / "config.json").read_text())["auto_map"]
        for reference in auto_map.values():
            assert (tmp_path / folder / f"{reference.split('.')[0]}.py").is_file()
        assert (tmp_path / folder / "specs.py").is_file()
