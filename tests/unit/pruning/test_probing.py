"""Adaptive widths before sequential pruning: how much text, how much memory, and what a killed run keeps."""

from __future__ import annotations

import json
import re

import pytest
import torch

from hf_context_prune import PrunerConfig
from hf_context_prune.errors import ConfigError, SaveError
from hf_context_prune.pruning.allocation import probing as width_search
from hf_context_prune.pruning.allocation.sensitivity import measure_sensitivity, withhold_probe
from hf_context_prune.pruning.calibration.calibrate import calibrate
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.measurements import reconstruct_one_shot
from hf_context_prune.pruning.planner import Planner, plan_and_reconstruct
from hf_context_prune.pruning.scoring import Requirements, score_with
from tests.support.tiny import tiny_model, tokens


def curves_of(model, config=None, samples=None, **how):
    samples = tokens(12, 16) if samples is None else samples
    return Planner(model, samples, config or PrunerConfig(), **how).measured.curves


@pytest.fixture
def calibrations(monkeypatch):
    """Number of samples of every pass of calibration."""
    seen = []
    real = width_search.capture_streams

    def recording(view, batches, storage, **how):
        seen.append(sum(len(batch["input_ids"]) for _, batch in batches))
        return real(view, batches, storage, **how)

    monkeypatch.setattr(width_search, "capture_streams", recording)
    return seen


def test_statistics_take_less_text_than_the_walk(model, monkeypatch, calibrations):
    monkeypatch.setattr(width_search, "SEARCH_TOKENS", 50)
    monkeypatch.setattr(width_search, "TOKENS_PER_FEATURE", 1)
    config = PrunerConfig(pruning_ratio=0.1)
    plan, _ = plan_and_reconstruct(model, tokens(12, 16), config)
    assert calibrations == [3]
    assert plan.provenance["num_calibration_samples"] == 12
    monkeypatch.setattr(width_search, "TOKENS_PER_FEATURE", 2)  # 40 neurons
    curves_of(model)
    assert calibrations[1:] == [5]


@pytest.mark.parametrize("criterion", ["obs", "random"])
def test_the_statistics_of_one_layer_are_those_of_a_pass_over_all(model, criterion):
    config, samples = PrunerConfig(pruning_ratio=0.1, criterion=criterion), tokens(12, 16)
    needs = Requirements.of(config)
    fit, probe = withhold_probe(samples, width_search.SEARCH_TOKENS)
    stats = calibrate(model, batches_of(fit), targets=needs.targets, statistics=needs.statistics)
    generator = torch.Generator().manual_seed(config.pruning_seed)
    importance = score_with(model, stats, config.criterion, generator)
    reconstruct = reconstruct_one_shot(stats, config)
    expected = measure_sensitivity(model, importance, reconstruct, probe, targets=needs.targets)
    assert curves_of(model, config, samples) == expected


def test_a_search_that_was_finished_is_not_made_again(model, tmp_path, calibrations):
    first = curves_of(model, resume_dir=tmp_path)
    assert curves_of(model, resume_dir=tmp_path) == first
    assert len(calibrations) == 1
    assert not list(tmp_path.glob("*.partial"))
    (kept,) = tmp_path.iterdir()
    assert re.fullmatch(r"widths-[0-9a-f]{16}\.json", kept.name)
    for other in (
        {"config": PrunerConfig(ridge=0.5)},
        {"config": PrunerConfig(criterion="wanda")},
        {"samples": tokens(12, 16, seed=2)},
    ):
        curves_of(model, resume_dir=tmp_path, **other)
    curves_of(tiny_model("llama", seed=3), resume_dir=tmp_path)
    assert len(calibrations) == 5


def test_kept_curves_that_are_damaged_are_measured_again(model, tmp_path, calibrations, subtests):
    first = curves_of(model, resume_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    for number, damage in enumerate(("", "{", "[]", json.dumps({"curves": []}))):
        with subtests.test(damage):
            kept.write_text(damage)
            assert curves_of(model, resume_dir=tmp_path) == first
            assert len(calibrations) == number + 2


def test_curves_that_can_not_be_kept(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match=r"can't be kept in .*widths-.*\.json"):
        curves_of(model, resume_dir=tmp_path / "file")


def test_too_little_text(model):
    with pytest.raises(ConfigError, match=r"there is 1 \w+ of 16 tokens"):
        curves_of(model, samples=tokens(1, 16))
