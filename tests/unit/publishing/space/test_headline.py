"""The figures at the head of the page, and what it says was removed: from report and plan, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_context_prune.evaluation.reports.report import SpeedFacts, TextLosses
from hf_context_prune.evaluation.speed import SpeedMeasurement, Spread
from hf_context_prune.publishing.space.facts import Facts, read_facts
from hf_context_prune.publishing.space.headline import describe_parts, headline
from hf_context_prune.publishing.space.views import has_widths, headline_html, widths_html
from tests.support.space_models import settings_of


@pytest.fixture(scope="module")
def facts(tiny_space):
    return {entry.name: read_facts(entry) for entry in settings_of(tiny_space).entries}


def measured(*tokens_per_second):
    spread = Spread(tokens_per_second[0], tokens_per_second[0], tokens_per_second[0])
    return SpeedMeasurement(
        tokens_per_second, tokens_per_second, spread, spread, 8, 8, 1, "float32", 1, "cpu", "a processor"
    )


def test_four_figures(facts):
    report = facts["Law"].report
    full = replace(
        report,
        general=TextLosses(report.dataset, report.loss),
        speed=SpeedFacts(measured(2.0, 2.0, 2.0), measured(3.0, 3.0, 4.0)),
    )
    size, speed, own, elsewhere = headline(replace(facts["Law"], report=full), "Law")
    change = report.loss.comparison.bits_per_byte_ratio.value - 1
    assert size.value == f"{-100 * report.size.achieved_ratio:+.1f} %"
    assert "million parameters" in size.detail
    assert speed.value == "1.50×"
    assert (own.label, own.value) == ("Loss on Law text", f"{100 * change:+.1f} %")
    assert own.detail == f"bits per byte, {report.loss.last.num_documents} test documents"  # too few for an interval
    assert (elsewhere.label, elsewhere.value) == ("Loss on general text", own.value)


def test_what_was_not_measured_says_so(facts):
    _, speed, _, elsewhere = headline(facts["Law"], "Law")
    assert speed.value == elsewhere.value == "not measured"
    assert [figure.value for figure in headline(Facts(), "Law")] == ["not measured"] * 4
    other = headline(replace(facts["Law"], others={"court rulings": facts["Law"].report}), "Law")[3]
    assert other.label == "Loss on court rulings"


def test_only_parts_that_were_removed_are_named(facts, tiny_space):
    uniform, variable = describe_parts(facts["Law"].plan), describe_parts(facts["Medicine"].plan)
    assert uniform == "The pruned model was made without 60 of 120 MLP neurons."
    assert "vocabulary" not in uniform + variable
    assert describe_parts(None) == ""
    assert uniform in headline_html(settings_of(tiny_space).entries[0], facts["Law"])


def test_equal_layers_have_no_chart(facts):
    assert not has_widths(facts["Law"])
    assert widths_html(facts["Law"]) == widths_html(Facts()) == ""
    chart = widths_html(facts["Medicine"])
    assert chart.count('role="listitem"') == 2 * len(facts["Medicine"].plan.dense)
    assert f"layer 0: {facts['Medicine'].plan.widths[0].neurons} of 40 kept" in chart
