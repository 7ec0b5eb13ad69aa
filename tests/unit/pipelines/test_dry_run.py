"""Sizes from shapes alone; `tests/unit/pipelines/test_prune.py` compares them with a real run."""

from __future__ import annotations

import json

import pytest
import torch

from hf_context_prune import PrunerConfig
from hf_context_prune.errors import BudgetError, ConfigError
from hf_context_prune.pipelines.dry_run import dry_run
from hf_context_prune.pruning.allocation.widths import plan_widths
from hf_context_prune.storage.saving import SIDE_FILES_BYTES
from tests.support.tiny import case


def test_the_outline_is_that_of_the_loaded_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = PrunerConfig(pruning_ratio=0.1, allocation="uniform")
    outline = dry_run(tmp_path, config)
    assert outline.widths == plan_widths(model, config)
    assert outline.base_parameters == model.num_parameters()
    assert outline.asked_ratio == 0.1
    assert outline.pruned_parameters <= 0.9 * outline.base_parameters
    assert json.loads(json.dumps(outline.to_dict()))["widths"][0]["kv_groups"] == 3


def test_adaptive_widths_are_measured_and_their_size_is_known(model, tmp_path):
    model.save_pretrained(tmp_path)
    outline = dry_run(tmp_path, PrunerConfig(pruning_ratio=0.1))
    assert outline.widths is None
    assert not outline.native_fit.fits
    assert outline.pruned_parameters == outline.base_parameters - -(-outline.base_parameters // 10)
    assert json.loads(json.dumps(outline.to_dict()))["widths"] is None
    with pytest.raises(BudgetError, match=r"together can give .* \(0\.\d{4} of all\)"):
        dry_run(tmp_path, PrunerConfig(pruning_ratio=0.9))
    with pytest.raises(BudgetError, match=r"adaptive widths can remove at most .* \(0\.\d{4} of all\)"):
        dry_run(tmp_path, PrunerConfig(pruning_ratio=0.9, units="neurons,kv_groups"))
    with pytest.raises(BudgetError, match="adaptive widths can remove at most"):
        dry_run(tmp_path, PrunerConfig(mlp_ratio=0.8, allocation="adaptive"))


def test_the_needs_are_those_of_the_data_type(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    own, wide, narrow = (
        dry_run(tmp_path, PrunerConfig(pruning_ratio=0.1), dtype=dtype).needs
        for dtype in ("auto", "float32", "bfloat16")
    )
    assert own == narrow
    assert own.output_disk - SIDE_FILES_BYTES == (wide.output_disk - SIDE_FILES_BYTES) // 2


def test_a_repair_that_a_run_would_refuse_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "llama")
    case("opt-post-norm").save_pretrained(tmp_path / "opt")
    with pytest.raises(ConfigError, match="llama"):
        dry_run(tmp_path / "llama", PrunerConfig(pruning_ratio=0.1, reconstruction="bias"))
    with pytest.raises(ConfigError, match="do_layer_norm_before=False"):
        dry_run(tmp_path / "opt", PrunerConfig(pruning_ratio=0.1))


def test_tokens_that_reach_the_budget_alone_leave_the_widths(model, tmp_path):
    model.save_pretrained(tmp_path)
    outline = dry_run(tmp_path, PrunerConfig(pruning_ratio=0.05, vocab_size=64))
    assert outline.tokens == 64
    assert outline.widths == outline.dense
    assert outline.native_fit.fits


def test_a_size_that_has_to_be_measured_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="--max-loss-increase"):
        dry_run(tmp_path, PrunerConfig(max_loss_increase=0.03))


def test_experts_that_the_budget_takes_are_told(tmp_path):
    case("mixtral").save_pretrained(tmp_path)
    outline = dry_run(tmp_path, PrunerConfig(pruning_ratio=0.2))
    kept, count = outline.experts
    assert count == 8
    assert 2 <= kept < 8
    assert outline.pruned_parameters <= 0.8 * outline.base_parameters
    assert {"choice of experts", "experts"} <= outline.seconds.keys()
    assert dry_run(tmp_path, PrunerConfig(pruning_ratio=0.02, units="tokens,kv_groups")).experts is None
    assert dry_run(tmp_path, PrunerConfig(num_experts=5)).experts == (5, 8)
    inside = dry_run(tmp_path, PrunerConfig(expert_neurons_ratio=0.4))
    assert inside.inside_experts == ((24, 40), (0, 0))
    assert inside.pruned_parameters < inside.base_parameters
