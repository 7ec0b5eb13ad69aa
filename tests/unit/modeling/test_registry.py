"""Architectures that a program registers: what is refused, and models that are pruned, saved and reloaded."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_context_prune import (
    ArchSpec,
    EvalOptions,
    Projection,
    PrunerConfig,
    load_model,
    load_pruned,
    make_card,
    prune_to_folder,
    register_architecture,
)
from hf_context_prune.errors import ConfigError, LoadError, UnsupportedArchitectureError
from hf_context_prune.modeling import configuration_context_pruned
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.modeling_context_pruned import MODELING_FILES
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.pipelines import vllm_server
from hf_context_prune.pipelines.architecture.contract import random_plan
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.saving import save_pruned
from tests.support.brook import BrookConfig, BrookForCausalLM
from tests.support.marks import TINY_TEXT
from tests.support.table import table_kept
from tests.support.tiny import texts, tiny_tokenizer, tokens

BROOK = ArchSpec(
    "brook",
    "tests.support.brook:BrookConfig",
    "tests.support.brook:BrookForCausalLM",
    layers="river.reaches",
    mlp_inputs=("bank.rise",),
    mlp_output="bank.fall",
    activation="bank.bend",
    attention_inputs=(Projection("attention.mixed", ("query", "key", "value"), interleaved=True),),
    attention_output="attention.back",
    attention="attention",
    width="bank",
    query_heads="n_heads",
    kv_heads=None,
    attention_attributes=(("streams", "heads"),),
)
PERSIMMON = ArchSpec(
    "persimmon",
    "PersimmonConfig",
    "PersimmonForCausalLM",
    mlp_inputs=("mlp.dense_h_to_4h",),
    mlp_output="mlp.dense_4h_to_h",
    activation="mlp.act",
    attention_inputs=(Projection("self_attn.query_key_value", ("query", "key", "value"), interleaved=True),),
    attention_output="self_attn.dense",
    kv_heads=None,
    attention_attributes=(("num_heads", "heads"),),
)
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 320}
IDS = tokens(2, 16)


@pytest.fixture(autouse=True)
def table():
    """The table as it was, afterwards, and no auto class that knows `brook`."""
    with table_kept():
        yield
    transformers.CONFIG_MAPPING._extra_content.pop("brook", None)


def brook():
    torch.manual_seed(0)
    return BrookForCausalLM(BrookConfig(vocab_size=320, d_model=48, n_heads=3, bank=40, initializer_range=0.2)).eval()


def persimmon():
    torch.manual_seed(0)
    config = transformers.PersimmonConfig(
        **SMALL, intermediate_size=40, qk_layernorm=False, initializer_range=0.2, bos_token_id=1, eos_token_id=2
    )
    return transformers.PersimmonForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def pruned(model, folder):
    smaller = apply_plan(model, random_plan(model))
    return smaller, save_pruned(smaller, folder, tokenizer=tiny_tokenizer())


def test_a_registered_model_is_pruned_saved_and_reloaded(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match=r"'brook' is not supported.*hf-context-prune check MODEL"):
        apply_plan(brook(), None)
    register_architecture(BROOK)
    register_architecture(dataclasses.replace(BROOK))  # the same once more
    smaller, folder = pruned(brook(), tmp_path / "pruned")
    assert type(smaller).__name__ == "ContextPrunedBrookForCausalLM"
    for again in (AutoModelForCausalLM.from_pretrained(folder), pickle.loads(pickle.dumps(smaller))):
        assert type(again) is type(smaller)
        assert torch.equal(logits(again), logits(smaller))
    smaller.save_pretrained(folder)  # over its own files
    twice = apply_plan(smaller, random_plan(smaller, seed=3))
    assert twice.num_parameters() < smaller.num_parameters()


def test_models_of_ones_own_classes_are_loaded_from_folders(tmp_path):
    """Before they are pruned, and where all layers have one width."""
    register_architecture(BROOK)
    base = save_pruned(brook(), tmp_path / "base", tokenizer=tiny_tokenizer())
    loaded = load_model(base, device="cpu").model
    assert type(loaded) is BrookForCausalLM
    assert torch.equal(logits(loaded), logits(brook()))
    narrow = apply_plan(loaded, random_plan(loaded, variable=False))
    folder = save_pruned(narrow, tmp_path / "narrow", tokenizer=tiny_tokenizer())
    again = load_pruned(folder)
    assert type(again) is type(narrow)
    assert torch.equal(logits(again), logits(narrow))
    plan = PruningPlan.identity("brook", read_geometry(loaded.config, BROOK))
    kept = tuple(LayerPlan(tuple(range(20)), layer.kv_groups) for layer in plan.layers)
    native = apply_plan(loaded, dataclasses.replace(plan, layers=kept))
    assert type(native) is BrookForCausalLM
    assert torch.equal(
        logits(load_pruned(save_pruned(native, tmp_path / "n", tokenizer=tiny_tokenizer()))), logits(native)
    )


def test_the_entry_lies_beside_the_model_and_nothing_else_changes(tmp_path):
    register_architecture(BROOK)
    _, folder = pruned(brook(), tmp_path / "pruned")
    package = Path(sys.modules["hf_context_prune.modeling.specs"].__file__).parent
    for name in MODELING_FILES:
        same = (folder / name).read_bytes() == (package / name).read_bytes()
        assert same == (name != "registered.py")
    values = ast.literal_eval((folder / "registered.py").read_text().partition("...] = ")[2])
    assert [entry["model_type"] for entry in values] == ["brook"]
    assert "residual_multiplier" not in values[0]


def test_a_folder_brings_its_entry_along(tmp_path):
    register_architecture(PERSIMMON)
    smaller, folder = pruned(persimmon(), tmp_path / "pruned")
    for load in (load_pruned, lambda place: load_model(place, device="cpu").model):
        del SPECS["persimmon"]  # as in a new process
        again = load(folder)
        assert torch.equal(logits(again), logits(smaller))
        assert SPECS["persimmon"] == PERSIMMON


@TINY_TEXT
def test_the_whole_pipeline_takes_it(tmp_path, monkeypatch):
    """Pruned from a folder, then served and described in a process that never registered it."""
    register_architecture(PERSIMMON)
    base = save_pruned(persimmon(), tmp_path / "base", tokenizer=tiny_tokenizer())
    config = PrunerConfig(pruning_ratio=0.2, num_calibration_samples=8, max_seq_length=32, native_architecture=False)
    options = EvalOptions(benchmark=False, memory=False)
    result = prune_to_folder(base, texts(40), tmp_path / "pruned", config, eval_options=options)
    assert result.model.num_parameters() < persimmon().num_parameters()
    assert type(result.model).__name__ == "ContextPrunedPersimmonForCausalLM"
    del SPECS["persimmon"]
    make_card(tmp_path / "pruned", overwrite=True)
    assert SPECS.pop("persimmon") == PERSIMMON
    monkeypatch.setattr(vllm_server, "read_environment", lambda python: {"version": "0.32.0", "plugin": True})
    assert "--trust-remote-code" in vllm_server.vllm_command(tmp_path / "pruned")  # the plugin can't know it
    del SPECS["persimmon"]
    with pytest.raises(UnsupportedArchitectureError, match="'persimmon' is not supported"):
        load_model(base)


def test_no_code_is_imported_because_a_folder_names_it(tmp_path):
    register_architecture(BROOK)
    _, folder = pruned(brook(), tmp_path / "pruned")
    del SPECS["brook"]
    with pytest.raises(LoadError, match=r"not of transformers \(tests.support.brook:.*register_architecture"):
        load_pruned(folder)
    assert "brook" not in SPECS


DAMAGED = {
    "code": ("__import__('os').getcwd()", "is no entry of this version"),
    "a field of another version": ("({'model_type': 'persimmon', 'wings': 2},)", "unexpected keyword argument 'wings'"),
    "no values": ("5", "is no entry of this version"),
    "a wrong class": ("({'model_type': 'persimmon', 'config_class': 'Path', 'model_class': 'x'},)", "does not exist"),
    "a path that is none": ("(dict(model_type='persimmon'),)", "is no entry of this version"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_entry_is_refused_and_never_run(what, tmp_path):
    register_architecture(PERSIMMON)
    smaller = apply_plan(model := persimmon(), random_plan(model))
    smaller.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    del SPECS["persimmon"]
    text, message = DAMAGED[what]
    path = tmp_path / "registered.py"
    path.write_text(path.read_text().partition("ENTRIES")[0] + f"ENTRIES: tuple[dict[str, Any], ...] = {text}\n")
    with pytest.raises(LoadError, match=message):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(UnsupportedArchitectureError, match="'context_pruned_persimmon' is not supported"):
        load_model(tmp_path)


WRONG = {
    "layers": ({"layers": "model.layer"}, r"layers='model\.layer'.*Did you mean 'model\.layers'"),
    "an input": ({"mlp_inputs": ("mlp.dense_h_to_h",)}, r"mlp_inputs='mlp\.dense_h_to_h'.*'mlp\.dense_h_to_4h'"),
    "an output": ({"attention_output": "attn.dense"}, r"attention_output='attn\.dense'.*'self_attn\.dense'"),
    "the attention": ({"attention": "attn"}, r"attention='attn'.*'self_attn'"),
    "a width": ({"width": "intermediate"}, r"width='intermediate', but PersimmonConfig has no.*'intermediate_size'"),
    "a model class": ({"model_class": "PersimonForCausalLM"}, "does not exist.*'PersimmonForCausalLM'"),
    "a config class": ({"config_class": "PersimmonForCausalLM"}, "is no PreTrainedConfig"),
    "a module": ({"model_class": "persimon.modeling:Model"}, "'persimon.modeling:Model', which does not exist"),
    "a model type": ({"model_type": "persimon"}, "'persimon', but PersimmonConfig says 'persimmon'"),
    "a role": ({"attention_inputs": (Projection("self_attn.q", ("query",)),)}, "each of query, key, value is needed"),
    "a name": ({"attention_attributes": (("__class__", "heads"),)}, "'__class__'; a path is made of names"),
    "an attribute": ({"attention_attributes": (("num_heads", "headz"),)}, "'headz'.*one of heads, groups"),
    "an attribute that is not there": (
        {"attention_attributes": (("num_head", "heads"),)},
        "'num_head', which.*'num_heads'",
    ),
    "the other end of the MLP": ({"mlp_output": "mlp.dense_h_to_4h"}, "which writes .* features, and .*which reads"),
    "no pair": ({"fixed_heads": ("nope",)}, "fixed_heads of 'persimmon' has 'nope'; it must be a pair"),
    "a norm": ({"post_norms": ("norm",)}, "post_norms of 'persimmon' has 'norm'; it must be a pair"),
    "a switch": ({"fixed_heads": (("qk_layernom", "why"),)}, "fixed_heads='qk_layernom'.*'qk_layernorm'"),
    "a computed width": ({"computed_width": "double"}, "computed_width='double', but PersimmonConfig has no"),
    "a kind": ({"mlp_blocks": "2"}, "mlp_blocks of the entry is '2'; it must be of type int"),
    "a value": ({"mlp_inputs": (["mlp.up"],)}, "mlp_inputs of the entry"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_entry_is_refused_with_the_nearest_that_exist(what):
    fields, message = WRONG[what]
    with pytest.raises(ConfigError, match=message):
        register_architecture(dataclasses.replace(PERSIMMON, **fields))
    assert "persimmon" not in SPECS


def test_a_second_entry_of_a_model_type_is_refused():
    with pytest.raises(ConfigError, match="'llama' has an entry already, which differs"):
        register_architecture(dataclasses.replace(SPECS["llama"], activation=None))
    register_architecture(SPECS["llama"])
    with pytest.raises(ConfigError, match="takes an ArchSpec, not str"):
        register_architecture("llama")


def test_an_entry_that_was_registered_may_be_mended():
    register_architecture(dataclasses.replace(PERSIMMON, activation=None))
    register_architecture(PERSIMMON)
    assert SPECS["persimmon"] == PERSIMMON
    assert configuration_context_pruned.ContextPrunedPersimmonConfig.spec == PERSIMMON


class Before(PreTrainedConfig):
    """A config with an ``__init__`` of its own, as most code of others has it: values first."""

    model_type = "before"

    def __init__(self, num_hidden_layers=2, hidden_size=48, num_heads=6, ffn_dim=40, **more):
        self.num_hidden_layers, self.hidden_size, self.num_heads, self.ffn_dim = (
            num_hidden_layers,
            hidden_size,
            num_heads,
            ffn_dim,
        )
        super().__init__(**more)


class After(PreTrainedConfig):
    """The same with the values last."""

    model_type = "after"

    def __init__(self, num_hidden_layers=2, hidden_size=48, num_heads=6, ffn_dim=40, **more):
        super().__init__(**more)
        self.num_hidden_layers, self.hidden_size, self.num_heads, self.ffn_dim = (
            num_hidden_layers,
            hidden_size,
            num_heads,
            ffn_dim,
        )


@pytest.mark.parametrize("native", [Before, After])
def test_a_config_whose_init_is_written_by_hand(native, monkeypatch):
    spec = ArchSpec(
        native.model_type,
        f"{__name__}:{native.__name__}",
        f"{__name__}:Nothing",
        width="ffn_dim",
        query_heads="num_heads",
        kv_heads=None,
    )
    monkeypatch.setitem(SPECS, native.model_type, spec)
    made = getattr(configuration_context_pruned, configuration_context_pruned.config_class_name(spec))
    config = made(num_hidden_layers=3, per_layer_config={1: {"ffn_dim": 20}})
    assert [layer.ffn_dim for layer in config.per_layer_config] == [40, 20, 40]
    assert made.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match=r"per_layer_config\[1\]\.ffn_dim is 200; it must be from 1 to 40"):
        made(num_hidden_layers=3, per_layer_config={1: {"ffn_dim": 200}})
    with pytest.raises(ValueError, match="at most 512 layers"):
        made(num_hidden_layers=3_000_000)


@pytest.mark.slow
def test_plain_transformers_opens_it_in_a_new_process(tmp_path):
    """With remote code, and without the package; of one's own classes, their package is there."""
    expected = {}
    for spec, make in ((PERSIMMON, persimmon), (BROOK, brook)):
        register_architecture(spec)
        smaller, folder = pruned(make(), tmp_path / spec.model_type)
        with torch.no_grad():
            result = smaller(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        torch.save(result, tmp_path / f"{spec.model_type}.pt")
        expected[str(folder)] = True, 0
    torch.save(IDS, tmp_path / "ids.pt")
    (tmp_path / "cases.json").write_text(json.dumps(expected))
    root = Path(__file__).parents[3]
    own = tmp_path / "own" / "tests" / "support"  # without the package beside it
    own.mkdir(parents=True)
    for folder in (own, own.parent):
        (folder / "__init__.py").touch()
    (own / "brook.py").write_text((root / "tests/support/brook.py").read_text())
    result = subprocess.run(
        [sys.executable, root / "tests/support/reload_without_package.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "own")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {"checked": 2}
