"""Runs that end in a folder: checked first, saved whole, reported as they were saved."""

import pytest

from hf_context_prune import EvalOptions, EvalReport, PrunerConfig, load_pruned
from hf_context_prune.errors import ConfigError, SaveError
from hf_context_prune.pipelines import prune as module
from hf_context_prune.pipelines.prune import prune_to_folder
from hf_context_prune.pipelines.recover import recover_to_folder
from hf_context_prune.training.recovery.config import RecoveryConfig
from tests.support.tiny import model_and_text

CONFIG = PrunerConfig(mlp_ratio=0.25, max_seq_length=32, num_calibration_samples=8)
QUICK = EvalOptions(max_tokens=300, benchmark=False, memory=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_and_text(tmp_path_factory.mktemp("to-folder"), "data.jsonl")


def test_the_folder_holds_what_is_returned(place, tmp_path):
    result = prune_to_folder(place / "base", place / "data.jsonl", tmp_path / "out", CONFIG, eval_options=QUICK)
    assert result.report == EvalReport.load(tmp_path / "out" / "eval_report.json")
    assert result.report.size.pruned_weight_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    loaded = load_pruned(tmp_path / "out").state_dict()
    assert all(bool((loaded[name] == tensor).all()) for name, tensor in result.model.state_dict().items())
    lines = result.summary().splitlines()
    assert "% smaller" in lines[0]
    assert ["measure", "base", "pruned", "change"] in [line.split() for line in lines]
    assert [line for line in lines if line.startswith("bits per byte")]
    assert str(f"{result.report.size.pruned_parameters:,}") in result.summary()


def test_a_target_that_is_taken_is_refused_before_a_model_is_loaded(place, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SaveError, match="not made by this package"):
        prune_to_folder(place / "base", place / "data.jsonl", tmp_path, CONFIG)
    with pytest.raises(ConfigError, match=r"general_data_ratio is 0\.5"):
        prune_to_folder(place / "base", place / "data.jsonl", tmp_path / "new", PrunerConfig(general_data_ratio=0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_recovery_never_writes_into_its_own_folder(place, tmp_path):
    folder = tmp_path / "out"
    prune_to_folder(place / "base", place / "data.jsonl", folder, CONFIG, eval_options=QUICK)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for target, error, said in (
        (folder, ConfigError, "would be lost"),
        (folder / "inside", SaveError, "a folder that this package saved"),
    ):
        with pytest.raises(error, match=said):
            recover_to_folder(folder, place / "data.jsonl", target, RecoveryConfig(max_steps=1))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
