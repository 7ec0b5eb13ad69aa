"""Models of images and text: their text part is a causal LM, and goes back, pruned, into a model that still sees."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from hf_context_prune.errors import SaveError, UnsupportedArchitectureError
from hf_context_prune.modeling.registry import get_model_class
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.modeling.wrapper_specs import WRAPPERS
from hf_context_prune.modeling.wrappers import text_model, with_text
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.loading import load_meta_model, load_model, load_pruned
from hf_context_prune.storage.saving import save_pruned
from tests.contract.test_families import masked, random_plan
from tests.support.tiny import VOCABULARY, tokens
from tests.support.tiny_wrappers import CASES, picture, tiny_wrapper

IDS = tokens(2, 24).clamp(max=VOCABULARY - 9)
SCRIPT = Path(__file__).parents[1] / "support" / "see_without_package.py"
CAUSAL = {
    "gemma3": "Gemma3ForCausalLM",
    "mistral3-mistral": "MistralForCausalLM",
    "mistral3-ministral3": "Ministral3ForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_vl": "Qwen3ForCausalLM",
}
PARTS = ("model.language_model.", "lm_head.")


def logits(model, name=None):
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)} if name is None else picture(name)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        return model(**inputs).logits


def pruned(wrapper, *, variable=True, seed=0):
    text = text_model(wrapper)
    return with_text(wrapper, apply_plan(text, random_plan(text, variable=variable, seed=seed)))


def test_every_wrapper_and_every_text_part_has_a_tiny_model():
    assert {(wrapper, text) for wrapper, text, _ in CASES.values()} == {
        (spec.model_type, text) for spec in WRAPPERS.values() for text in spec.texts
    }


@pytest.mark.parametrize("name", CASES)
def test_the_text_part_is_the_causal_lm_of_its_family(name):
    wrapper = tiny_wrapper(name)
    wrapper.model.language_model.layers[0].requires_grad_(False)
    text = text_model(wrapper)
    assert type(text).__name__ == CAUSAL[name]
    assert torch.equal(logits(text), logits(wrapper))
    known = {parameter.data_ptr() for parameter in wrapper.parameters()}
    assert {parameter.data_ptr() for parameter in text.parameters()} <= known
    assert not any(parameter.requires_grad for parameter in text.model.layers[0].parameters())
    assert all(parameter.requires_grad for parameter in text.model.layers[1].parameters())
    again = with_text(wrapper, text)
    assert type(again) is type(wrapper)
    assert torch.equal(logits(again, name), logits(wrapper, name))
    assert again.config.to_dict().keys() == wrapper.config.to_dict().keys()


@pytest.mark.parametrize("variable", [True, False], ids=["variable", "uniform"])
@pytest.mark.parametrize("name", CASES)
def test_sliced_equals_masked_with_and_without_an_image(name, variable):
    wrapper = tiny_wrapper(name)
    before = copy.deepcopy(wrapper.state_dict())
    text = text_model(wrapper)
    plan = random_plan(text, variable=variable)
    smaller = with_text(wrapper, apply_plan(text, plan))
    silenced = copy.deepcopy(wrapper)
    silenced.model.language_model.load_state_dict(masked(text, plan).model.state_dict())
    for image in (None, name):
        expected = logits(silenced, image)
        torch.testing.assert_close(logits(smaller, image), expected, atol=1e-5, rtol=1e-5)
        assert (logits(wrapper, image) - expected).abs().max() > 1e-2  # the plan does remove something that mattered
    other = picture(name)
    other["pixel_values"] = other["pixel_values"].flip(0, -1)
    with torch.no_grad():
        assert (smaller(**other).logits - logits(smaller, name)).abs().max() > 1e-2  # the image matters
    after = smaller.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if not key.startswith(PARTS))
    assert all(torch.equal(value, before[key]) for key, value in wrapper.state_dict().items())
    assert smaller.num_parameters() < wrapper.num_parameters()
    spec = WRAPPERS[wrapper.config.model_type]
    assert type(smaller) is (get_model_class(spec) if variable else type(wrapper))


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_model_goes_on_from_an_image(name):
    smaller = pruned(tiny_wrapper(name))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    written = smaller.generate(**picture(name), **options)
    assert torch.equal(written, smaller.generate(**picture(name), use_cache=False, **options))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_reloads_bit_equal(name, dtype, tmp_path):
    wrapper = tiny_wrapper(name).to(dtype)
    for variable in (True, False):
        smaller = pruned(wrapper, variable=variable)
        folder = save_pruned(smaller, tmp_path / f"{variable}")
        again = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        assert type(again) is type(smaller)
        assert again.dtype == dtype
        assert torch.equal(logits(again, name), logits(smaller, name))
        assert torch.equal(logits(text_model(again)), logits(text_model(smaller)))
        twice = save_pruned(again, tmp_path / f"{variable}-twice")
        for file in ("config.json", "model.safetensors"):
            assert (twice / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("gemma3", "qwen3_vl") else pytest.mark.slow) for name in CASES]
)
def test_a_folder_is_loaded_as_its_text_part(name, tokenizer, tmp_path):
    wrapper = tiny_wrapper(name)
    for folder, model in (("dense", wrapper), ("pruned", pruned(wrapper))):
        save_pruned(model, tmp_path / folder, tokenizer=tokenizer)
        loaded = load_model(tmp_path / folder, device="cpu")
        assert torch.equal(logits(loaded.model), logits(model))
        assert torch.equal(logits(loaded.whole, name), logits(model, name))
        assert load_meta_model(tmp_path / folder).num_parameters() == loaded.model.num_parameters()
        assert type(load_pruned(tmp_path / folder)) is type(model)


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_model_can_be_pruned_again(name):
    once = pruned(tiny_wrapper(name))
    text = text_model(once)
    plan = random_plan(text, seed=3)
    twice = with_text(once, apply_plan(text, plan))
    assert twice.num_parameters() < once.num_parameters()
    assert torch.equal(logits(twice), logits(apply_plan(text, plan)))
    assert torch.isfinite(logits(twice, name)).all()


@pytest.mark.slow
def test_a_fresh_process_without_the_package(tmp_path):
    names = {}
    for name in CASES:
        for variable in (True, False):
            smaller = pruned(tiny_wrapper(name), variable=variable)
            folder = save_pruned(smaller, tmp_path / f"{name}-{variable}")
            torch.save((picture(name), logits(smaller, name)), tmp_path / f"{folder.name}.pt")
            names[str(folder)] = variable
    (tmp_path / "cases.json").write_text(json.dumps(names))
    result = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {"checked": len(names)}


def test_what_is_no_text_part_of_a_known_model_is_refused():
    wrapper = tiny_wrapper("gemma3")
    with pytest.raises(UnsupportedArchitectureError, match="reads images beside text"):
        ModelView.of(wrapper)
    with pytest.raises(UnsupportedArchitectureError, match="no model of images and text"):
        text_model(text_model(wrapper))
    adapted = get_peft_model(tiny_wrapper("gemma3"), LoraConfig(target_modules=["q_proj"])).get_base_model()
    with pytest.raises(UnsupportedArchitectureError, match="an adapter or a quantiser"):
        text_model(adapted)
    other = tiny_wrapper("mistral3-mistral")
    other.config.text_config = text_model(wrapper).config
    with pytest.raises(UnsupportedArchitectureError, match="'gemma3_text'; supported are mistral, ministral3"):
        text_model(other)


def test_a_text_part_of_fewer_tokens_does_not_go_back():
    wrapper = tiny_wrapper("gemma3")
    text = text_model(wrapper)
    text.resize_token_embeddings(VOCABULARY - 16)
    with pytest.raises(SaveError, match=r"304 vocabulary entries.*--text-only"):
        with_text(wrapper, text)


def test_a_damaged_text_config_is_refused(tmp_path):
    folder = save_pruned(pruned(tiny_wrapper("qwen3_vl")), tmp_path / "pruned")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["per_layer_config"]["1"]["intermediate_size"] = 39
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not belong to these weights"):
        AutoModelForImageTextToText.from_pretrained(folder)
    config["text_config"]["model_type"] = "context_pruned_llama"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="context_pruned_qwen3_vl_text"):
        AutoModelForImageTextToText.from_pretrained(folder)
