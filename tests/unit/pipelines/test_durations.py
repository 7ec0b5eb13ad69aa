"""The time that a run is told to take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_context_prune import EvalOptions, PrunerConfig, RecoveryConfig, ThresholdConfig
from hf_context_prune.evaluation.options import MAX_TEST_TOKENS
from hf_context_prune.pipelines import durations
from hf_context_prune.pipelines.dry_run import dry_run
from hf_context_prune.pipelines.durations import describe_seconds, estimate_seconds
from tests.support.tiny import model_and_text, tiny_model

LAYERS = "layers"


def test_each_long_step_has_its_time(monkeypatch):
    model = tiny_model("llama")
    clock = iter(range(10_000))
    monkeypatch.setattr(durations.time, "perf_counter", lambda: float(next(clock)))  # each product takes a second
    short = estimate_seconds(model, PrunerConfig(mlp_ratio=0.5, num_calibration_samples=8, max_seq_length=32))
    long = estimate_seconds(model, PrunerConfig(mlp_ratio=0.5, num_calibration_samples=64, max_seq_length=32))
    assert list(short) == list(long) == [LAYERS, "refit of the LM head", "measuring"]
    assert long[LAYERS] > short[LAYERS] > 0
    searched = estimate_seconds(model, PrunerConfig(pruning_ratio=0.2, num_calibration_samples=8, max_seq_length=32))
    assert list(searched) == ["search", LAYERS, "refit of the LM head", "measuring"]
    tokens = PrunerConfig(vocab_size=64, refit_lm_head=False)
    assert list(estimate_seconds(model, tokens)) == ["measuring"]
    assert list(estimate_seconds(model, ThresholdConfig(linear_threshold=0.1))) == ["calibration", "measuring"]


def test_experts_have_their_time(monkeypatch):
    model, found = tiny_model("mixtral"), {}
    clock = iter(range(100_000))
    monkeypatch.setattr(durations.time, "perf_counter", lambda: float(next(clock)))
    for name in ("none", "sequential"):
        config = PrunerConfig(num_experts=4, reconstruction=name, num_calibration_samples=8, max_seq_length=32)
        found[name] = estimate_seconds(model, config)
    assert list(found["none"]) == ["choice of experts", "measuring"]
    assert list(found["sequential"]) == ["choice of experts", "experts", "refit of the LM head", "measuring"]
    assert found["sequential"]["experts"] > found["sequential"]["choice of experts"] > 0


def test_measuring_and_training_are_counted(monkeypatch):
    model, config = tiny_model("llama"), PrunerConfig(vocab_size=64, refit_lm_head=False)
    clock = iter(range(100_000))
    monkeypatch.setattr(durations.time, "perf_counter", lambda: float(next(clock)))
    losses = EvalOptions(benchmark=False)
    one = estimate_seconds(model, config, losses)["measuring"]
    assert one > 0
    twice = replace(losses, max_tokens=2 * MAX_TEST_TOKENS)
    assert estimate_seconds(model, config, twice)["measuring"] == pytest.approx(2 * one)
    assert estimate_seconds(model, config, replace(losses, general_data="some.txt"))["measuring"] == pytest.approx(
        2 * one
    )
    assert estimate_seconds(model, config, EvalOptions())["measuring"] > one  # speed and memory
    trained = estimate_seconds(model, config, losses, RecoveryConfig(max_minutes=3))
    assert trained == {"training": 180, "measuring": pytest.approx(1.5 * one)}
    assert list(estimate_seconds(model, config, losses, RecoveryConfig())) == ["measuring"]


def test_more_layers_take_longer(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(durations.time, "perf_counter", lambda: float(next(clock)))
    config = PrunerConfig(mlp_ratio=0.5, num_calibration_samples=8, max_seq_length=32)
    two, four = (estimate_seconds(tiny_model("llama", num_hidden_layers=count), config)[LAYERS] for count in (2, 4))
    assert four == pytest.approx(2 * two)


def test_a_folder_that_is_not_loaded_has_one_too(tmp_path):
    model_and_text(tmp_path, "data.jsonl")
    found = dry_run(tmp_path / "base", PrunerConfig(mlp_ratio=0.5))
    assert set(found.seconds) == {LAYERS, "refit of the LM head", "measuring"}
    assert min(found.seconds.values()) > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1, "1 s"), (59, "59 s"), (100, "2 min"), (5_000, "83 min"), (9_000, "2.5 h"), (100_000, "28 h")],
)
def test_a_time_has_two_digits_at_most(seconds, text):
    assert describe_seconds({LAYERS: seconds}) == (
        f"Takes about {text} on this machine when it is idle (layers {text})."
    )
