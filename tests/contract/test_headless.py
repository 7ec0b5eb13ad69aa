"""`AutoModel` opens every variable-width folder as a class without a head, for servers with heads of their own."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from hf_context_prune.errors import LoadError
from hf_context_prune.modeling.modeling_context_pruned import model_class_name
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.pipelines.architecture.contract import random_plan
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.saving import save_pruned
from tests.support.tiny import CASES, COVERING, VOCABULARY, case, tokens

IDS = tokens(2, 24).clamp(max=VOCABULARY - 9)


@pytest.fixture
def pruned(request, tmp_path):
    """A variable-width model of a case, and its folder."""
    base = case(request.param)
    model = apply_plan(base, random_plan(base))
    return model, save_pruned(model, tmp_path / "pruned")


def states(model):
    with torch.inference_mode():
        return model(IDS).last_hidden_state


@pytest.mark.parametrize("pruned", CASES, indirect=True)
def test_the_class_without_a_head_gives_the_hidden_states_of_the_causal_lm(pruned):
    model, folder = pruned
    body = model.base_model
    opened = AutoModel.from_pretrained(folder, dtype="auto").eval()
    name = model_class_name(SPECS[model.config.model_type.removeprefix("context_pruned_")].headless())
    assert type(opened).__name__ == name
    assert torch.equal(states(opened), states(body))
    built = AutoModel.from_config(model.config).eval()
    built.load_state_dict(body.state_dict())
    assert type(built) is type(opened)
    assert torch.equal(states(built), states(body))
    assert opened.config.width_overrides() == model.config.width_overrides()


@pytest.mark.parametrize("pruned", COVERING, indirect=True)
def test_it_saves_what_both_classes_open(pruned, tmp_path):
    model, folder = pruned
    opened = AutoModel.from_pretrained(folder, dtype="auto").eval()
    opened.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body", dtype="auto").eval()
    assert torch.equal(states(again), states(opened))
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    if model.config.tie_word_embeddings:
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "body", dtype="auto").eval()
        with torch.inference_mode():
            assert torch.equal(whole(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("pruned", ["gemma2"], indirect=True)
def test_another_process_unpickles_it(pruned, tmp_path):
    opened = AutoModel.from_pretrained(pruned[1], dtype="auto").eval()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((opened, IDS, states(opened))))
    script = """
import pickle, sys, torch
model, ids, expected = pickle.load(open(sys.argv[1], "rb"))
with torch.inference_mode():
    assert torch.equal(model(ids).last_hidden_state, expected)
print(type(model).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pkl")], capture_output=True, text=True)
    assert done.stdout.strip() == "ContextPrunedGemma2Model", done.stderr[-1000:]


@pytest.mark.parametrize("pruned", ["llama", "gpt2", "opt"], indirect=True)
def test_a_config_of_other_widths_is_refused(pruned):
    model, folder = pruned
    text = (folder / "config.json").read_text()
    values = model.config.width_overrides()
    width = next(name for name in values[1] if "head" not in name)
    (folder / "config.json").write_text(
        text.replace(f'"{width}": {values[1][width]}', f'"{width}": {values[1][width] - 1}')
    )
    with pytest.raises((ValueError, LoadError), match=r"the config asks for"):
        AutoModel.from_pretrained(folder)
