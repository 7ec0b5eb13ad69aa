"""The command line as a user meets it: exit codes, stdout and stderr kept apart, nothing written on error."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal

import pytest
import typer
from rich.markup import escape

from hf_context_prune import PrunerConfig, RecoveryConfig, ThresholdConfig
from hf_context_prune.cli.app import app, terminate
from hf_context_prune.cli.options import config_from, flag_of
from hf_context_prune.evaluation.options import EvalOptions, QuestionOptions
from hf_context_prune.pipelines import demo
from hf_context_prune.pipelines.sampling import Sampling
from hf_context_prune.utils.options import PANELS, help_of
from tests.support.tiny import model_and_text, tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return model_and_text(folder, "data.jsonl")


PRUNE = ("prune", "@base", "--data", "@data.jsonl", "--max-seq-length", 32, "--num-calibration-samples", 16)
QUICK = ("--no-benchmark", "--max-eval-tokens", 400)


def test_prune_then_inspect_then_evaluate(run, place):
    code, out, err = run(*PRUNE, "--output", "@out", "--mlp-ratio", 0.25, *QUICK)
    assert code == 0
    first, *_ = out.splitlines()
    assert "% smaller" in first
    table = out[out.index(" measure") : out.index("After the layers")]
    assert max(map(len, table.splitlines())) <= 80
    assert "held out before calibration" not in out
    opens = out[out.index("opens in:") : out.index("To go on:")]
    assert re.search(r'transformers +AutoModelForCausalLM\.from_pretrained\(".*out"\)\n', opens)
    assert "hf-context-prune chat " in out
    for stage in ("[1/4] Reading the text", "[2/4] Measuring the base model", "[3/4] Pruning", "Took "):
        assert stage in err
    code, out, _ = run("inspect", "@out", "--format", "json")
    assert code == 0
    facts = json.loads(out)
    assert [w["neurons"] for w in facts["widths"]] == [30, 30, 30]
    code, out, _ = run("inspect", "@out")
    assert code == 0
    assert facts["plan_sha256"] in out
    code, out, _ = run("evaluate", "@out", "--data", "@data.jsonl", "--max-seq-length", 32, *QUICK, "--format", "quiet")
    assert code == 0
    assert float(out) > 0
    code, out, _ = run("evaluate", "@base", "--data", "@data.jsonl", "--max-seq-length", 32, *QUICK, "--format", "json")
    assert json.loads(out)["size"]["base_parameters"] == tiny_model("llama").num_parameters()


def test_json_is_all_of_stdout_and_config_file_is_overruled(run, place):
    (place / "options.yaml").write_text("pruning_ratio: 0.3\nround_to: 4\ncriterion: wanda\n")
    code, out, err = run(
        *PRUNE, "--output", "@json", "--config", "@options.yaml", "--pruning-ratio", 0.1, *QUICK, "--format", "json"
    )
    assert code == 0, err
    report = json.loads(out)["report"]
    assert report["size"]["asked_ratio"] == 0.1
    _, out, _ = run("inspect", "@json", "--format", "json")
    config = json.loads(out)["provenance"]["config"]
    assert (config["criterion"], config["round_to"]) == ("wanda", 4)
    assert all(w["neurons"] % 4 == 0 for w in json.loads(out)["widths"])


def test_a_loss_budget_is_searched_and_shown(run, place):
    (place / "size.yaml").write_text("pruning_ratio: 0.3\ncriterion: wanda\n")
    code, out, err = run(*PRUNE, "--output", "@budget", "--config", "@size.yaml", "--max-loss-increase", 0.2, *QUICK)
    assert code == 0, err
    assert "bits per byte, text of the search" in out
    assert "(allowed +20.0" in out
    assert "searched on" in out
    _, out, _ = run("inspect", "@budget", "--format", "json")
    provenance = json.loads(out)["provenance"]
    assert provenance["loss_budget"]["increase"] <= provenance["loss_budget"]["max_loss_increase"] == 0.2
    assert provenance["config"]["pruning_ratio"] is None


def test_adaptive_shows_what_it_predicted(run):
    code, out, err = run(*PRUNE, "--output", "@adaptive", "--allocation", "adaptive", "--verbose", *QUICK)
    assert code == 0, err
    assert "(predicted for pruned: +" in out
    assert "held out before calibration" in out
    code, out, _ = run("inspect", "@adaptive")
    assert code == 0
    assert "sensitivity: 7 curves (--format json has them)" in out


def test_quiet_is_silent(run, place):
    words = (*PRUNE, "--output", "@quiet", "--mlp-ratio", 0.25, *QUICK, "--format", "quiet")
    code, out, err = run(*words)
    assert (code, out.strip(), err.strip()) == (0, str(place / "quiet"), "")
    code, _, err = run(*words[:-2])  # and only that command
    assert code == 0
    assert "[3/4] Pruning" in err


def test_a_preset_gives_options(run):
    code, out, err = run("prune", "@base", "--preset", "compatible", "--dry-run", "--format", "json")
    assert code == 0, err
    assert json.loads(out)["asked_ratio"] == 0.2
    code, out, err = run("prune", "@base", "--preset", "small", "--pruning-ratio", 0.1, "--dry-run", "--format", "json")
    assert json.loads(out)["asked_ratio"] == 0.1
    assert json.loads(out)["seconds"]["training"] == 600
    code, out, err = run("prune", "@base", "--preset", "small", "--dry-run")
    assert "training 10 min" in out
    code, _, err = run("prune", "@base", "--preset", "paper", "--pruning-ratio", 0.1, "--dry-run")
    assert code == 2
    assert "With --preset paper (linear_threshold=0.001" in " ".join(err.split())
    code, _, err = run("prune", "@base", "--preset", "tiny", "--dry-run")
    assert code == 2
    assert "preset 'tiny'" in err


def test_equal_layers_are_one_row(run, place):
    if not (place / "out").exists():
        run(*PRUNE, "--output", "@out", "--mlp-ratio", 0.25, *QUICK)
    code, out, _ = run("inspect", "@out")
    assert code == 0
    assert "0 to 2" in out
    assert "null" not in next(line for line in out.splitlines() if line.startswith("  config:"))


def test_dry_run_needs_no_data_and_writes_nothing(run, place):
    before = sorted(path.name for path in place.iterdir())
    code, out, _ = run("prune", "@base", "--mlp-ratio", 0.25, "--dry-run", "--format", "json")
    assert code == 0
    assert [layer["neurons"] for layer in json.loads(out)["widths"]] == [30, 30, 30]
    code, out, _ = run("prune", "@base", "--pruning-ratio", 0.1, "--allocation", "uniform", "--dry-run")
    assert code == 0
    assert "Parameters:" in out
    assert "neurons" in out
    code, out, _ = run("prune", "@base", "--pruning-ratio", 0.1, "--dry-run")
    assert code == 0
    assert "asked 10.00%" in out
    assert "Architecture: not known yet: tokens and widths are measured" in out
    options = ("--num-layers", 2, "--removable-layers", "0-2", "--dry-run")
    code, out, _ = run("prune", "@base", *options)
    assert code == 0
    assert "Layers: 1 go as a whole, 2 stay; which ones is measured" in out
    code, out, _ = run("prune", "@base", *options, "--mlp-ratio", 0.25, "--format", "json")
    found = json.loads(out)
    assert [layer["neurons"] for layer in found["widths"]] == [30, 30]
    assert found["removed_layers"] == 1
    assert found["native_fit"]["fits"]
    code, out, err = run("prune", "@base", "--max-loss-increase", 0.03, "--dry-run")
    assert code == 2
    assert "--max-loss-increase is found by measuring" in err
    assert sorted(path.name for path in place.iterdir()) == before


def test_bad_input_says_what_and_writes_nothing(run, place, subtests):
    for arguments, code, message in (
        (("--pruning-ratio", 1.5), 2, "pruning_ratio is 1.5; it must be a share in [0, 1)"),
        (("--num-layers", 1), 2, "num_layers is 1, so 2 of 3 layers would be removed, and at most 0 may be"),
        (("--num-layers", 2, "--layer-ratio", 0.5), 2, "num_layers and layer_ratio both say how many layers go"),
        (("--criterion", "wnda"), 2, "Did you mean 'wanda'?"),
        (("--pruning-ratio", 0.9), 2, "tokens, neurons, kv_groups together can give"),
        (("--target-params", 10), 2, "tokens, neurons, kv_groups together can give"),
        (("--pruning-ratio", 0.9, "--units", "neurons,kv_groups"), 2, "let tokens go as well (--units)"),
        (("--units", "neurons,heads"), 2, "one or several of tokens, neurons, kv_groups"),
        (("--max-loss-increase", 0.03, "--mlp-ratio", 0.2), 2, "mlp_ratio fixes it"),
        (("--max-loss-increase", 3), 2, "max_loss_increase is 3.0; it must be a share above 0, up to 1"),
        (("--reconstruction", "bias"), 2, "can't be saved"),
        (("--text-column", "nope"), 1, "its columns are text, doc"),
        (("--config", "@absent.yaml"), 2, "can't be read"),
        (("--dtype", "int8"), 2, "int8"),
        (("--eval-data", "@absent.jsonl"), 1, "absent.jsonl"),
        (("--eval-data", "@data.jsonl"), 1, "also in the calibration text"),
    ):
        with subtests.test(arguments=arguments):
            got, out, err = run(*PRUNE, "--output", "@never", *arguments)
            assert got == code, err
            assert message in err
            assert out == ""
            assert not (place / "never").exists()
            assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_a_folder_that_is_not_ours_is_left_alone(run, place):
    (place / "notes").mkdir()
    (place / "notes" / "a.txt").write_text("mine")
    code, _, err = run(*PRUNE, "--output", "@notes")
    assert code == 1
    assert "not made by this package" in err
    assert (place / "notes" / "a.txt").read_text() == "mine"
    code, _, err = run("inspect", "@notes")
    assert code == 1


def test_unknown_yaml_key_has_a_suggestion(run, place):
    (place / "bad.yaml").write_text("prunning_ratio: 0.3\n")
    code, _, err = run(*PRUNE, "--output", "@never", "--config", "@bad.yaml")
    assert code == 2
    assert "Did you mean 'pruning_ratio'?" in err


def test_interrupted_says_so_and_exits_1(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_context_prune.pipelines.comparison.document_losses", interrupt)
    code, out, err = run(*PRUNE, "--output", "@never", "--mlp-ratio", 0.25)
    assert (code, out) == (1, "")
    assert "Interrupted; nothing was put in place." in err
    assert "The same command resumes after its last finished part" in " ".join(err.split())


def test_a_killed_run_goes_on_and_leaves_no_unfinished_work(run, place, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path))
    words = (*PRUNE, "--mlp-ratio", 0.25, *QUICK, "--output")
    stale = tmp_path / "unfinished" / ("a" * 32)
    stale.mkdir(parents=True)
    os.utime(stale, (0, 0))
    assert run(*words, "@whole")[0] == 0
    assert not list((tmp_path / "unfinished").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("hf_context_prune.pruning.model_builder.apply_plan", _interrupt)
        assert run(*words, "@resumed")[0] == 1
    assert len(list(tmp_path.glob("unfinished/*/*/block-*.safetensors"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr(
            "hf_context_prune.pruning.sequential.prune.SequentialPruner.prune", _interrupt
        )  # nothing is left to prune
        assert run(*words, "@resumed")[0] == 0
    assert not list((tmp_path / "unfinished").iterdir())
    first, second = (place / name / "model.safetensors" for name in ("whole", "resumed"))
    assert first.read_bytes() == second.read_bytes()


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_version(run):
    assert run("--version") == (0, "hf-context-prune 0.1.0\n", "")


COMMANDS = {
    "prune": (PrunerConfig, ThresholdConfig, EvalOptions),
    "recover": (RecoveryConfig, EvalOptions),
    "evaluate": (EvalOptions, QuestionOptions),
    "cross-domain": (),
    "paper-grid": (),
    "chat": (Sampling,),
    **dict.fromkeys(
        ("demo", "env", "bench", "report", "space", "card", "push", "export", "serve", "inspect", "check"), ()
    ),
}


def test_every_field_of_a_config_is_an_option_in_a_panel(subtests):
    commands = typer.main.get_command(app).commands
    assert set(commands) == set(COMMANDS)
    for command, configs in COMMANDS.items():
        with subtests.test(command):
            parameters = commands[command].params
            flags = [flag for item in parameters for flag in (*item.opts, *item.secondary_opts) if flag[:2] == "--"]
            assert len(flags) == len(set(flags))
            assert all(getattr(item, "help", None) for item in parameters)
            by_flag = {flag: item for item in parameters for flag in item.opts}
            for config in configs:
                for field in dataclasses.fields(config):
                    without = config is EvalOptions and command == "evaluate" and field.name == "example"  # no card
                    if (config, field.name) != (EvalOptions, "memory") and not without:  # follows --benchmark
                        item = by_flag[flag_of(config, field.name)]
                        assert item.help.startswith(escape(help_of(field)))
                        assert item.rich_help_panel == help_of(field).panel in PANELS


def test_help_shows_panels_and_every_option_once(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    code, out, _ = run("prune", "--help")
    assert code == 0
    for panel in ("Budget", "Vocabulary", "Method", "Text", "Paper's thresholds", "Evaluation", "Model", "Output"):
        assert out.count(f"─ {panel} ─") == 1
    for config in COMMANDS["prune"]:
        for field in dataclasses.fields(config):
            if field.name != "memory":
                assert len(re.findall(rf"^│ {flag_of(config, field.name)}\s", out, re.MULTILINE)) == 1


def test_demo_finds_mistakes_before_it_fetches_anything(run, monkeypatch, subtests):
    def fetch():
        raise AssertionError("fetched")

    monkeypatch.setattr(demo, "fetch_smollm2", fetch)
    monkeypatch.setattr(demo, "licence_texts", fetch)
    for arguments, code, message in (
        (("--eval-data", "@data.jsonl"), 2, "--eval-data is"),
        (("--text-column", "text"), 2, "--text-column is 'text'"),
        (("--data", "@absent.jsonl"), 1, "absent.jsonl"),
        (("--data", ""), 1, "shell variable"),
        (("--data", "@data.jsonl", "--eval-data", "@absent.jsonl"), 1, "absent.jsonl"),
        (("--data", "@data.jsonl", "--text-column", "nope"), 1, "its columns are text, doc"),
    ):
        with subtests.test(arguments=arguments):
            got, _, err = run("demo", *arguments)
            assert got == code, err
            assert message in err


def test_report(run, place):
    code, _, err = run(*PRUNE, "--output", "@reported", "--mlp-ratio", 0.25, *QUICK)
    assert code == 0, err
    code, out, err = run("report", "@reported", "--output", "@report")
    assert code == 0, err
    assert "bits per byte" in out
    assert (place / "report/report.md").exists()
    measured = ("--data", "@data.jsonl", "--max-seq-length", 32, *QUICK)
    code, _, err = run("evaluate", "@reported", *measured, "--output", "@figures")
    assert code == 0, err
    code, out, err = run("report", "@reported", "@figures", "--format", "json")
    assert code == 0, err
    both = json.loads(out)
    assert both["figures"] == json.loads((place / "figures/eval_report.json").read_text())
    assert both["reported"]["size"]["pruned_parameters"] == both["figures"]["size"]["base_parameters"]
    code, out, err = run("report", "@reported", "@figures", "--format", "quiet")
    assert (code, out.count("\n## ")) == (0, 2), err
    for command in (("evaluate", "@absent", "--data", "@data.jsonl"), ("bench", "@absent", "@absent")):
        code, _, err = run(*command, "--output", "@reported")  # before the model is looked for
        assert (code, "holds a model or a rendered report" in " ".join(err.split())) == (1, True), err
    code, _, err = run("report", "@base")
    assert code == 1
    assert "manifest.json" in err


@pytest.mark.slow
def test_bench(run):
    code, out, err = run("bench", "@base", "@base", "--repeats", 1, "--new-tokens", 2, "--output", "@speed")
    assert code == 0, err
    code, shown, err = run("report", "@speed")
    assert code == 0, err
    assert shown.splitlines()[1:] == out.splitlines()[:-1]  # but for the name, and for where it was written
    for measure in ("prefill, 127 tokens", "decode, batch 4", "load time", "peak RSS", "weights on disk"):
        assert measure in out
    assert "base and pruned in turns" in " ".join(out.split())


def test_the_size_of_the_vocabulary_of_a_file(run, place):
    (place / "tokens.yaml").write_text("vocab_size: 300\npad_to_multiple_of: 1\n")
    code, out, err = run(*PRUNE, "--output", "@tokens", "--config", "@tokens.yaml", *QUICK)
    assert code == 0, err
    assert "Vocabulary: 300 of" in " ".join(out.split())
    for bad, said in (
        *((word, "'--vocab-size': Input should be a valid integer") for word in ("many", "1.5", "auto")),
        ("0", "vocab_size is 0; it must be"),
    ):
        code, _, err = run("prune", "@base", "--vocab-size", bad, "--dry-run")
        assert (code, said in " ".join(err.split())) == (2, True)
    code, _, err = run("prune", "@base", "--vocab-coverage", 0.9, "--dry-run")
    assert (code, "give a number for --vocab-size" in " ".join(err.split())) == (2, True)


def test_the_command_line_wins_over_the_file(tmp_path, subtests):
    path = tmp_path / "options.yaml"
    for file, given, left in (
        ({"mlp_ratio": 0.2, "ridge": 0.1}, {"max_loss_increase": 0.1}, {"max_loss_increase": 0.1, "ridge": 0.1}),
        ({"max_loss_increase": 0.2}, {"attention_ratio": 0.5}, {"attention_ratio": 0.5}),
        ({"pruning_ratio": 0.2}, {"mlp_ratio": 0.5}, {"pruning_ratio": 0.2, "mlp_ratio": 0.5}),
        ({"native_architecture": True}, {"native_architecture": False}, {"native_architecture": False}),
        ({"mlp_ratio": 0.2}, {"units": "neurons"}, {"units": "neurons"}),
        ({"units": "neurons"}, {"mlp_ratio": 0.5}, {"mlp_ratio": 0.5}),
        ({"vocab_size": 64}, {"vocab_coverage": 0.9}, {"vocab_coverage": 0.9}),
        ({"embedding_threshold": 0}, {"vocab_size": 64}, {"vocab_size": 64}),
        ({"pruning_ratio": 0.2, "round_to": 8}, {"round_to": 1}, {"pruning_ratio": 0.2}),
    ):
        with subtests.test(file=file, given=given):
            path.write_text(json.dumps(file))
            assert config_from(path, given) == PrunerConfig(**left)
    path.write_text(json.dumps({"linear_threshold": 0.1, "domain": "law"}))
    paper = ThresholdConfig(linear_threshold=0.1, activation_threshold=0.2, domain="law")
    assert config_from(path, {"activation_threshold": 0.2}) == paper


def test_a_dry_run_of_too_many_tokens(run):
    code, out, err = run("prune", "@base", "--dry-run", "--vocab-size", 100_000)
    assert (code, out) == (2, "")
    assert "vocab_size is 100,000, but the model has only 320 embedding rows" in " ".join(err.split())


def test_questions_and_a_base(run, place):
    choices = ["a duty", "a dose", "care"]
    rows = [
        {"query": f"What is found {i}?", "choices": choices, "answer": i % 3, "source": "ab"[i % 2]} for i in range(12)
    ]
    rows += [dict(row, query=f"{row['query']} An example.", split="dev") for row in rows[:2]]
    (place / "mcq.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = run(*PRUNE, "--output", "@asked", "--mlp-ratio", 0.25, *QUICK)
    assert code == 0, err
    asked = ("--questions", "@mcq.jsonl", "--question-columns", "question=query", "--num-fewshot", 2)
    measured = ("--data", "@data.jsonl", "--max-seq-length", 32, *QUICK)
    code, out, err = run("evaluate", "@asked", "--base", "@base", *measured, *asked, "--verbose")
    assert code == 0, err
    assert "accuracy, a (6 questions, 1-shot, chance 33 %)" in out
    assert "accuracy, all (12 questions, 1-shot, chance 33 %)" in out
    assert "McNemar p" in out
    code, out, _ = run("evaluate", "@base", *measured, *asked, "--question-scorer", "letter", "--format", "json")
    facts = json.loads(out)["multiple_choice"]
    assert (facts["scorer"], facts["num_fewshot"], facts["pruned"]) == ("letter", 2, None)
    assert facts["base"][-1]["num_questions"] == 12
    code, out, err = run("evaluate", "@base", *measured, *asked, "--harness-task", "@task")
    assert code == 0, err
    assert "--tasks context_prune_mcq --num_fewshot 0" in " ".join(out.split())
    assert (place / "task/context_prune_mcq.yaml").exists()
    code, out, _ = run("evaluate", "@base", *measured, *asked[:4], "--question-split", "dev", "--format", "json")
    assert json.loads(out)["multiple_choice"]["base"][-1]["num_questions"] == 2
    for option in (
        *(("--harness-task", "@task"), ("--num-fewshot", 2), ("--max-questions", 3), ("--question-columns", "a=b")),
        *(("--question-scorer", "letter"), ("--question-split", "dev")),
    ):
        code, _, err = run("evaluate", "@base", *measured, *option)
        assert (code, f"{option[0]} is about" in err, "give --questions too" in err) == (2, True, True)
    code, _, err = run("evaluate", "@base", *measured, "--questions", "@mcq.jsonl")
    assert code == 1
    assert "has no column 'question' for the question; there are 'query'" in " ".join(err.split())
    code, _, err = run("evaluate", "@base", *measured, *asked, "--question-scorer", "guess")
    assert code == 2
    assert "Unknown scorer 'guess'" in err
    code, _, err = run("evaluate", "@base", *measured, "--questions", "@mcq.jsonl", "--question-columns", "question")
    assert code == 2
    assert "it must be pairs" in err
    twice = "question=query,question=q"
    code, _, err = run("evaluate", "@base", *measured, "--questions", "@mcq.jsonl", "--question-columns", twice)
    assert (code, "once" in err) == (2, True)


# The paper's grid, and the matrix


def domain_file(place, name, seed):
    draw = random.Random(seed)
    rows = [{"text": " ".join(draw.choices("abcdefghij", k=80)), "doc": f"{seed}-{i}"} for i in range(30)]
    (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place / f"{name}.jsonl")


def test_cross_domain_takes_a_domain_per_option(run, place):
    law, general = (domain_file(place, name, seed) for seed, name in enumerate(("law", "general")))
    asked = [{"query": f"Is it {i}?", "choices": ["a b", "c"], "answer": i % 2, "source": "s"} for i in range(4)]
    (place / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    options = ("--mlp-ratio", "0.25", "--num-calibration-samples", "4", "--max-seq-length", "32")
    code, out, err = run(
        "cross-domain",
        "@base",
        *("--domain", f"law={law}", "--domain", f"general={general}"),
        "--output",
        "@m",
        *("--mix", "law=0.5", "--questions", f"law={place / 'asked.jsonl'}", "--question-columns", "question=query"),
        *options,
        "--format",
        "json",
    )
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads((place / "m" / "eval_report.json").read_text())
    assert {(cell["calibrated"], cell["measured"]) for cell in report["figures"]["cells"]} == {
        (a, b) for a in ("dense", "law", "general", "law+0.5") for b in ("law", "general")
    }
    assert [table["title"] for table in report["tables"]][2:4] == ["Text of general mixed in", "Accuracy, all sources"]
    for name in ("matrix.png", "mix.png"):
        assert (place / "m" / name).is_file()
    code, out, err = run("report", "@m", "--output", "@rm")
    assert code == 0, err
    assert {path.name for path in (place / "rm").glob("*.png")} == {"matrix-m.png", "mix-m.png"}
    assert "calibrated on" in out
    code, _, err = run(
        "cross-domain", "@base", *("--domain", "law", "--domain", f"general={general}"), "--output", "@m", *options
    )
    assert (code, "law=laws.jsonl" in err) == (2, True)
    code, _, err = run("cross-domain", "@base", *("--domain", f"law={law}") * 2, "--output", "@m", *options)
    assert (code, "twice" in err) == (2, True)
    (place / "paper.yaml").write_text("embedding_threshold: 0.1\n")
    paper = (*("--domain", f"law={law}", "--domain", f"general={general}"), "--config", "@paper.yaml")
    code, _, err = run("cross-domain", "@absent", *paper, "--output", "@m")
    assert (code, "thresholds would give" in " ".join(err.split())) == (2, True)
    both = ("--domain", f"law={law}", "--domain", f"general={general}", *options)
    for wrong, said in (
        (("--output", "@m", "--reference", "genral"), "Did you mean 'general'"),
        (("--output", "@m", "--questions", "lav=x"), "Did you mean 'law'"),
        (("--output", "@m", "--questions", "law=x", "--question-scorer", "guess"), "Unknown scorer 'guess'"),
        (("--output", "@m", "--num-fewshot", 2), "give --questions too"),
        (("--output", "@m", "--mix", "law=much"), "it must be shares, as in law=0.25,0.5"),
        (("--output", "@m", "--mix", "general=0.5"), "for general, but that is"),
        (("--output", "@m", "--mix", "law=1"), "they must be above 0 and below 1"),
        (("--output", "@law.jsonl"), "is not a folder"),
    ):
        code, _, err = run("cross-domain", "@absent", *both, *wrong)  # before the model is looked for
        assert (code, said in " ".join(err.split())) == (1 if "folder" in said else 2, True), err


def test_paper_grid_writes_the_table_of_the_paper(run, place):
    law = domain_file(place, "law", 0)
    small = ("--num-calibration-samples", "4", "--max-seq-length", "32")
    grid = ("--linear", "off,0.1", "--activation", "off,0.1", "--embedding", "off")
    code, out, err = run("paper-grid", "@base", "--data", law, "--output", "@s", *grid, *small, "--format", "json")
    assert code == 0, err
    assert [(row["linear"], row["activation"]) for row in json.loads(out)["figures"]["rows"]] == [
        (None, 0.1),
        (0.1, None),
        (0.1, 0.1),
    ]
    assert (place / "s" / "sweep.md").read_text().count("\n| ") == 6  # header, line, dense, three points
    for wrong, said in (
        (("--linear", "much"), "'much'"),
        (("--linear", "-1"), "linear_threshold is -1"),
        (("--activation", "nan"), "activation_threshold is nan"),
        (("--linear", "off", "--activation", "off", "--embedding", "off"), "Every threshold of the grid is off"),
        (("--question-scorer", "guess", "--questions", "x"), "Unknown scorer 'guess'"),
        (("--max-questions", 5), "give --questions too"),
        (("--linear", "0.1,1e-1"), "give each threshold once"),
    ):
        code, _, err = run("paper-grid", "@absent", "--data", law, "--output", "@s", *small, *wrong)
        assert (code, said in " ".join(err.split())) == (2, True), err


def test_thresholds_prune_and_reload(run, place):
    law = domain_file(place, "law", 0)
    paper = ("--num-calibration-samples", "4", "--max-seq-length", "32")
    code, _, err = run(
        "prune", "@base", "--data", law, "--output", "@t", "--activation-threshold", "0.3", *paper, "--no-benchmark"
    )
    assert code == 0, err
    plan = json.loads((place / "t" / "pruning_plan.json").read_text())
    assert plan["provenance"]["zeroed"]["removed"] > 0
    code, _, err = run("prune", "@base", "--activation-threshold", "0.2", *paper, "--dry-run")
    assert (code, "measured on text" in err) == (2, True)
    chosen = ("--activation-threshold", "0.2", "--criterion", "wanda", "--pruning-ratio", "0.2")
    code, _, err = run("prune", "@base", "--data", law, "--output", "@t", *chosen)
    assert (code, "pruning_ratio, criterion can't be given" in " ".join(err.split())) == (2, True)


def test_a_second_sigterm_leaves_the_first_to_clean_up():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            terminate()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
