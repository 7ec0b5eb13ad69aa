"""The right entry is found for families whose own is taken away."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from hf_context_prune.errors import UnsupportedArchitectureError
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.pipelines.architecture.check import check_architecture
from hf_context_prune.pipelines.architecture.contract import holds, run_contract
from hf_context_prune.pipelines.architecture.propose import propose
from hf_context_prune.pipelines.architecture.tiny_copy import make_tiny_copy
from tests.support.table import table_kept
from tests.support.tiny import FAMILIES, case, tiny_config

DIVERSE = (
    *("llama", "qwen3", "gemma2", "olmo2", "exaone4", "granite", "granite_swa", "phi3", "glm4", "starcoder2"),
    *("nanochat", "gpt_neox", "falcon", "gptj", "opt", "gpt2"),
)
"""Families whose places are looked for in every run of the tests; those of all others at night."""
WHOLE = ("olmo2", "phi3", "falcon", "gpt2")
"""Families that the whole command is run on then, with the contract."""
NOT_FOUND = {"lfm2": "the width is computed"}
PLACES = (
    *("layers", "mlp_inputs", "mlp_blocks", "mlp_output", "activation", "attention_inputs", "attention_output"),
    *("width", "query_heads", "kv_heads", "head_parameters", "post_norms", "residual_multiplier", "transposed"),
    *("config_class", "model_class", "headless_class"),
)
"""Fields that must be those of the table. The others may say of one config what the entry says of all."""


@pytest.fixture(autouse=True)
def entries_in_order():
    with table_kept():
        yield


@pytest.fixture
def config_folder(tmp_path, monkeypatch):
    """Write the tiny config of a family, and take the family's entry away; returns the folder and the entry."""

    def write(family):
        config = tiny_config(family)
        config.architectures = [SPECS[family].model_class]
        config.save_pretrained(tmp_path / family)
        spec = SPECS[family]
        monkeypatch.delitem(SPECS, family)
        return tmp_path / family, spec

    return write


def places(spec):
    return {name: getattr(spec, name) for name in PLACES}


@pytest.mark.parametrize("family", DIVERSE)
def test_the_places_are_among_those_proposed(family, config_folder):
    folder, spec = config_folder(family)
    config = getattr(transformers, spec.config_class).from_pretrained(folder)
    proposed = propose(make_tiny_copy(config, getattr(transformers, spec.model_class)))
    assert places(spec) in [places(one) for one in proposed]
    assert len(proposed) <= 8


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in WHOLE else pytest.mark.nightly) for name in FAMILIES]
)
def test_the_entry_is_found(family, config_folder):
    folder, spec = config_folder(family)
    if family in NOT_FOUND:
        with pytest.raises(UnsupportedArchitectureError, match=NOT_FOUND[family]):
            check_architecture(folder)
        return
    told = []
    found = check_architecture(folder, report=told.append)
    assert found.passed, found.checks[-1]
    assert not found.known
    assert list(found.checks) == told
    assert places(found.spec) == places(spec)
    assert bool(found.spec.fixed_heads) == (None in [name for name, _ in spec.fixed_heads])
    assert set(spec.attention_attributes) <= set(found.spec.attention_attributes) or family == "gpt_neo"
    assert family not in SPECS  # nothing stays registered


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "qwen3" else pytest.mark.nightly) for name in FAMILIES]
)
def test_a_supported_family_is_held_to_the_contract_too(family, tmp_path):
    tiny_config(family).save_pretrained(tmp_path)
    found = check_architecture(tmp_path)
    assert found.passed, found.checks[-1]
    assert found.known
    assert found.spec is SPECS[family]


def change(entry, **fields):
    return dataclasses.replace(entry, **fields)


def swapped(spec):
    stacked = change(spec.attention_inputs[0], interleaved=False)
    return change(spec, attention_inputs=(stacked,))


WRONG = {
    "the layout of a stacked projection": ("gpt_neox", swapped, "sliced equals masked"),
    "a size that the module keeps": (
        "gpt2",
        lambda spec: change(spec, attention_attributes=()),
        "sliced equals masked",
    ),
    "heads that must stay": ("olmo2", lambda spec: change(spec, fixed_heads=()), "sliced equals masked"),
    "a path": ("llama", lambda spec: change(spec, mlp_output="mlp.down"), "its classes and paths exist"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_first_check_that_fails_says_why(wrong):
    family, change_entry, check = WRONG[wrong]
    spec = SPECS[family]
    checks = run_contract(case(family), change_entry(spec))
    assert not holds(checks)
    assert checks[-1].name.startswith(check)
    assert checks[-1].why
    assert SPECS[family] is spec


def test_a_tiny_copy_keeps_the_kinds_of_layers():
    config = transformers.Gemma3TextConfig(num_hidden_layers=12, hidden_size=640, head_dim=256, sliding_window=512)
    tiny = make_tiny_copy(config, transformers.Gemma3ForCausalLM)
    assert set(tiny.model.config.layer_types) == {"sliding_attention", "full_attention"}
    assert tiny.model.config.num_hidden_layers == 3
    assert (tiny.heads, tiny.groups, tiny.head_dim) == (6, 3, 24)
    assert tiny.model.num_parameters() < 500_000
    assert config.num_hidden_layers == 12
    again = make_tiny_copy(config, transformers.Gemma3ForCausalLM)
    assert all(torch.equal(*pair) for pair in zip(tiny.model.parameters(), again.model.parameters(), strict=True))


def test_what_no_entry_can_describe_is_named():
    """Norms over all neurons, and layers without attention."""
    config = transformers.BitNetConfig(num_hidden_layers=2)
    with pytest.raises(UnsupportedArchitectureError, match=r"mlp\.ffn_sub_norm\.weight has a value for each neuron"):
        propose(make_tiny_copy(config, transformers.BitNetForCausalLM))
    config = transformers.MambaConfig(num_hidden_layers=2, hidden_size=64)
    with pytest.raises(UnsupportedArchitectureError, match="MambaConfig has no number of attention heads"):
        propose(make_tiny_copy(config, transformers.MambaForCausalLM))
