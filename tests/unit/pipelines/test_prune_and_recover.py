"""One call to the healed model: what it writes, what it refuses, and that a kill in any stage changes no bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from hf_context_prune import EvalOptions, PrunerConfig, PruningPlan, RecoveryConfig, load_pruned, prune_to_folder
from hf_context_prune.config import ThresholdConfig
from hf_context_prune.errors import ConfigError, DataError, PruningWarning
from hf_context_prune.evaluation.reports.report import EvalReport
from hf_context_prune.pipelines import prune as pipeline
from hf_context_prune.pipelines.prune import prune
from hf_context_prune.pipelines.recover import recover_to_folder
from hf_context_prune.pipelines.result import PruneResult
from hf_context_prune.pruning.thresholds.prune import count_zeros
from hf_context_prune.storage.cache import cache_dir
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.training.recovery import training
from hf_context_prune.training.recovery.monitor import RecoveryMonitor
from tests.support.marks import TINY_TEXT
from tests.support.tiny import model_and_text, texts

pytestmark = TINY_TEXT

# Without a reconstruction: it fits so little text so well that training would gain nothing.
CONFIG = PrunerConfig(mlp_ratio=0.5, reconstruction="none", max_seq_length=32, num_calibration_samples=16)
RECOVERY = RecoveryConfig(max_steps=10, num_evals=5, max_seq_length=32, learning_rate=3e-3)
GENERAL = [f"{text} and so on {i}" for i, text in enumerate(texts(20, seed=5))]
QUICK = EvalOptions(max_tokens=300, benchmark=False, memory=False)
TRAINER = training._RecoveryTrainer


class Killed(BaseException):
    """What no `except Exception` sees, as a kill."""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_and_text(tmp_path_factory.mktemp("healed"), "data.jsonl")


def run(place, output, **options):
    given = {"config": CONFIG, "recovery": RECOVERY, "eval_options": QUICK} | options
    return prune_to_folder(place / "base", place / "data.jsonl", output, **given)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def history(folder):
    """What the clock does not decide."""
    (run,) = PruningPlan.load(folder / "pruning_plan.json").provenance["recoveries"]
    return {name: value for name, value in run["history"].items() if "seconds" not in name and "second" not in name}


def kill(work, owner, name, call=1):
    """Work, and let the n-th call of a function be the moment of the kill."""
    real, calls = getattr(owner, name), []

    def stop(*given, **how):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*given, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(Killed):
            work()


def resume(work):
    """Work again, where nothing may be pruned; returns the steps that were taken."""
    loss, steps = TRAINER.compute_loss, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prune_model", lambda *_, **__: pytest.fail("pruned again"))
        patch.setattr(TRAINER, "compute_loss", lambda *given, **how: steps.append(1) or loss(*given, **how))
        work()
    return len(steps)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The folder of a run that nothing broke."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(place, folder)
    return folder


def test_one_folder_with_one_card_shows_all_three(place, tmp_path):
    result = run(place, tmp_path / "out", eval_options=replace(QUICK, general_data=GENERAL, benchmark=True))
    verify_folder(tmp_path / "out")
    report = EvalReport.load(tmp_path / "out" / "eval_report.json")
    assert report == result.report
    for loss in (report.loss, report.general.loss):
        assert loss.base.num_documents == loss.pruned.num_documents == loss.recovered.num_documents
    assert report.loss.recovered.bits_per_byte.value < report.loss.pruned.bits_per_byte.value
    assert "held out before calibration and recovery, by document" in report.dataset.held_out
    assert any(note.startswith("Recovered (full) on") for note in report.notes)
    assert report.speed is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| text | documents | base | pruned | recovered | change |" in card
    assert "it was then trained on text of the domain" in card
    assert "before the training)" in result.summary()
    assert "| measure | base | pruned | recovered | change |" in card
    (entry,) = result.plan.provenance["recoveries"]
    assert entry["config"] == RECOVERY.to_dict()
    assert entry["history"]["steps"] == RECOVERY.max_steps
    loaded = load_pruned(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in result.model.state_dict().items())
    assert not list((cache_dir() / "unfinished").iterdir())


def test_other_sources_of_the_same_text_are_balanced_anew(place, tmp_path):
    """A resumed run once took the model that had been pruned for the sources of before."""
    data, held = tmp_path / "data.jsonl", tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"text": f"{text} held {i}"}) + "\n" for i, text in enumerate(texts(seed=9))))

    def name_sources(names):
        records = [{"text": text, "source": names[i % len(names)]} for i, text in enumerate(texts())]
        data.write_text("".join(json.dumps(record) + "\n" for record in records))

    config = replace(CONFIG, balance_sources=True)
    options = {"config": config, "recovery": RECOVERY, "eval_options": QUICK, "eval_data": held}
    work = partial(prune_to_folder, place / "base", data, tmp_path / "out", **options)
    name_sources("abc")
    kill(work, TRAINER, "compute_loss", 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prune_model", lambda *_, **__: pytest.fail("pruned again"))
        kill(work, TRAINER, "compute_loss", 2)  # of the same sources it goes on
        name_sources("ab")
        with pytest.raises(pytest.fail.Exception, match="pruned again"):
            work()


def test_test_text_of_its_own_is_recorded_of_both_steps(place, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"text": f"{text} held {i}"}) + "\n" for i, text in enumerate(texts(seed=9))))
    run(place, tmp_path / "out", eval_data=held)
    facts = PruningPlan.load(tmp_path / "out/pruning_plan.json").provenance
    assert facts["test_data"] == facts["recoveries"][0]["test_data"] == "held.jsonl"
    assert (tmp_path / "out/README.md").read_text().count("--eval-data held.jsonl") == 2


def test_it_is_what_the_two_commands_give(place, whole, tmp_path):
    prune_to_folder(place / "base", place / "data.jsonl", tmp_path / "pruned", CONFIG, eval_options=QUICK)
    options = {"base": place / "base", "eval_options": QUICK}
    work = partial(recover_to_folder, tmp_path / "pruned", place / "data.jsonl", tmp_path / "out", RECOVERY, **options)
    kill(work, TRAINER, "compute_loss", 6)
    assert resume(work) == 6
    assert weights(tmp_path / "out") == weights(whole)
    assert history(tmp_path / "out") == history(whole)
    two, one = (EvalReport.load(folder / "eval_report.json") for folder in (tmp_path / "out", whole))
    assert two.loss == one.loss
    assert two.size == one.size


def check_kill(place, whole, output, owner, name, call, steps):
    """Kill a run and resume it: nothing is pruned again, the steps that are left are taken, and no bit differs."""
    work = partial(run, place, output)
    kill(work, owner, name, call)
    assert not output.exists()
    assert resume(work) == steps
    assert weights(output) == weights(whole)
    assert history(output) == history(whole)
    assert (output / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert EvalReport.load(output / "eval_report.json").loss == EvalReport.load(whole / "eval_report.json").loss
    assert not list((cache_dir() / "unfinished").iterdir())


def test_a_kill_behind_the_pruning_changes_no_bit(place, whole, tmp_path):
    check_kill(place, whole, tmp_path / "out", pipeline, "train_back", 1, RECOVERY.max_steps)


def test_a_kill_in_the_middle_of_the_training_changes_no_bit(place, whole, tmp_path):
    """The validation text is measured at every second step, so after the fourth one."""
    check_kill(place, whole, tmp_path / "out", TRAINER, "compute_loss", 6, 6)


@pytest.mark.slow
def test_a_kill_in_other_stages_changes_no_bit(place, whole, tmp_path, subtests):
    for name, moment in {
        "before a state was kept": (TRAINER, "compute_loss", 2, RECOVERY.max_steps),
        "at a measurement": (RecoveryMonitor, "measure_validation", 4, 6),
        "behind the training": (PruneResult, "save_pretrained", 1, 0),
    }.items():
        with subtests.test(name):
            check_kill(place, whole, tmp_path / name.replace(" ", "-"), *moment)


def test_a_damaged_stage_is_done_again(place, whole, tmp_path, caplog):
    kill(partial(run, place, tmp_path / "out"), TRAINER, "compute_loss", 6)
    (folder,) = (cache_dir() / "unfinished").iterdir()
    (kept,) = folder.glob("pruned-*")
    (kept / "manifest.json").unlink()  # as a kill leaves it that met the removal of the folder
    state = folder / "recovery.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    run(place, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(whole)
    assert {"is damaged" in message for message in caplog.messages} == {True}
    assert len(caplog.messages) == 2


def test_another_time_for_the_recovery_prunes_nothing_again(place, tmp_path):
    work = partial(run, place, tmp_path / "out")
    kill(work, TRAINER, "compute_loss", 6)
    assert resume(partial(work, recovery=replace(RECOVERY, max_steps=3))) == 3


def test_without_room_nothing_is_kept_and_it_says_so(place, whole, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=10**7)
    monkeypatch.setattr("hf_context_prune.storage.resume.shutil.disk_usage", lambda path: full)
    monkeypatch.setattr("hf_context_prune.storage.staging.check_space", lambda *_: None)
    monkeypatch.setattr("hf_context_prune.pipelines.needs.Needs.check_disk", lambda *_: None)
    with pytest.warns(PruningWarning) as told:
        run(place, tmp_path / "out")
    said = [str(one.message) for one in told if "can't be kept" in str(one.message)]
    assert [one.partition(" can't")[0] for one in said] == ["The pruned model", "The state of the training"]
    assert all("10000000 bytes (10.0 MB) are free" in one and "HF_CONTEXT_PRUNE_CACHE" in one for one in said)
    assert weights(tmp_path / "out") == weights(whole)


def test_ctrl_c_keeps_the_best_weights_so_far(place, tmp_path, monkeypatch):
    loss, calls = TRAINER.compute_loss, []

    def interrupted(*given, **how):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return loss(*given, **how)

    monkeypatch.setattr(TRAINER, "compute_loss", interrupted)
    with pytest.warns(PruningWarning, match="the best so far"):
        result = run(place, tmp_path / "out")
    assert history(tmp_path / "out")["ended"] == "it was interrupted"
    assert result.report.loss.recovered.bits_per_byte.value < result.report.loss.pruned.bits_per_byte.value


def test_what_is_refused_before_anything_is_pruned(place, whole, tmp_path, monkeypatch, subtests):
    shutil.copytree(whole, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr(pipeline, "prune_model", lambda *_, **__: pytest.fail("pruned"))
    rows = (place / "data.jsonl").read_text().splitlines()
    for name, records in (("one", rows[:1]), ("two", rows[:2])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(records))
    for options, error, said in (
        ({"recovery": {"max_steps": 3}}, ConfigError, "recovery is a dict; pass RecoveryConfig"),
        (
            {"recovery": replace(RECOVERY, max_minutes=1e-6)},
            ConfigError,
            r"1e-06 minutes.*Give at least 0\.0\d* minutes",
        ),
        (
            {"recovery": RecoveryConfig(max_steps=3)},
            ConfigError,
            "max_seq_length is 512, but the model has 128 positions",
        ),
        ({"config": PrunerConfig(general_data_ratio=0.5)}, ConfigError, r"general_data_ratio is 0\.5"),
        ({"data": tmp_path / "two.jsonl"}, DataError, "at least 2"),
        ({"data": tmp_path / "one.jsonl", "eval_data": texts(5, seed=3)}, DataError, "at least 2"),
    ):
        given = {"config": CONFIG, "recovery": RECOVERY, "eval_options": QUICK, "data": place / "data.jsonl"}
        with subtests.test(said), pytest.raises(error, match=said):
            prune_to_folder(place / "base", output=tmp_path / "out", **given | options)
    monkeypatch.setattr("hf_context_prune.training.recovery.recover.num_processes", lambda: 2)
    with pytest.raises(ConfigError, match="in one process"):
        run(place, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_zeros_of_thresholds_stay(model, tokenizer):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:10] *= 1e-4  # neurons that go
            layer.input_layernorm.weight[:8] *= 1e-4  # inputs that become zeros
    config = ThresholdConfig(linear_threshold=0.01, activation_threshold=0.01, max_seq_length=32)
    given = {"tokenizer": tokenizer, "eval_options": QUICK}
    pruned, recovered = (prune(model, texts(), config, **given, recovery=one) for one in (None, RECOVERY))
    assert recovered.plan.provenance["zeroed"]["zeroed_not_removed"] > 0
    assert recovered.plan.provenance["recoveries"][0]["history"]["best_step"] > 0
    before, after = pruned.model.state_dict(), recovered.model.state_dict()
    assert count_zeros(recovered.model) == count_zeros(pruned.model)
    assert all(torch.equal(after[name] == 0, tensor == 0) for name, tensor in before.items())
    assert any("zero" in note for note in recovered.report.notes)


def test_general_text_that_was_calibrated_on_is_trained_on(place, tmp_path):
    config, options = replace(CONFIG, general_data_ratio=0.25), replace(QUICK, general_data=GENERAL)
    result = run(place, tmp_path / "one", config=config, eval_options=options)
    said = [note for note in result.report.notes if note.startswith("Recovered")]
    assert "of data.jsonl, a share of 0.25 of in-memory, in 10 steps" in said[0]
    assert result.report.general.loss.recovered is not None
    data = place / "data.jsonl"
    prune_to_folder(place / "base", data, tmp_path / "pruned", config, eval_options=options)
    how = {"base": place / "base", "eval_options": options}
    recover_to_folder(tmp_path / "pruned", data, tmp_path / "two", RECOVERY, **how)
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    plan = PruningPlan.load(tmp_path / "one" / "pruning_plan.json")
    assert plan.provenance["general_data"]["name"] == "in-memory"
