"""Whole runs on models where some layers, or all, have no attention heads that can be removed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hf_context_prune import EvalOptions, PrunerConfig, calibrate, make_plan, prune
from hf_context_prune.cli.tables import widths_table
from hf_context_prune.evaluation.reports.plots import describe_widths, plot_widths
from hf_context_prune.modeling.geometry import LayerWidths, units_of, widths_vary
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan
from hf_context_prune.publishing.space.facts import describe_removal
from hf_context_prune.publishing.space.headline import describe_parts
from hf_context_prune.publishing.space.views import widths_html
from hf_context_prune.training.callback.schedule import config_for_pruning
from tests.support.marks import TINY_TEXT
from tests.support.tiny import texts, tiny_model, tiny_tokenizer, tokens

CONV, ATTENTION = LayerWidths(40, 0), LayerWidths(40, 3)


def plan_of(dense, kept):
    layers = [LayerPlan(tuple(range(w.neurons)), tuple(range(w.kv_groups))) for w in kept]
    return PruningPlan("lfm2", tuple(dense), tuple(layers), "0" * 64)


HYBRID = plan_of([CONV, ATTENTION, CONV], [LayerWidths(40, 0), LayerWidths(30, 1), LayerWidths(12, 0)])
HEADS_STAY = plan_of([CONV] * 3, [LayerWidths(n, 0) for n in (40, 30, 12)])


@TINY_TEXT
@pytest.mark.parametrize("native", [True, False], ids=["uniform", "variable"])
@pytest.mark.parametrize("family", ["lfm2", "olmo2"])
def test_a_run_ends_in_a_folder_whose_card_names_what_there_was(family, native, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = PrunerConfig(
        pruning_ratio=0.15,
        units="neurons,kv_groups",
        num_calibration_samples=8,
        max_seq_length=32,
        native_architecture=native,
    )
    result = prune(tmp_path / "base", texts(40), config, eval_options=EvalOptions(benchmark=False, memory=False))
    result.save_pretrained(tmp_path / "out")
    widths = result.plan.widths
    assert sum(w.neurons for w in widths) < sum(w.neurons for w in result.plan.dense)
    assert widths_vary(widths) <= (not native)
    card = (tmp_path / "out/README.md").read_text()
    assert ("KV groups (with their query heads), in 1 of 3 layers: " in card) == (family == "lfm2")
    assert ("KV groups" in card) == (family == "lfm2")


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
@pytest.mark.parametrize("family", ["lfm2", "olmo2"])
def test_a_plan_from_statistics(family, allocation):
    model = tiny_model(family)
    config = PrunerConfig(pruning_ratio=0.1, allocation=allocation, reconstruction="least_squares")
    samples = tokens(40, 32)
    stats = calibrate(model, [{"input_ids": samples}], statistics={"gram"})
    plan = make_plan(model, stats, config, samples=samples)
    assert [bool(w.kv_groups) for w in plan.widths] == [bool(w.kv_groups) for w in plan.dense]
    assert plan.widths != plan.dense


def rows_of(plan):
    return [list(column.cells) for column in widths_table(plan.dense, plan.widths).columns]


def test_a_table_has_a_dash_where_a_layer_has_no_heads():
    assert rows_of(HYBRID) == [["0", "1", "2"], ["40"] * 3, ["40", "30", "12"], ["-", "3", "-"], ["-", "1", "-"]]
    assert rows_of(HEADS_STAY) == [["0", "1", "2"], ["40"] * 3, ["40", "30", "12"]]


def test_a_picture_has_an_axis_for_units_that_there_are():
    assert [axis.get_ylabel() for axis in plot_widths(HYBRID, "").axes] == ["MLP neurons", "KV groups"]
    assert [axis.get_ylabel() for axis in plot_widths(HEADS_STAY, "").axes] == ["MLP neurons"]
    assert describe_widths(plan_of([CONV] * 3, [CONV] * 3)) == "0 % of the neurons gone"


def test_the_space_tells_of_units_that_there_are():
    for plan, heads in ((HYBRID, True), (HEADS_STAY, False)):
        facts = SimpleNamespace(plan=plan, report=None)
        told = " ".join([*describe_removal(facts), describe_parts(plan), widths_html(facts)])
        assert ("KV groups" in told) == heads
        assert "0 of 0" not in told
        assert "0 to 1 of 3" not in told
        assert ("layer 0 has none" in told) == heads


def test_layers_that_differ_only_in_having_heads_are_alike():
    assert not widths_vary([CONV, ATTENTION, CONV])
    assert widths_vary([CONV, LayerWidths(39, 0)])
    assert widths_vary([ATTENTION, LayerWidths(40, 2), CONV])
    assert units_of([CONV, CONV]) == ("neurons",)


def test_a_schedule_reads_the_heads_of_a_layer_that_has_some():
    dense, final = (CONV, ATTENTION), (LayerWidths(20, 0), LayerWidths(20, 1))
    config = PrunerConfig(pruning_ratio=0.3, allocation="uniform")
    step = config_for_pruning(0.5, config, dense, dense, final, 1000)
    assert step.mlp_ratio == 0.25
    assert step.attention_ratio == pytest.approx(1 / 3)
    none = config_for_pruning(0.5, config, (CONV,), (CONV,), (LayerWidths(20, 0),), 1000)
    assert none.attention_ratio == 0
