"""From text to a folder with fewer layers, and on."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_context_prune import EvalOptions, PrunerConfig, PruningPlan, RecoveryConfig, prune, prune_to_folder
from hf_context_prune.errors import BudgetError
from hf_context_prune.pipelines.dry_run import dry_run
from hf_context_prune.pipelines.recover import recover_to_folder
from hf_context_prune.pruning.allocation import layer_choice
from tests.support.marks import TINY_TEXT
from tests.support.tiny import texts, tiny_model, tiny_tokenizer

pytestmark = TINY_TEXT
OPTIONS = EvalOptions(max_tokens=300, benchmark=False, memory=False)
CONFIG = PrunerConfig(num_layers=4, num_calibration_samples=16, max_seq_length=32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers") / "base"
    tiny_model("llama", num_hidden_layers=6).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_with_fewer_layers(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache"))
    result = prune_to_folder(base, texts(60), tmp_path / "out", CONFIG, eval_options=OPTIONS)
    plan = PruningPlan.load(tmp_path / "out" / "pruning_plan.json")
    assert plan.removed_layers == (2, 3)
    sentence = "2 of 6 layers were removed as a whole: 2, 3 (numbered from 0)."
    card = (tmp_path / "out" / "README.md").read_text()
    shown = (result.summary(), result._repr_html_(), card, "\n".join(result.report.notes))
    assert all(sentence in text and "GSM8K" in text for text in shown)
    assert "--num-layers 4" in card
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is LlamaForCausalLM
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
    recovery = RecoveryConfig(max_steps=1, max_seq_length=32)
    healed = recover_to_folder(tmp_path / "out", texts(60), tmp_path / "healed", recovery, eval_options=OPTIONS)
    assert healed.report.size.base_parameters == result.report.size.base_parameters
    assert dry_run(base, CONFIG).pruned_parameters == result.model.num_parameters()
    assert "More was removed" not in "\n".join((*result.report.notes, *healed.report.notes))


def test_a_run_killed_between_two_layers_goes_on_to_the_same_bits(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache"))
    whole = prune(base, texts(60), CONFIG, eval_options=OPTIONS)
    own, calls = layer_choice.LayerComparison.losses, []

    def losses(self, gone, candidates):
        calls.append(gone)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(self, gone, candidates)

    monkeypatch.setattr(layer_choice.LayerComparison, "losses", losses)
    with pytest.raises(KeyboardInterrupt):
        prune_to_folder(base, texts(60), tmp_path / "out", CONFIG, eval_options=OPTIONS)
    assert not (tmp_path / "out").exists()
    resumed = prune_to_folder(base, texts(60), tmp_path / "out", CONFIG, eval_options=OPTIONS)
    assert len(calls) == 3  # the first choice was kept
    assert resumed.plan.layers == whole.plan.layers
    same = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(bool((a == b).all()) for a, b in same)


def test_a_budget_that_decides_how_many_layers_go(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache"))
    sizes = {"num_calibration_samples": 16, "max_seq_length": 32, "reconstruction": "none"}
    config = PrunerConfig(pruning_ratio=0.2, units="layers", **sizes)
    result = prune_to_folder(base, texts(60), tmp_path / "out", config, eval_options=OPTIONS)
    assert result.plan.removed_layers == (2, 3)
    assert "--units layers" in (tmp_path / "out" / "README.md").read_text()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is LlamaForCausalLM
    assert result.report.size.achieved_ratio > 0.21  # a layer goes as a whole
    assert "More was removed than the asked 20.0%: " in "\n".join(result.report.notes)
    outline = dry_run(base, config)
    assert (outline.removed_layers, outline.widths) == (None, None)
    assert outline.native_fit.reason == "layers are measured"
    assert outline.seconds["choice of layers, at most"] > 0
    mixed = dry_run(base, PrunerConfig(pruning_ratio=0.2, units="tokens,neurons,layers"))
    assert mixed.native_fit.reason == "tokens, layers and widths are measured"
    assert mixed.seconds["choice of layers, at most"] > outline.seconds["choice of layers, at most"]  # repaired
    with pytest.raises(BudgetError, match="can go with the 2 layers that may be removed"):
        dry_run(base, PrunerConfig(pruning_ratio=0.5, units="layers"))
