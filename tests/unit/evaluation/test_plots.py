"""The pictures: titles that say the result, one set of colours, legends beside what is drawn, whole ticks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from matplotlib.colors import to_hex

from hf_context_prune.evaluation.reports.plots import (
    PlotPoint,
    describe_widths,
    plot_curves,
    plot_losses,
    plot_matrix,
    plot_widths,
)
from hf_context_prune.modeling.geometry import LayerWidths, widths_vary
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan
from hf_context_prune.utils.palette import PALETTE, css_variables

DENSE = 10


def plan_of(*neurons, kv_groups=3):
    layers = tuple(LayerPlan(tuple(range(count)), tuple(range(kv_groups))) for count in neurons)
    return PruningPlan("llama", (LayerWidths(DENSE, 3),) * len(neurons), layers)


@pytest.mark.parametrize(
    ("neurons", "removed", "title"),
    [
        ((10, 10, 4, 4, 10, 9), 0.2, "20 % of the parameters gone; most neurons from layers 2 to 3"),
        ((10, 10, 1, 10, 10, 9), None, "17 % of the neurons gone; most neurons from layer 2"),
        ((5, 6, 5, 6, 5, 6), 0.3, "30 % of the parameters gone; neurons from all over the layers"),
        ((10, 10), 0.1, "10 % of the parameters gone"),
    ],
)
def test_a_title_says_the_result(neurons, removed, title):
    assert describe_widths(plan_of(*neurons), removed) == title


def test_groups_are_named_where_no_neurons_went():
    plan = plan_of(10, 10, 10)
    one = LayerPlan(tuple(range(10)), (0,))
    plan = replace(plan, layers=(one, *plan.layers[1:]))
    assert describe_widths(plan) == "22 % of the KV groups gone; most KV groups from layer 0"
    assert widths_vary(plan.widths)
    assert not widths_vary(plan_of(5, 5, 5).widths)


def beside(axis):
    """Whether the legend begins at the right edge of the axis or beyond."""
    axis.figure.draw_without_rendering()
    return axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1


def test_widths():
    top, bottom = plot_widths(plan_of(10, 4, 7), "A $title_").axes
    assert top.get_title(loc="left") == "A $title_"
    assert beside(top)
    assert top.get_xlim() == (-0.5, 2.5)  # no wider than the layers
    colours = {to_hex(bar.get_facecolor()) for bar in top.patches}
    assert colours == {PALETTE["pruned"], PALETTE["removed"]}
    assert f"--hcp-pruned: {PALETTE['pruned']};" in css_variables()  # those of the Space
    for tick in (*bottom.get_yticks(), *bottom.get_xticks()):
        assert tick == int(tick)


def drawn_ends(axis):
    """The ends of the only interval in a picture."""
    (bars,) = axis.containers
    (line,) = bars.lines[2][0].get_segments()
    return [y for _, y in line]


def test_losses_are_in_per_cent_of_one_base():
    points = [PlotPoint("base: big", 200, 1.0, marker="*"), PlotPoint("small", 100, 1.1, (0.7, 1.5), (0.08, 0.13))]
    (axis,) = plot_losses({"a text": points}).axes
    assert axis.get_title(loc="left") == "At 50 % of the size, +10.0 % bits per byte\na text"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["base: big", "small"]
    assert beside(axis)
    assert [(line.get_xdata()[0], round(line.get_ydata()[0], 6)) for line in axis.lines[:2]] == [(100, 0), (50, 10)]
    assert drawn_ends(axis) == pytest.approx([8, 13])  # paired, and not those of the loss itself
    points.append(PlotPoint("base: other", 300, 0.9, marker="*"))
    (axis,) = plot_losses({"a text": points}).axes
    assert drawn_ends(axis) == pytest.approx([0.7, 1.5])
    assert axis.get_xlabel() == "parameters, millions"  # two bases have no per cent in common
    assert axis.get_title(loc="left") == "a text"


def test_the_matrix_shows_no_colours_where_nothing_is():
    changes = {("law", "law"): (0.01, None), ("law", "game"): (0.4, (0.3, 0.5))}
    changes |= {("game", "law"): (0.2, None), ("game", "game"): (-0.02, None)}
    axis, bar = plot_matrix(["law", "game"], changes).axes
    assert axis.get_title(loc="left") == "2 of 2 texts cost the model of their own domain least"
    assert bar.get_ylim() == (-2, 40)


def test_curves_say_what_general_text_buys():
    curves = {"law": [(0.0, 0.0, 0.3), (0.25, 0.02, 0.1)], "game": [(0.0, 0.0, 0.2), (0.25, 0.04, 0.1)]}
    (axis,) = plot_curves(curves, "general").axes
    assert axis.get_title(loc="left") == (
        "25 % general text in the calibration: -15.0 points on general text, +3.0 on the domain"
    )
    assert beside(axis)
