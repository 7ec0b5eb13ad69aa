"""Pictures of reports, drawn without a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_context_prune.errors import SaveError
from hf_context_prune.modeling.plan import PruningPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PlotPoint:
    """A loss with its interval, as drawn.

    Attributes:
        label: Name in the legend; points with the same label share a line of it.
        x: Position on the horizontal axis.
        y: The loss.
        interval: Interval of the loss.
        marker: Marker of matplotlib; ``"*"`` is a base, which is not in the legend.
    """

    label: str
    x: float
    y: float
    interval: tuple[float, float] | None = None
    marker: str = "o"


def new_figure(**options: Any) -> Figure:  # noqa: ANN401 - those of matplotlib's Figure
    """Return a figure with its own canvas: without pyplot there is no global state and no window.

    Raises:
        SaveError: matplotlib has no folder to keep its list of fonts in.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except OSError as error:
        raise SaveError(f"Pictures can't be drawn: {error} with free space.") from error

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def plot_widths(plan: PruningPlan, title: str) -> Figure:
    """Draw the neurons and KV groups of every layer, before and after pruning."""
    figure = new_figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.1, right=0.98, top=0.92, bottom=0.11)  # a fitted layout takes twice as long
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = [layer - 0.5 for layer in range(len(plan.dense) + 1)]
    for axis, unit, label in ((axes[0], "neurons", "MLP neurons"), (axes[1], "kv_groups", "KV groups")):
        before, kept = ([getattr(widths, unit) for widths in which] for which in (plan.dense, plan.widths))
        axis.stairs(before, edges, fill=True, color="0.85", label="before")
        axis.stairs(kept, edges, fill=True, color="tab:blue", label="kept")
        axis.set_ylabel(label)
    axes[0].set_title(title, parse_math=False)
    axes[0].legend(loc="lower right")
    axes[1].set_xlabel("layer")
    return figure


def _plain_legend(axis: Axes) -> None:
    """Draw a legend whose names are not read as formulas."""
    for text in axis.legend(fontsize="small").get_texts():
        text.set_parse_math(False)


def plot_losses(panels: Mapping[str, Sequence[PlotPoint]], xlabel: str, ylabel: str) -> Figure:
    """Draw losses, one panel per text, since losses on different texts can't be compared."""
    figure = new_figure(figsize=(7, 0.8 + 3.7 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for point in points:
            if point.marker == "*":
                axis.plot(point.x, point.y, "*", color="0.4", markersize=11)
                continue
            low, high = point.interval or (point.y, point.y)
            axis.errorbar(
                point.x,
                point.y,
                yerr=[[max(0.0, point.y - low)], [max(0.0, high - point.y)]],
                fmt=point.marker,
                capsize=3,
                label=point.label,
            )
        axis.set_title(title, parse_math=False, fontsize="medium")
        axis.set_ylabel(ylabel)
        if axis.get_legend_handles_labels()[1]:
            _plain_legend(axis)
    axes[-1].set_xlabel(xlabel)
    return figure


def plot_matrix(
    names: Sequence[str], changes: Mapping[tuple[str, str], tuple[float, tuple[float, float] | None]]
) -> Figure:
    """Draw the domain matrix as a heat map.

    Args:
        names: Domains, in order.
        changes: Change of the bits per byte against the base and its interval, by (calibrated on, measured on).
    """
    side = 2.5 + 0.9 * len(names)
    figure = new_figure(figsize=(side + 1.5, side))
    axis = figure.subplots()
    values = [[100 * changes[row, column][0] for column in names] for row in names]
    most = max(1e-9, *(abs(value) for line in values for value in line))
    image = axis.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most)  # white: as the base
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "white" if abs(value) > 0.6 * most else "black"
            style: dict[str, Any] = {"ha": "center", "color": colour}
            interval = changes[names[row], names[column]][1]
            axis.text(column, row, f"{value:+.1f} %", va="bottom" if interval else "center", **style)
            if interval:
                shown = ", ".join(f"{100 * end:+.1f}" for end in interval)
                axis.text(column, row, f"[{shown}]", va="top", fontsize="x-small", **style)
    axis.set_xticks(range(len(names)), names, parse_math=False)
    axis.set_yticks(range(len(names)), names, parse_math=False)
    axis.set_xlabel("measured on")
    axis.set_ylabel("calibrated on")
    axis.set_title("Bits per byte against the base, 95 % intervals")
    figure.colorbar(image, ax=axis, shrink=0.8, label="per cent")
    return figure


def plot_curves(curves: Mapping[str, Sequence[tuple[float, float, float]]], reference: str) -> Figure:
    """Draw what general text in the calibration changes, one line per domain, from its own text alone to general text.

    Args:
        curves: (share of general text, change on the domain's text, change on general text), in order, by domain.
        reference: Name of the domain of general text.
    """
    figure = new_figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        own, general = [100 * point[1] for point in points], [100 * point[2] for point in points]
        axis.plot(own, general, "o-", label=name)
        for (share, *_), x, y in zip(points, own, general, strict=True):
            axis.annotate(f"{100 * share:g} %", (x, y), textcoords="offset points", xytext=(5, 5), fontsize="small")
    axis.set_xlabel("bits per byte on the domain's text, change in per cent")
    axis.set_ylabel(f"on {reference} text, change in per cent", parse_math=False)
    axis.margins(0.1)  # room for the labels
    axis.set_title(f"Share of {reference} text in the calibration", parse_math=False)
    axis.grid(alpha=0.3)
    _plain_legend(axis)
    return figure
