"""`check` on models that can't be pruned, and on code of others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from hf_context_prune.errors import LoadError, UnsupportedArchitectureError
from hf_context_prune.modeling.spec_parts import Projection
from hf_context_prune.modeling.specs import SPECS, ArchSpec
from hf_context_prune.pipelines.architecture.check import check_architecture, entry_code
from tests.support import brook
from tests.support.marks import nightly_beside
from tests.support.tiny import MOE_CASES, case, tiny_config
from tests.support.tiny_wrappers import tiny_wrapper

REMOTE = {"AutoConfig": "modeling_brook.BrookConfig", "AutoModelForCausalLM": "modeling_brook.BrookForCausalLM"}


@pytest.mark.parametrize("name", nightly_beside(["mixtral", "olmoe"], MOE_CASES))
def test_mixtures_pass(name, tmp_path):
    case(name).config.save_pretrained(tmp_path)
    found = check_architecture(tmp_path)
    assert found.known
    assert found.passed, [check.why for check in found.checks if check.why]


@pytest.fixture
def place(tmp_path):
    return tmp_path


def saved(config, folder, **values):
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


REFUSED = {
    "latent attention": (
        transformers.DeepseekV3Config(num_hidden_layers=2, hidden_size=64),
        {"architectures": ["DeepseekV3ForCausalLM"]},
        "kv_lora_rank is 512, so it has multi-head latent attention",
    ),
    "latent attention in some layers": (
        transformers.AutoConfig.for_model("dots3_note_text"),
        {},
        "kv_lora_rank is .*, so it has multi-head latent attention",
    ),
    "a text part": (
        transformers.AutoConfig.for_model("qwen3_vl_text"),
        {"model_type": "context_pruned_qwen3_vl_text"},
        r"config of a text part alone \(context_pruned_qwen3_vl_text\)",
    ),
    "experts": (
        transformers.PhimoeConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_local_experts=8),
        {},
        "num_local_experts is 8, so it has a mixture of experts",
    ),
    "quantised": (
        transformers.PersimmonConfig(num_hidden_layers=2),
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quant_method 'gptq'.*Quantised weights can't be sliced exactly",
    ),
    "an encoder and a decoder": (transformers.T5Config(), {}, "is an encoder and a decoder.*no causal LM"),
    "no language model": (transformers.ViTConfig(), {}, "is a vit model, of which transformers has no causal LM"),
    "another head": (
        transformers.LlamaConfig(num_hidden_layers=2),
        {"architectures": ["LlamaForSequenceClassification"]},
        "config.json names LlamaForSequenceClassification, and the causal LM of its type is LlamaForCausalLM",
    ),
}


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_of_a_model_of_images_the_text_part_is_checked(name, place):
    tiny_wrapper(name).config.save_pretrained(place)
    found = check_architecture(place)
    assert found.passed
    assert found.model_type == {"gemma3": "gemma3_text", "qwen3_vl": "qwen3"}[name]


def test_gemma_4_is_checked_in_its_full_size(place):
    """Its config sets sizes of single layers, and doubles some."""
    transformers.Gemma4TextConfig(num_kv_shared_layers=10, use_double_wide_mlp=True).save_pretrained(place)
    assert check_architecture(place).passed


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_pruned_is_named(what, tmp_path):
    config, values, message = REFUSED[what]
    with pytest.raises(UnsupportedArchitectureError, match=message):
        check_architecture(saved(config, tmp_path, **values))


def test_an_unknown_rotation_is_named(tmp_path):
    folder = saved(tiny_config("llama"), tmp_path, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    with pytest.raises(LoadError, match=r"Unknown rope_type 'spiral'; allowed are default, .*yarn"):
        check_architecture(folder)


def test_code_of_a_folder_runs_only_where_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "brook"
    saved(brook.BrookConfig(), folder, architectures=["BrookForCausalLM"], auto_map=REMOTE)
    shutil.copy(brook.__file__, folder / "modeling_brook.py")
    with pytest.raises(LoadError, match=r"brings code of its own .*modeling_brook.* --trust-remote-code"):
        check_architecture(folder)
    found = check_architecture(folder, trust_remote_code=True)
    assert found.passed, found.checks[-1]
    assert found.spec.layers == "river.reaches"
    assert (found.spec.width, found.spec.query_heads) == ("bank", "n_heads")
    assert found.spec.attention_inputs == (Projection("attention.mixed", ("query", "key", "value"), interleaved=True),)
    assert found.spec.attention_attributes == (("streams", "heads"),)
    assert "brook" not in SPECS


def test_a_tiny_copy_has_a_limit(tmp_path, monkeypatch):
    """A size by a name that is not known is not made smaller."""
    monkeypatch.setitem(transformers.CONFIG_MAPPING._extra_content, "brook", brook.BrookConfig)
    transformers.AutoModelForCausalLM.register(brook.BrookConfig, brook.BrookForCausalLM, exist_ok=True)
    folder = saved(brook.BrookConfig(bank=10**6), tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=r"it still has 38\d,\d{3},\d{3} parameters"):
        check_architecture(folder)


def test_a_model_type_that_nobody_knows(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nobodys"}')
    with pytest.raises(LoadError, match=r"knows no model type 'nobodys'\. Update transformers"):
        check_architecture(tmp_path)
    with pytest.raises(LoadError, match=r"holds no config\.json"):
        check_architecture(Path(__file__).parent)


def test_the_entry_is_printed_as_code():
    for spec in SPECS.values():
        if spec.experts is not None:  # of the table alone
            continue
        code = entry_code(spec)
        assert eval(code, {"ArchSpec": ArchSpec, "Projection": Projection}) == spec
    assert entry_code(SPECS["llama"]) == 'ArchSpec(\n    "llama",\n    "LlamaConfig",\n    "LlamaForCausalLM",\n)'


def test_the_command(run, place):
    saved(transformers.PersimmonConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=4), place / "new")
    code, out, err = run("check", "@new")
    assert code == 0, err
    assert "✓ sliced equals masked, each layer with widths of its own\n" in out
    assert "\nfrom hf_context_prune import ArchSpec, Projection, register_architecture\n" in out
    entry = out.partition("register_architecture(ArchSpec(")[2]
    assert entry.startswith('\n    "persimmon",\n    "PersimmonConfig",\n    "PersimmonForCausalLM",\n')
    code, out, _ = run("check", "@new", "--format", "json")
    facts = json.loads(out)
    assert (code, facts["passed"], facts["known"], facts["model_type"]) == (0, True, False, "persimmon")
    saved(tiny_config("llama"), place / "known")
    assert run("check", "@known")[1].endswith("llama is supported.\n")
    assert run("check", "@known", "--format", "quiet") == (0, f"{entry_code(SPECS['llama'])}\n", "")
    code, out, err = run("check", "@absent/x")
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")


def test_the_command_tells_the_first_check_that_fails(run, place, monkeypatch):
    from hf_context_prune.pipelines.architecture import contract

    def broken(model, spec):
        raise contract.BrokenContract("logits differ by 3")

    monkeypatch.setitem(contract._CHECKS, "with a cache as without", broken)
    saved(transformers.PersimmonConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=4), place / "new")
    code, out, _ = run("check", "@new")
    assert code == 1
    assert "✗ with a cache as without: logits differ by 3\npersimmon has no entry that passes." in out
    assert "fixed_heads" not in out  # heads can be removed: keeping them would only hide what is wrong
