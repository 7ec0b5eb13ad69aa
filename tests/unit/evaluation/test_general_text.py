"""The general text beside the domain's, from Python and from the command line."""

from __future__ import annotations

import json

import pytest

from hf_context_prune import EvalOptions, PrunerConfig, evaluate, prune
from hf_context_prune.errors import DataError
from hf_context_prune.evaluation.reports.report import EvalReport
from hf_context_prune.utils.file_names import REPORT_NAME
from tests.support.runs import OPTIONS
from tests.support.tiny import model_and_text, texts, tiny_model, tiny_tokenizer


def options(general):
    return EvalOptions(max_tokens=300, benchmark=False, memory=False, general_data=general)


def test_a_general_text_is_measured_beside_the_domain():
    config, general = PrunerConfig(mlp_ratio=0.25, general_data_ratio=0.0, **OPTIONS), texts(seed=5)
    result = prune(tiny_model("llama"), texts(), config, tokenizer=tiny_tokenizer(), eval_options=options(general))
    facts = result.report.general
    assert facts.dataset.held_out.startswith("The documents are of")
    assert facts.loss.base.num_documents == facts.loss.comparison.num_documents
    alone = evaluate(
        result.model, general, tokenizer=tiny_tokenizer(), max_seq_length=32, eval_options=options(texts(seed=6))
    )
    assert alone.loss.base.bits_per_byte.value == pytest.approx(facts.loss.pruned.bits_per_byte.value, rel=1e-4)
    assert alone.general.loss.pruned is None
    plain = prune(tiny_model("llama"), texts(), config, tokenizer=tiny_tokenizer(), eval_options=options(None))
    assert plain.report.general is None
    assert plain.plan.sha256 == result.plan.sha256  # it changes nothing but the report


def test_general_text_that_was_calibrated_on_is_refused():
    config = PrunerConfig(mlp_ratio=0.25, **OPTIONS)
    with pytest.raises(DataError, match="also in the calibration text"):
        prune(tiny_model("llama"), texts(), config, tokenizer=tiny_tokenizer(), eval_options=options(texts()[:3]))


def test_the_text_of_the_domain_is_no_general_text(subtests):
    config, model, tokenizer = PrunerConfig(mlp_ratio=0.25, **OPTIONS), tiny_model("llama"), tiny_tokenizer()
    for data in (texts(), [{"text": text, "doc": str(index)} for index, text in enumerate(texts())]):
        with subtests.test(type(data[0]).__name__), pytest.raises(DataError, match="also in the domain's test text"):
            prune(model, data, config, tokenizer=tokenizer, eval_options=options(data))
    with pytest.raises(DataError, match="also in the domain's test text"):
        evaluate(model, texts(), tokenizer=tokenizer, max_seq_length=32, eval_options=options(texts()))
    mixed = evaluate(
        model, texts(), tokenizer=tokenizer, max_seq_length=32, eval_options=options([*texts()[:4], *texts(5, seed=5)])
    )
    dropped, cut = "4 of its documents were dropped, as they are in the domain's text too.", "A passage each of 5 of 5"
    assert f"{dropped} {cut}" in mixed.general.dataset.held_out
    assert mixed.general.loss.base.num_documents <= 5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = model_and_text(tmp_path_factory.mktemp("general"), "data.jsonl")
    (folder / "general.txt").write_text("Other words than those of the domain stand here. " * 20)
    return folder


def test_commands_take_it(run, place):
    quick = ("--max-seq-length", "32", "--no-benchmark", "--max-eval-tokens", "300")
    small = ("--num-calibration-samples", "8", "--mlp-ratio", "0.25", "--domain", "law", *quick)
    general = ("--general-data", "@general.txt")
    code, _, err = run("prune", "@base", "--data", "@data.jsonl", *general, *small, "--output", "@out")
    assert code == 0, err
    report = EvalReport.load(place / "out" / REPORT_NAME)
    assert report.general.dataset.name == "general.txt"
    card = (place / "out" / "README.md").read_text()
    assert "- law\n" in card
    assert "--general-data general.txt" in card
    code, out, err = run(
        "evaluate", "@out", "--base", "@base", "--data", "@data.jsonl", *general, *quick, "--format", "json"
    )
    assert code == 0, err
    assert json.loads(out)["general"]["loss"]["comparison"]["num_documents"] == 1
    code, out, err = run("card", "@out", "--name", "org/out")
    assert code == 0, err
    assert '"org/out"' in (place / "out" / "README.md").read_text()
    assert run("card", "@base")[0] == 1
    (place / "out" / "README.md").write_text("mine")
    assert run("card", "@out")[0] == 2
    assert run("card", "@out", "--overwrite")[0] == 0
    code, out, _ = run("push", "@out", "org/out")
    assert code == 1  # HF_HUB_OFFLINE is set for the tests
