"""What the tabs tell, from plans and reports; names in them stay names."""

from __future__ import annotations

import shutil
from dataclasses import replace

import httpx
import pytest
from huggingface_hub.errors import RemoteEntryNotFoundError

from hf_context_prune.data.questions import Question, QuestionSet
from hf_context_prune.evaluation.accuracy import Answer, summarize_answers
from hf_context_prune.evaluation.reports.report import EvalReport, MultipleChoiceFacts, TextLosses
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.publishing.prompts import OUTSIDE, choose_prompts
from hf_context_prune.publishing.space import facts as facts_module
from hf_context_prune.publishing.space.facts import (
    Facts,
    describe_removal,
    domain_table,
    question_table,
    read_facts,
    report_rows,
)
from hf_context_prune.publishing.space.html import render
from hf_context_prune.publishing.space.settings import Entry, Source
from hf_context_prune.publishing.space.surprise import Span
from hf_context_prune.publishing.space.views import headline_html, removed_html, surprise_html
from tests.support.space_models import settings_of


@pytest.fixture(scope="module")
def facts(tiny_space):
    return {entry.name: read_facts(entry) for entry in settings_of(tiny_space).entries}


def test_removed_in_words(facts, tiny_space):
    law = " ".join(describe_removal(facts["Law"]))
    plan = PruningPlan.load(tiny_space / "uniform/pruning_plan.json")
    gone = sum(w.neurons for w in plan.dense) - sum(w.neurons for w in plan.widths)
    assert f"MLP neurons: {gone} of 120 were removed (50%); 20 of 40 remain per layer." in law
    assert "KV groups (attention heads): all 9 remain." in law
    assert "The vocabulary is complete." in law
    assert "optimal brain surgeon" in law
    assert "parameters were removed" in law


def test_options_of_another_version_are_left_out(facts, caplog):
    law = facts["Law"]
    for options in ({"quantum": 1}, ["mlp_ratio"], None):
        plan = replace(law.plan, provenance={**law.plan.provenance, "config": options})
        assert "Units were chosen" not in " ".join(describe_removal(replace(law, plan=plan)))
    assert "quantum" in caplog.text


def test_a_missing_folder_is_named(facts):
    lost = facts["Lost"]
    assert lost.plan is None
    assert "There is no folder" in lost.problems[0]
    assert describe_removal(lost) == []


def test_a_repository_without_a_report_has_its_plan(tiny_space, monkeypatch):
    def download(repo, name, *, revision):
        if name == "eval_report.json":
            response = httpx.Response(404, request=httpx.Request("GET", "https://localhost"))
            raise RemoteEntryNotFoundError(f"no {name} in {repo}", response=response)
        return str(tiny_space / "uniform" / name)

    monkeypatch.setattr(facts_module, "hf_hub_download", download)
    found = read_facts(Entry("X", Source("org/x", "a" * 40), Source()))
    assert found.plan is not None
    assert (found.report, found.problems) == (None, ())


def test_a_damaged_plan_leaves_the_rest(tiny_space, tmp_path):
    folder = shutil.copytree(tiny_space / "uniform", tmp_path / "damaged")
    (folder / "pruning_plan.json").write_text("{}")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    found = read_facts(
        Entry("X", Source(path=folder), Source(), reports={"g": tmp_path / "none.json", "d": tmp_path / "deep.json"})
    )
    assert found.plan is None
    assert len(found.problems) == 3


def test_the_matrix_has_a_column_a_text(facts, tiny_space):
    header, rows = domain_table(facts)
    assert header == ["model", "own domain"]
    assert [row[0] for row in rows] == ["Law", "Medicine"]
    report = facts["Law"].report
    general = TextLosses(report.dataset, report.loss)
    seen = facts | {
        "Law": replace(facts["Law"], report=replace(report, general=general)),
        "Medicine": replace(facts["Medicine"], others={"court rulings": facts["Medicine"].report}),
    }
    header, rows = domain_table(seen)
    assert header == ["model", "own domain", "general text", "court rulings"]
    ratio = report.loss.comparison.bits_per_byte_ratio
    assert ratio.interval is None  # of so few documents
    cell = f"{100 * (ratio.value - 1):+.1f} %"
    assert rows[0][1] == rows[0][2] == f"{cell}, {report.loss.comparison.num_documents} documents"
    assert rows[0][3] == rows[1][2] == "not measured"


def test_the_table_of_questions(facts):
    assert question_table(facts)[1] == []
    asked = tuple(Question(str(i), "?", ("a", "b"), 0, "exam") for i in range(30))
    asked = QuestionSet(asked, {}, "questions.jsonl", None)
    right = [Answer(str(i), "exam", (1.0, 0.0), 0, True, 0) for i in range(30)]
    wrong = [replace(answer, correct=i % 3 != 0) for i, answer in enumerate(right)]
    base, pruned = (summarize_answers(asked, answers) for answers in (right, wrong))
    choice = MultipleChoiceFacts("questions.jsonl", None, "likelihood", 0, base, pruned)
    seen = {"Law": replace(facts["Law"], report=replace(facts["Law"].report, multiple_choice=choice))}
    header, rows = question_table(seen)
    assert rows[0][:3] == ["Law", f"questions.jsonl, {base[0].source}", "30"]
    assert rows[0][3].startswith("100.0 %")
    assert rows[0][4].startswith("66.7 %")
    assert len(rows[0]) == len(header)


def test_hostile_names_stay_names(facts):
    hostile = "<img src=x onerror=alert(1)> ${alert(1)} {{constructor}} </div>\n# x"
    fact = facts["Law"]
    report = replace(fact.report, base_model=hostile, notes=(hostile,))
    html = removed_html(replace(fact, report=report, problems=(hostile,)))
    html += render("table", header=[hostile], rows=[[hostile]], caption=hostile)
    html += headline_html(Entry(hostile, Source(), Source()), fact) + surprise_html((Span(hostile, 1.0, 9.0),))
    html += render("head", title=hostile) + render("status", text=hostile, bad=True)
    html += render("side", kind="dense", name=hostile, speed="1", first="1", megabytes="1", tokens="1")
    for mark in ("<img", "${", "{{", "</div>\n#"):
        assert mark not in html
    assert "&lt;img src=x onerror=alert(1)&gt; &#36;&#123;alert(1)}" in html


def test_a_report_of_one_model_has_no_table(facts):
    report = facts["Law"].report
    alone = replace(report, size=replace(report.size, pruned_parameters=None))
    assert report_rows(alone) == report_rows(None) == []
    assert domain_table({"X": Facts(report=replace(report, loss=replace(report.loss, comparison=None)))})[1] == [
        ["X", "one model only"]
    ]


def test_prompts_by_domain():
    names = ("Mini GPT law", "medicine", "Finance", "licences", "poems")
    assert len({choose_prompts(name) for name in names}) == len(names)
    assert choose_prompts("mini", domain="contracts") == choose_prompts("law")
    assert choose_prompts("contracts.jsonl", "mini") == choose_prompts("law")
    assert choose_prompts("law.jsonl", domain="beekeeping")[:1] == choose_prompts("law")[:1]
    assert "beekeeping" in choose_prompts("mini", domain="beekeeping")[0]
    assert {choose_prompts(name)[-1] for name in names} == {OUTSIDE}


def test_reports_are_read(tiny_space):
    file = tiny_space / "variable/eval_report.json"
    entry = Entry("X", Source(path=tiny_space / "uniform"), Source(), reports={"other": file})
    assert read_facts(entry).others == {"other": EvalReport.load(file)}
