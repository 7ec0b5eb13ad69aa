"""Adaptive widths before sequential pruning: how much text, how much memory, and what a killed run keeps."""

from __future__ import annotations

import json
import re

import pytest

from hf_context_prune import PrunerConfig
from hf_context_prune.errors import ConfigError, SaveError
from hf_context_prune.pruning.allocation import probing as width_search
from hf_context_prune.pruning.calibration import chunked
from hf_context_prune.pruning.planner import Planner, plan_and_reconstruct
from tests.support.tiny import tiny_model, tokens


def curves_of(model, config=None, samples=None, **how):
    samples = tokens(12, 16) if samples is None else samples
    return Planner(model, samples, config or PrunerConfig(), **how).measured.curves


@pytest.fixture
def calibrations(monkeypatch):
    """(layers, number of samples) of every pass of calibration."""
    seen = []
    real = width_search.calibrate

    def recording(model, batches, *, layers, **how):
        batches = list(batches)
        seen.append((list(layers), sum(len(batch["input_ids"]) for batch in batches)))
        return real(model, batches, layers=layers, **how)

    monkeypatch.setattr(width_search, "calibrate", recording)
    return seen


def test_statistics_take_less_text_than_the_walk(model, monkeypatch, calibrations):
    monkeypatch.setattr(width_search, "SEARCH_TOKENS", 50)
    monkeypatch.setattr(width_search, "TOKENS_PER_FEATURE", 1)
    config = PrunerConfig(pruning_ratio=0.1)
    plan, _ = plan_and_reconstruct(model, tokens(12, 16), config)
    assert calibrations == [([0, 1, 2], 3)]
    assert plan.provenance["num_calibration_samples"] == 12
    monkeypatch.setattr(width_search, "TOKENS_PER_FEATURE", 2)  # 40 neurons
    curves_of(model)
    assert calibrations[1:] == [([0, 1, 2], 5)]


@pytest.mark.parametrize("criterion", ["obs", "random"])
def test_a_small_memory_costs_passes_and_changes_nothing(model, monkeypatch, calibrations, criterion):
    config = PrunerConfig(pruning_ratio=0.1, criterion=criterion)
    together = curves_of(model, config)
    monkeypatch.setattr(chunked, "free_memory", lambda device: 4 * 2 * 4 * (40**2 + 48**2))  # two layers
    assert curves_of(model, config) == together
    monkeypatch.setattr(chunked, "free_memory", lambda device: 0)
    assert curves_of(model, config) == together
    assert [layers for layers, _ in calibrations] == [[0, 1, 2], [0, 1], [2], [0], [1], [2]]


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
