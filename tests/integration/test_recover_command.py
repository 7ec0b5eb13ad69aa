"""``hf-context-prune recover``: a pruned folder becomes a recovered one, with figures for both and their base."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hf_context_prune import EvalOptions, PruningPlan, load_model, load_pruned
from hf_context_prune.errors import LoadError
from hf_context_prune.evaluation.reports.report import EvalReport
from hf_context_prune.pipelines import recover as folder
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.training.recovery.config import RecoveryConfig
from tests.support.marks import TINY_TEXT
from tests.support.tiny import model_and_text

pytestmark = TINY_TEXT

QUICK = ("--no-benchmark", "--max-eval-tokens", 400)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_and_text(tmp_path_factory.mktemp("recover"), "data.jsonl")


@pytest.fixture
def pruned(run, place):
    if not (place / "pruned").exists():
        # Without a reconstruction: it fits so little text so well that training would gain nothing.
        options = ("--max-seq-length", 32, "--num-calibration-samples", 16, "--mlp-ratio", 0.5)
        options += ("--vocab-size", 288, "--pad-to-multiple-of", 32, "--reconstruction", "none")
        code, _, err = run("prune", "@base", "--data", "@data.jsonl", "--output", "@pruned", *options, *QUICK)
        assert code == 0, err
    return place / "pruned"


RECOVER = ("recover", "@pruned", "--data", "@data.jsonl", "--max-seq-length", 32, "--learning-rate", 0.003, *QUICK)


def test_the_folder_and_its_figures(run, place, pruned):
    code, out, err = run(*RECOVER, "--output", "@out", "--base", "@base", "--num-epochs", 2)
    assert code == 0, err
    assert ["measure", "base", "pruned", "recovered", "change"] in [line.split() for line in out.splitlines()]
    assert "before the training)" in out
    assert "Recovered (full) on" in out
    verify_folder(place / "out")
    report, before = EvalReport.load(place / "out/eval_report.json"), EvalReport.load(pruned / "eval_report.json")
    assert report.dataset.fingerprint == before.dataset.fingerprint  # the very documents that pruning held out
    assert "held out before recovery, by document. The pruning had left them out as well." in report.dataset.held_out
    assert report.size.base_parameters == before.size.base_parameters
    assert report.loss.base == before.loss.base
    assert report.loss.pruned == before.loss.pruned
    assert report.loss.recovered.bits_per_byte.value < report.loss.pruned.bits_per_byte.value
    plan, old = PruningPlan.load(place / "out/pruning_plan.json"), PruningPlan.load(pruned / "pruning_plan.json")
    assert plan.sha256 == old.sha256
    (first,) = plan.provenance["recoveries"]
    assert 0 < first["history"]["tokens"] <= first["history"]["steps"] * 4 * 32
    assert first["config"]["num_epochs"] == 2
    assert load_pruned(place / "out").num_parameters() == load_pruned(pruned).num_parameters()
    code, out, _ = run("inspect", "@out")
    assert code == 0
    assert "recovered" in out


def test_a_base_that_is_not_the_model_that_was_pruned(run, place, pruned):
    code, out, err = run(*RECOVER, "--output", "@other", "--base", "@pruned", "--max-steps", 2, "--format", "json")
    assert code == 0, err
    report = json.loads(out)["report"]
    assert report["speed"] is None
    assert report["loss"]["base"] == EvalReport.load(pruned / "eval_report.json").to_dict()["loss"]["base"]
    assert any("pruned (--base) is not the model that was pruned" in note for note in report["notes"])


def test_text_that_the_pruning_may_have_read(run, place, pruned):
    lines = (place / "data.jsonl").read_text().splitlines()
    (place / "other.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    options = ("--output", "@else", "--base", "@base", "--max-steps", 2)
    code, _, err = run(*RECOVER[:3], "@other.jsonl", *RECOVER[4:], *options)
    assert code == 0, err
    held_out = EvalReport.load(place / "else/eval_report.json").dataset.held_out
    assert "The pruning had other text, which may have held some of them." in held_out


def test_a_folder_of_the_trainer_is_told_how_to_be_saved(run, place, pruned):
    (place / "trained").mkdir(exist_ok=True)
    (place / "trained/training_args.bin").write_bytes(b"")
    code, _, err = run("recover", "@trained", *RECOVER[2:], "--output", "@no")
    assert code == 1
    assert "callback.save_pretrained(folder)" in " ".join(err.split())


def test_prune_recover_recover_card_without_the_base(run, place, pruned):
    """The base's column once held the losses of the pruned model: every folder and card said it had beaten its base."""
    before = EvalReport.load(pruned / "eval_report.json")
    for source, target in (("@pruned", "@alone"), ("@alone", "@again")):
        words = ("recover", source, *RECOVER[2:], "--output", target, "--max-steps", 4)
        code, _, err = run(*words)
        assert code == 0, err
        report = EvalReport.load(place / target[1:] / "eval_report.json")
        assert report.dataset.fingerprint == before.dataset.fingerprint
        assert report.loss.base == before.loss.base
        assert report.loss.pruned.bits_per_byte.value == pytest.approx(before.loss.pruned.bits_per_byte.value, rel=1e-3)
        truth = report.loss.recovered.bits_per_byte.value / before.loss.base.bits_per_byte.value
        assert report.loss.recovered_comparison.bits_per_byte_ratio.value == pytest.approx(truth)
        assert report.loss.recovered_comparison.bits_per_byte_ratio.interval is None
        assert any("its losses are those that the folder's report states" in note for note in report.notes)
        code, _, err = run("card", target)
        assert code == 0, err
        card = (place / target[1:] / "README.md").read_text()
        figures = [before.loss.base, report.loss.pruned, report.loss.recovered]
        cells = [f"{loss.bits_per_byte.value:.4f}" for loss in figures]
        (row,) = [line for line in card.splitlines() if line.startswith("| domain: data.jsonl")]
        assert [cell.split()[0] for cell in row.strip("| ").split(" | ")[2:5]] == cells
        assert row.rstrip("| ").endswith(f"{100 * (truth - 1):+.1f} %")
    assert any("This training changed the bits per byte on data.jsonl by" in note for note in report.notes)


def test_figures_have_the_window_of_the_pruning_whatever_the_training_has(run, place, pruned):
    """The base once had 1.03 bits per byte in one report and 0.89 in the next, on the same text."""
    words = [*RECOVER, "--max-steps", 2, "--output", "@window"]
    words[words.index("--max-seq-length") + 1] = 16
    code, _, err = run(*words)
    assert code == 0, err
    first, second = (EvalReport.load(place / name / "eval_report.json") for name in ("pruned", "window"))
    assert first.dataset.max_seq_length == second.dataset.max_seq_length == 32
    assert second.loss.base == first.loss.base
    assert second.loss.pruned.bits_per_byte.value == pytest.approx(first.loss.pruned.bits_per_byte.value, rel=1e-3)
    assert "in windows of 32 tokens" in (place / "window/README.md").read_text()


@pytest.mark.parametrize("how", ["other text", "more tokens", "no report"])
def test_a_base_that_is_not_at_hand_is_not_measured(run, place, pruned, how, tmp_path):
    words, source = [*RECOVER, "--max-steps", 2, "--output", f"@{how[:5].strip()}"], pruned
    if how == "other text":
        (place / "unlike.jsonl").write_text("".join((place / "data.jsonl").read_text().splitlines(True)[:20]))
        words[3] = "@unlike.jsonl"
    elif how == "more tokens":
        words[words.index("--max-eval-tokens") + 1] = 90
    else:
        source = tmp_path / "bare"
        loaded, plan = load_pruned(pruned), PruningPlan.load(pruned / "pruning_plan.json")
        save_pruned(loaded, source, tokenizer=load_model(pruned).tokenizer, plan=plan)
        words[1] = source
    code, out, err = run(*words)
    assert code == 0, err
    report = EvalReport.load(place / how[:5].strip() / "eval_report.json")
    assert (report.loss.base, report.loss.recovered_comparison) == (None, None)
    assert report.loss.pruned is not None
    assert any("its losses were not measured" in note for note in report.notes)
    assert "not measured" in out
    assert "not measured" in (place / how[:5].strip() / "README.md").read_text()


def test_mistakes(run, place, pruned, subtests):
    for options, said, code in (
        (("--method", "qlora"), "method 'qlora'", 2),
        (("--num-evals", 0), "num_evals is 0", 2),
        (("--base", "@missing"), "does not exist", 1),
        (("--output", "@pruned/inside"), "a folder that this package saved", 1),
        (("--output", "@pruned/../pruned"), "would be lost", 2),
    ):
        with subtests.test(options):
            got, out, err = run(*RECOVER, "--output", "@bad", *options)
            assert (got, out) == (code, "")
            assert said in " ".join(err.split())
            assert not (place / "bad").exists()


def test_recovered_twice(run, place, pruned):
    for source, target in (("@pruned", "@once"), ("@once", "@twice")):
        words = ("recover", source, *RECOVER[2:], "--output", target, "--base", "@base", "--max-steps", 3)
        code, _, err = run(*words)
        assert code == 0, err
    plan = PruningPlan.load(place / "twice/pruning_plan.json")
    assert [one["history"]["steps"] for one in plan.provenance["recoveries"]] == [3, 3]
    first, second = (EvalReport.load(place / name / "eval_report.json") for name in ("pruned", "twice"))
    assert second.loss.base == first.loss.base
    assert second.loss.pruned == first.loss.pruned


def test_what_was_removed_as_a_whole_is_said_again(run, place):
    options = ("--num-layers", 2, "--removable-layers", "1", "--max-seq-length", 32, "--num-calibration-samples", 8)
    code, _, err = run("prune", "@base", "--data", "@data.jsonl", "--output", "@shorter", *options, *QUICK)
    assert code == 0, err
    how = ("--max-seq-length", 32, "--max-steps", 1, *QUICK, "--output", "@shorter-recovered")
    code, out, err = run("recover", "@shorter", "--data", "@data.jsonl", *how)
    assert code == 0, err
    assert "1 of 3 layers was removed as a whole: 1" in " ".join(out.split())
    assert any("GSM8K" in note for note in EvalReport.load(place / "shorter-recovered/eval_report.json").notes)


def test_a_folder_that_is_not_ours(run, place):
    code, _, err = run("recover", "@base", "--data", "@data.jsonl", "--output", "@bad")
    assert code == 1
    assert "manifest.json" in err


def test_a_parent_without_a_revision_is_known_by_its_weights(run, place, pruned, monkeypatch):
    plan = PruningPlan.load(pruned / "pruning_plan.json")
    plan = replace(plan, provenance=plan.provenance | {"base_model": "org/base"})  # as a callback writes it
    there = {}

    def load(name, **options):
        if name == "org/base":
            if "org/base" not in there:
                raise LoadError("no network")
            return replace(load_model(there[name]), name=name)
        return load_model(name, **options)

    monkeypatch.setattr(folder, "load_model", load)
    monkeypatch.setattr(folder.PruningPlan, "load", lambda path: plan)
    options = {"eval_options": EvalOptions(max_tokens=400, benchmark=False, memory=False)}
    few = RecoveryConfig(max_steps=2, max_seq_length=32)
    result = folder.recover_folder(pruned, place / "data.jsonl", few, **options)
    assert any("No base model was given" in note for note in result.report.notes)
    before = EvalReport.load(pruned / "eval_report.json").size
    assert result.report.size == replace(before, pruned_weight_bytes=None)  # of the parent
    assert result.base is None
    pinned = replace(plan, provenance=plan.provenance | {"base_revision": "f" * 40})
    monkeypatch.setattr(folder.PruningPlan, "load", lambda path: pinned)
    with pytest.raises(LoadError, match="no network"):
        folder.recover_folder(pruned, place / "data.jsonl", few, **options)
    monkeypatch.setattr(folder.PruningPlan, "load", lambda path: plan)
    there["org/base"] = place / "base"
    result = folder.recover_folder(pruned, place / "data.jsonl", few, **options)
    assert result.report.base_model == "org/base"
    assert result.report.loss.pruned is not None


@pytest.mark.parametrize(("name", "records"), [("one.jsonl", 1), ("two.jsonl", 2)])
def test_too_few_documents_are_told_before_anything_is_measured(run, place, pruned, monkeypatch, name, records):
    (place / name).write_text("".join((place / "data.jsonl").read_text().splitlines(keepends=True)[:records]))
    losses = "hf_context_prune.pipelines.comparison.document_losses"
    monkeypatch.setattr(losses, lambda *_, **__: pytest.fail("measured"))
    code, _, err = run(*RECOVER[:3], f"@{name}", *RECOVER[4:], "--output", "@few")
    assert code == 1
    said = " ".join(err.split())
    assert "1 distinct document(s), but a split by document needs at least 2" in said
    assert "--eval-data" not in said


def test_one_command_prunes_and_recovers(run, place):
    words = ("prune", "@base", "--data", "@data.jsonl", "--mlp-ratio", 0.5, "--reconstruction", "none", *QUICK)
    words += ("--max-seq-length", 32, "--num-calibration-samples", 16)
    (place / "options.yaml").write_text("recovery: {max_steps: 40, max_seq_length: 32, learning_rate: 3e-3}\n")
    code, out, err = run(*words, "--output", "@healed", "--config", "@options.yaml", "--recover-minutes", 5)
    assert code == 0, err
    assert "before the training)" in out
    verify_folder(place / "healed")
    (entry,) = PruningPlan.load(place / "healed/pruning_plan.json").provenance["recoveries"]
    assert (entry["config"]["max_minutes"], entry["config"]["learning_rate"]) == (5, 3e-3)  # of both places
    report = EvalReport.load(place / "healed/eval_report.json")
    assert report.loss.recovered.bits_per_byte.value < report.loss.pruned.bits_per_byte.value


def test_mistakes_of_the_one_command(run, place, subtests):
    (place / "wrong.yaml").write_text("recovery: {max_step: 3}\n")
    (place / "number.yaml").write_text("recovery: 10\n")
    (place / "short.yaml").write_text("recovery: {max_seq_length: 32}\n")
    for options, said in (
        (("--recover-minutes", 0), "max_minutes is 0.0; it must be a number above 0"),
        (("--config", "@short.yaml", "--recover-minutes", "1e-6"), "Give at least"),
        (("--config", "@wrong.yaml"), "Did you mean 'max_steps'"),
        (("--config", "@number.yaml"), "recovery is 10 in the config file; it must be a mapping"),
    ):
        with subtests.test(said):
            code, out, err = run("prune", "@base", "--data", "@data.jsonl", "--output", "@bad", *options)
            assert (code, out) == (2, "")
            assert said in " ".join(err.split())
            assert not (place / "bad").exists()
