"""The domain matrix and the paper's grid on tiny models: what is measured, what is written, how a run goes on."""

import copy
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_context_prune import EvalOptions, prune
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import load_documents
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.errors import ConfigError, LoadError, SaveError
from hf_context_prune.evaluation.bootstrap import ratio_to_change
from hf_context_prune.evaluation.options import QuestionOptions
from hf_context_prune.evaluation.reports.rendering import read_folder, render
from hf_context_prune.evaluation.reports.run_report import RunReport, load_report
from hf_context_prune.evaluation.scores import ROW_LAYOUT
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pipelines.matrix import domain_matrix
from hf_context_prune.pipelines.matrix_report import DENSE
from hf_context_prune.pipelines.sweep import SweepOptions, _Pruner, sweep
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.publishing.card.facts import read_facts
from hf_context_prune.storage.loading import LoadedModel, load_model
from hf_context_prune.training.recovery.config import RecoveryConfig
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import model_for, shared_tokenizer
from tests.support.tiny_tokenizers import WORDS

pytestmark = TINY_TEXT

CONFIG = PrunerConfig(mlp_ratio=0.3, num_calibration_samples=6, max_seq_length=64)
PARTS = {"law": WORDS[:10], "general": WORDS}


def texts(words, seed, count=30):
    draw = random.Random(seed)
    return [{"text": " ".join(draw.choices(words, k=40)), "doc": f"{seed}-{i}"} for i in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base():
    tokenizer = shared_tokenizer("llama3")
    return LoadedModel(model_for("llama", tokenizer), tokenizer, "tiny", None, None)


@pytest.fixture
def domains(tmp_path):
    return {
        name: write(tmp_path / f"{name}.jsonl", texts(words, seed)) for seed, (name, words) in enumerate(PARTS.items())
    }


@pytest.fixture
def questions(tmp_path):
    draw = random.Random(7)
    rows = [
        {
            "question": " ".join(draw.choices(WORDS, k=5)),
            "choices": draw.sample(WORDS, 3),
            "answer": i % 3,
            "source": "st"[i % 2],
        }
        for i in range(9)
    ]
    rows += [row | {"question": f"{row['question']} again", "split": "dev"} for row in rows[:3:2]]  # of one source
    return QuestionOptions(write(tmp_path / "questions.jsonl", rows), num_fewshot=2)


def test_every_model_spends_one_budget_on_all_units(base, domains, tmp_path, monkeypatch):
    options = {"pad_to_multiple_of": 8, "criterion": "wanda", "reconstruction": "none"}
    config, total = PrunerConfig(num_calibration_samples=6, max_seq_length=64, **options), base.model.num_parameters()
    found = domain_matrix(base, domains, tmp_path / "out", config, max_tokens=400, mixes={"law": [0.5]})
    for name in (*PARTS, "law+0.5"):
        plan = PruningPlan.load(tmp_path / "out" / "models" / name / "pruning_plan.json")
        assert "tokens" in plan.provenance["sensitivity"]
        assert plan.provenance["predicted_losses"]["base"] > 0  # what the native architecture is weighed by
        assert found.scores[name, "law"].parameters <= 0.8 * total
    with monkeypatch.context() as patch:
        patch.setattr("hf_context_prune.pipelines.matrix.prune_model", None)
        domain_matrix(base, domains, tmp_path / "out", config, max_tokens=400, mixes={"law": [0.5]})
    one = {**domains, "law": [{"text": " ".join(x["text"] for x in texts(WORDS[:10], 8)), "doc": "one"}]}
    domain_matrix(base, one, tmp_path / "one", config, eval_data={"law": texts(WORDS[:10], 9, 4)}, max_tokens=400)
    for name in PARTS:  # the same units, so that the models compare
        plan = PruningPlan.load(tmp_path / "one" / "models" / name / "pruning_plan.json")
        assert plan.provenance["config"]["units"] == "neurons,kv_groups"
        assert "single document" in plan.provenance["all_tokens_stay"]


def test_the_matrix_measures_every_model_on_every_domain(base, domains, questions, tmp_path, monkeypatch):
    out = tmp_path / "out"
    found = domain_matrix(base, domains, out, CONFIG, questions={"law": questions}, max_tokens=None)
    assert set(found.scores) == {(a, b) for a in (DENSE, *PARTS) for b in PARTS}
    for name in PARTS:  # the folders are those of prune() and reload
        loaded = load_model(out / "models" / name)
        assert sum(p.numel() for p in loaded.model.parameters()) == found.scores[name, "law"].parameters
    alone = prune(
        base, domains["law"], CONFIG, eval_options=EvalOptions(max_tokens=None, benchmark=False, memory=False)
    )
    own = found.scores["law", "law"]
    assert alone.report.size.pruned_parameters == own.parameters
    nll, size = sum(x.nll for x in own.losses), sum(x.num_bytes for x in own.losses)
    pruned = alone.report.loss.pruned
    assert pruned is not None
    assert pruned.num_bytes == size
    assert pruned.nats_per_token.value == pytest.approx(nll / pruned.num_tokens, rel=1e-5)
    # the paired change of a model against itself is nothing
    assert found.change("law", "law", against="law").value == 0
    assert [row[0] for row in found.loss_rows()] == [DENSE, "law", "general"]
    assert [row[0] for row in found.context_rows()] == ["law"]
    assert [len(row) for row in found.accuracy_rows()] == [2, 2, 2]
    rows = found.source_rows()
    assert [row[:2] for row in rows] == [("law / s", "5"), ("law / t", "4"), ("law / all", "9")]
    assert {len(row) for row in rows} == {len(found.source_header)} == {6}
    assert found.source_header[-1] == "own against general"
    assert [row[1] for row in found.accuracy_rows()] == list(rows[-1][2:5])
    text = (out / "matrix.md").read_text()
    first = found.scores[DENSE, "law"].losses
    scored = f"Scored: law {sum(x.num_tokens for x in first)} tokens of {len(first)} documents; general "
    for part in (
        scored,
        "Does the context matter?",
        "| law / t | 4 |",
        "2-shot (only 0 for some sources",
    ):
        assert part in text
    asked = found.held_out["law"]
    for general, said in (
        (asked, "scorer likelihood_normalised, 2-shot (only 0 for some"),
        (replace(asked, num_fewshot=0), "general: scorer likelihood_normalised, 0-shot"),
    ):
        scores = found.scores | {(DENSE, "general"): found.scores[DENSE, "law"]}
        both = replace(found, held_out={"law": asked, "general": general}, scores=scores)
        assert both._asked_how().count("scorer") == 1 + (general is not asked)
        assert said in both._asked_how()
    assert (out / "matrix.png").read_bytes().startswith(b"\x89PNG")
    report = load_report(out / "eval_report.json")
    assert isinstance(report, RunReport)
    assert [table.title for table in report.tables] == [
        "Bits per byte",
        "Own domain against general",
        "Accuracy, all sources",
        "Accuracy by source",
    ]
    assert report.tables[0].rows == tuple(found.loss_rows())
    assert report.figures == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    rendered = render([read_folder(out)], tmp_path / "report")
    assert {path.name for path in rendered.glob("*.png")} == {"matrix-out.png"}
    facts = read_facts(out / "models/law")  # each folder tells what was measured
    assert ratio_to_change(facts.report.loss.comparison.bits_per_byte_ratio) == found.change("law", "law")
    assert facts.report.general.loss.pruned.num_bytes == sum(x.num_bytes for x in found.scores["law", "general"].losses)
    assert facts.report.multiple_choice.pruned[-1].num_questions == 9
    assert facts.report.size.pruned_weight_bytes == (out / "models/law/model.safetensors").stat().st_size
    assert read_facts(out / "models/general").report.general is None
    assert "law.jsonl" in (out / "models/law/README.md").read_text()

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr("hf_context_prune.pipelines.matrix.prune_model", never)
    monkeypatch.setattr("hf_context_prune.pipelines.matrix.score", never)
    again = domain_matrix(base, domains, out, CONFIG, questions={"law": questions}, max_tokens=None)
    assert again.scores == found.scores
    monkeypatch.undo()
    shutil.rmtree(out / "models/law")  # it is made again
    other = domain_matrix(base, domains, out, CONFIG, questions={"law": questions}, reference="law", max_tokens=None)
    assert other.scores == found.scores
    assert read_facts(out / "models/law").report.general is None
    assert read_facts(out / "models/general").report.general is not None  # reported again: the reference is another one
    with pytest.raises(ConfigError, match="vocab_coverage would give every domain's model a size of its own"):
        domain_matrix(base, domains, out, PrunerConfig(vocab_coverage=0.9))
    with pytest.raises(ConfigError, match="other values of config"):
        domain_matrix(base, domains, out, PrunerConfig(mlp_ratio=0.5), questions={"law": questions}, max_tokens=None)


def test_no_file_of_a_run_names_a_document(base, tmp_path):
    """Names of documents and of their sources are the user's: a case, a client."""
    data = {}
    for seed, (name, words) in enumerate(PARTS.items()):
        rows = [row | {"doc": f"acme-v-{name}-{i}", "source": "clients"} for i, row in enumerate(texts(words, seed))]
        data[name] = write(tmp_path / f"{name}.jsonl", rows)
    asked = {"question": "the court", "choices": list(WORDS[:2]), "answer": 0, "id": "acme-question", "source": "s"}
    questions = QuestionOptions(write(tmp_path / "questions.jsonl", [asked]))
    domain_matrix(base, data, tmp_path / "matrix", CONFIG, questions={"law": questions}, max_tokens=None)
    grid = SweepOptions((None,), (0.3,), (None,), num_calibration_samples=4, max_seq_length=64)
    found = sweep(base, data["law"], tmp_path / "sweep", grid, questions=questions)
    assert {loss.source for loss in found.base.losses} == {"clients"}
    for path in (*(tmp_path / "matrix").rglob("*"), *(tmp_path / "sweep").rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            assert b"acme" not in content, path
            assert b"clients" not in content, path
    rows = tmp_path / "sweep/sweep.jsonl"
    assert "law.jsonl" not in rows.read_text()
    setting, *lines = map(json.loads, rows.read_text().splitlines())
    del setting["setting"]["row_layout"]  # as earlier versions wrote them, with names
    rows.write_text("".join(json.dumps(line) + "\n" for line in (setting, *lines)))
    with pytest.raises(ConfigError, match="measured with other values of row_layout"):
        sweep(base, data["law"], tmp_path / "sweep", grid, questions=questions)
    setting["setting"]["row_layout"], lines[0]["losses"][0][0] = ROW_LAYOUT, 1000
    rows.write_text("".join(json.dumps(line) + "\n" for line in (setting, *lines)))
    with pytest.raises(LoadError, match="A row of scores is damaged"):
        sweep(base, data["law"], tmp_path / "sweep", grid, questions=questions)


def test_held_out_text_that_another_domain_calibrates_on_is_dropped(base, domains, tmp_path):
    shared = texts(WORDS, 9, 6)
    write(tmp_path / "law.jsonl", texts(PARTS["law"], 0) + shared)
    held_out = write(tmp_path / "held.jsonl", [*texts(WORDS, 11, 4), *shared])
    found = domain_matrix(base, domains, tmp_path / "out", CONFIG, eval_data={"general": held_out}, max_tokens=None)
    assert len(found.scores[DENSE, "general"].losses) == 4
    assert "6 more were dropped" in found.splits["general"]


@pytest.mark.slow
def test_general_text_is_mixed_in_by_shares(base, domains, questions, tmp_path, monkeypatch):
    out, how = tmp_path / "out", {"questions": {"law": questions}, "max_tokens": None}
    found = domain_matrix(base, domains, out, CONFIG, mixes={"law": [0.5, 0.25]}, **how)
    assert {pair for pair in found.scores if "+" in pair[0]} == {
        (f"law+{share}", measured) for share in (0.25, 0.5) for measured in PARTS
    }
    curve = found.curves()["law"]
    assert [share for share, *_ in curve] == [0.0, 0.25, 0.5, 1.0]
    assert curve[0][1:] == (found.change("law", "law"), found.change("law", "general"))
    assert curve[-1][1:] == (found.change("general", "law"), found.change("general", "general"))
    assert [row[:2] for row in found.mix_rows()] == [("law", x) for x in ("0 %", "25 %", "50 %", "100 %")]
    facts = read_facts(out / "models/law+0.25")
    assert facts.plan.provenance["config"]["general_data_ratio"] == 0.25
    assert "tokens of law.jsonl, a share of 0.25 of general.jsonl." in facts.report.notes[-1]
    assert ratio_to_change(facts.report.loss.comparison.bits_per_byte_ratio) == curve[1][1]
    assert ratio_to_change(facts.report.general.loss.comparison.bits_per_byte_ratio) == curve[1][2]
    assert facts.report.multiple_choice is None  # losses alone
    text, general = (load_documents(domains[name]) for name in PARTS)
    rest, others = (hold_out_documents(one, seed=0)[0] for one in (text, general))
    config = replace(CONFIG, general_data_ratio=0.25)
    alone, _, _ = prune_model(base.model, base.tokenizer, CalibrationSet(rest, config, others), config)
    for one, other in zip(load_model(out / "models/law+0.25").model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (out / "mix.png").read_bytes().startswith(b"\x89PNG")
    assert "![General text mixed in](mix.png)" in (out / "matrix.md").read_text()
    measured = []
    monkeypatch.setattr("hf_context_prune.pipelines.matrix.score", lambda *_: measured.append(1))
    fewer = domain_matrix(base, domains, out, CONFIG, mixes={"law": [0.25]}, **how)  # what is there is taken
    assert [share for share, *_ in fewer.curves()["law"]] == [0.0, 0.25, 1.0]
    assert measured == []
    monkeypatch.undo()
    domain_matrix(base, domains, out, CONFIG, **how)
    assert not (out / "mix.png").exists()  # of the run before
    more = {**domains, "finance": write(tmp_path / "finance.jsonl", texts(WORDS[5:], 21))}
    out = tmp_path / "three"
    domain_matrix(base, more, out, CONFIG, mixes={"law": [0.5]}, max_tokens=None)
    other = {"mixes": {"law": [0.5]}, "max_tokens": None, "reference": "finance"}
    with pytest.raises(ConfigError, match="other options or text"):
        domain_matrix(base, more, out, CONFIG, **other)
    shutil.rmtree(out / "models/law+0.5")
    again = domain_matrix(base, more, out, CONFIG, **other)
    fresh = domain_matrix(base, more, tmp_path / "fresh", CONFIG, **other)
    assert again.scores == fresh.scores  # what was mixed in is another text now


def test_files_of_others_are_not_replaced(base, domains, tmp_path, monkeypatch):
    for name in ("matrix", "sweep"):
        monkeypatch.setattr(f"hf_context_prune.pipelines.{name}.ensure_loaded", None)
    for name, run in (
        ("mix.png", lambda out: domain_matrix(base, domains, out, CONFIG)),
        ("sweep.md", lambda out: sweep(base, domains["law"], out, OPTIONS)),
    ):
        (tmp_path / name).write_text("mine")
        with pytest.raises(SaveError, match=rf"has {name}, but no report of an earlier"):
            run(tmp_path)
        assert (tmp_path / name).read_text() == "mine"


def louder(base, **changes):
    """The same architecture with other weights."""
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return replace(base, model=model, **changes)


def test_a_model_of_another_run_is_not_taken(base, domains, tmp_path, monkeypatch):
    out = tmp_path / "out"
    domain_matrix(base, domains, out, CONFIG, max_tokens=None)
    half = replace(base, model=copy.deepcopy(base.model).to(torch.bfloat16))
    for other in (louder(base), half):
        with pytest.raises(ConfigError, match="other values of model"):
            domain_matrix(other, domains, out, CONFIG, max_tokens=None)
    (out / "matrix.jsonl").unlink()
    monkeypatch.setattr("hf_context_prune.pipelines.matrix.score", None)  # refused before anything is measured
    for other, config in ((base, replace(CONFIG, mlp_ratio=0.5)), (louder(base), CONFIG), (half, CONFIG)):
        with pytest.raises(ConfigError, match="other options or text"):
            domain_matrix(other, domains, out, config, max_tokens=None)
        (out / "matrix.jsonl").unlink()
    shutil.rmtree(out / "models" / "law")
    (out / "models" / "law").mkdir()
    (out / "models" / "law" / "mine.txt").touch()
    with pytest.raises(SaveError, match="was not made by this package"):
        domain_matrix(base, domains, out, CONFIG, max_tokens=None)


def test_other_questions_are_not_answered_by_old_rows(base, domains, questions, tmp_path):
    out = tmp_path / "out"
    domain_matrix(base, domains, out, CONFIG, questions={"law": questions}, max_tokens=None)
    rows = [json.loads(line) for line in Path(questions.source).read_text().splitlines()]
    write(Path(questions.source), [row | {"answer": (row["answer"] + 1) % 3} for row in rows])
    with pytest.raises(ConfigError, match="other values of held_out"):
        domain_matrix(base, domains, out, CONFIG, questions={"law": questions}, max_tokens=None)


@pytest.mark.parametrize("options", [{"scorer": "likelyhood"}, {"num_fewshot": -1}])
def test_how_questions_are_scored_is_checked_at_once(options):
    with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
        QuestionOptions("questions.jsonl", **options)


@pytest.mark.parametrize(
    ("domains", "more"),
    [
        ({}, {}),
        ({"law": "a"}, {}),
        ({"law": "a", "dense": "b"}, {}),
        ({"law": "a", "a/b": "b"}, {}),
        ({"law": "a", "b": "b"}, {"eval_data": {"lav": "x"}}),
        ({"law": "a", "b": "b"}, {"questions": {"c": "x"}}),
        ({"law": "a", "general": "b"}, {"reference": "genral"}),
        ({"law": "a", "general": "b"}, {"config": PrunerConfig(max_loss_increase=0.1)}),
        ({"law": "a", "general": "b"}, {"config": PrunerConfig(general_data_ratio=0.1)}),
        ({"law": "a", "general": "b"}, {"config": PrunerConfig(domain="law")}),
        ({"law": "a", "b": "b"}, {"mixes": {"law": [0.5]}}),
        ({"law": "a", "general": "b"}, {"mixes": {"general": [0.5]}}),
        ({"law": "a", "general": "b"}, {"mixes": {"lav": [0.5]}}),
        ({"law": "a", "general": "b"}, {"mixes": {"law": [0.5, 1.0]}}),
        ({"law": "a", "general": "b"}, {"mixes": {"law": [0.5, 0.5000001]}}),
        ({"law": "a", "general": "b"}, {"mixes": {"law": [0.05]}}),
    ],
)
def test_bad_domains_are_refused(base, tmp_path, domains, more, monkeypatch):
    monkeypatch.setattr("hf_context_prune.pipelines.matrix.ensure_loaded", None)  # refused before a model is loaded
    with pytest.raises(ConfigError):
        domain_matrix(base, domains, tmp_path / "out", **{"config": CONFIG, **more})
    assert not (tmp_path / "out").exists()


def test_without_general_text_there_is_no_reference(base, domains, tmp_path):
    domains["finance"] = domains.pop("general")
    found = domain_matrix(base, domains, tmp_path / "out", CONFIG, max_tokens=None)
    assert (found.reference, found.context_rows(), found.accuracy_rows(), found.source_rows()) == (None, [], [], [])
    assert "Does the context matter?" not in (tmp_path / "out" / "matrix.md").read_text()
    shutil.rmtree(tmp_path / "out")
    found = domain_matrix(base, domains, tmp_path / "out", CONFIG, max_tokens=None, reference="finance")
    assert [row[0] for row in found.context_rows()] == ["law"]


def test_texts_that_tell_no_domains_apart(base, domains, tmp_path):
    with pytest.raises(ConfigError, match="law and general are the same text"):
        domain_matrix(base, {**domains, "general": domains["law"]}, tmp_path / "out", CONFIG)
    part = write(tmp_path / "part.jsonl", texts(PARTS["law"], 0, 5))
    held = write(tmp_path / "held.jsonl", texts(WORDS, 12, 5))
    with pytest.raises(ConfigError, match=r"law and general are measured on the same text \(held\.jsonl\)"):
        domain_matrix(base, domains, tmp_path / "out", CONFIG, eval_data={"law": held, "general": held})
    with pytest.raises(ConfigError, match=r"all 5 test documents of general.* in the text of law"):
        domain_matrix(base, domains, tmp_path / "out", CONFIG, eval_data={"general": part})


@pytest.mark.parametrize("run", ["matrix", "sweep"])
def test_a_second_run_into_one_folder_waits_its_turn(base, domains, tmp_path, monkeypatch, run):
    out = tmp_path / "out"

    def go():
        if run == "matrix":
            return domain_matrix(base, domains, out, CONFIG, max_tokens=None)
        return sweep(base, domains["law"], out, OPTIONS)

    def beside(*_):
        with pytest.raises(SaveError, match="Another run is saving"):
            go()
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(f"hf_context_prune.pipelines.{run}.score", beside)
        with pytest.raises(InterruptedError):
            go()
    assert (out / f"{run}.jsonl").read_text().count("\n") == 1


def test_an_output_that_cannot_be_written_is_refused_first(base, domains, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name in ("matrix", "sweep"):
        monkeypatch.setattr(f"hf_context_prune.pipelines.{name}.ensure_loaded", None)
    for out in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(SaveError, match="is not a folder, so nothing can be made in it"):
            domain_matrix(base, domains, out, CONFIG)
        with pytest.raises(SaveError, match="is not a folder, so nothing can be made in it"):
            sweep(base, domains["law"], out, OPTIONS)


def test_thresholds_for_another_kind_of_layer_are_refused_first(domains, tmp_path, monkeypatch):
    tokenizer = shared_tokenizer("llama3")
    gpt2 = LoadedModel(model_for("gpt2", tokenizer), tokenizer, "tiny", None, None)
    monkeypatch.setattr("hf_context_prune.pipelines.sweep.score", None)
    with pytest.raises(ConfigError, match="Conv1D"):
        sweep(gpt2, domains["law"], tmp_path / "out", OPTIONS)


OPTIONS = SweepOptions(
    linear=(None, 1e-3, 0.3),
    activation=(1e-9, 0.3),
    embedding=(None, 0.0),
    num_calibration_samples=4,
    max_seq_length=64,
)


def test_the_grid_tells_removed_from_zeroed(base, domains, questions, tmp_path, monkeypatch):
    out = tmp_path / "out"
    found = sweep(base, domains["law"], out, OPTIONS, questions=questions)
    assert len(found.rows) == 12
    dense = found.base.parameters
    by_point = {row.point: row for row in found.rows}
    nothing, much = by_point[None, 1e-9, None], by_point[0.3, 0.3, None]
    assert nothing.pruned.parameters == dense
    assert nothing.pruned.losses == found.base.losses
    assert much.pruned.parameters < dense
    assert much.zeros > nothing.zeros
    assert by_point[1e-3, 1e-9, None].pruned == nothing.pruned  # the same weights: scored once
    tokens = by_point[None, 1e-9, 0.0]
    assert tokens.pruned.parameters < dense
    assert tokens.zeros > 0
    for row in found.rows:
        assert row.tuned is None
        assert row.pruned.answers is not None
        assert len(row.pruned.answers) == 9
    header, sources = found.source_table()
    assert header[4:] == ("s (n 5)", "t (n 4)", "all (n 9)")
    assert len(sources) == 13
    assert all("guessing 33 %" in cell for cell in sources[0][4:])
    text = (out / "sweep.md").read_text()
    assert text.count("\n| off |") + text.count("\n| 0.001 |") + text.count("\n| 0.3 |") == 2 * 12
    assert "Accuracy by source" in text
    report = load_report(out / "eval_report.json")
    assert isinstance(report, RunReport)
    assert report.figures == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (out / "loss-against-size.png").read_bytes().startswith(b"\x89PNG")
    rendered = render([read_folder(out)], tmp_path / "report")
    assert {path.name for path in rendered.glob("*.png")} == {"loss-against-size-out.png"}
    monkeypatch.setattr("hf_context_prune.pipelines.sweep.prune_model", None)
    assert sweep(base, domains["law"], out, OPTIONS, questions=questions).rows == found.rows


def test_the_grid_trains_what_it_pruned(base, domains, tmp_path):
    options = SweepOptions(
        linear=(None,),
        activation=(0.3,),
        embedding=(None, 0.0),
        recovery=RecoveryConfig(max_steps=3, num_epochs=100.0, max_seq_length=64, batch_size=2),
        num_calibration_samples=4,
        max_seq_length=64,
    )
    found = sweep(base, domains["law"], tmp_path / "out", options)
    for row in found.rows:
        assert row.tuned is not None
        assert row.tuned.parameters == row.pruned.parameters
    assert {len(cells) for cells in found.table_rows()} == {len(found.header)} == {10}


def test_a_grid_that_prunes_nothing_is_refused(base, domains, tmp_path):
    with pytest.raises(ConfigError, match="off"):
        sweep(base, domains["law"], tmp_path / "out", SweepOptions((None,), (None,), (None,)))
    with pytest.raises(ConfigError, match=r"activation is 0\.001, off, 0\.001; give each threshold once"):
        sweep(base, domains["law"], tmp_path / "out", SweepOptions(activation=(1e-3, None, 1e-3)))
    with pytest.raises(ConfigError, match="linear_threshold is -1"):
        sweep(base, domains["law"], tmp_path / "out", SweepOptions((-1.0,), (None,), (None,)))
    assert not (tmp_path / "out").exists()


def test_a_point_of_the_grid_is_what_prune_makes_of_its_options(base, domains):
    """What points have in common is measured once; that changes no weight and no word of a plan."""
    text, pruner = load_documents(domains["law"]), _Pruner(base, load_documents(domains["law"]))
    for config in OPTIONS.configs():
        own, _, plan = pruner.prune(config)
        alone, _, expected = prune_model(base.model, base.tokenizer, CalibrationSet(text, config), config)
        assert plan == expected
        for (name, got), wanted in zip(own.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(got, wanted), name
