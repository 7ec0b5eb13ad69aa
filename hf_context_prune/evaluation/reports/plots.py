"""Pictures of reports, drawn without a window, in the colours of the Space."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_context_prune.errors import SaveError
from hf_context_prune.modeling.geometry import units_of
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.utils.palette import PALETTE, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLE_LETTERS = 90
_UNIT_LABELS = {"neurons": "MLP neurons", "kv_groups": "KV groups", "experts": "experts"}


@dataclass(frozen=True)
class PlotPoint:
    """A loss with its interval, as drawn.

    Attributes:
        label: Name in the legend; points with the same label share a line of it.
        x: Position on the horizontal axis.
        y: The loss.
        interval: Interval of the loss.
        change: Interval of its relative change against the base, paired by document.
        marker: Marker of matplotlib; ``"*"`` is a base.
    """

    label: str
    x: float
    y: float
    interval: tuple[float, float] | None = None
    change: tuple[float, float] | None = None
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


def png_of(figure: Figure, dpi: int = 120) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


def style_axis(axis: Axes, title: str = "") -> None:
    """Give an axis the one look of all pictures: a quiet grid, no frame, the title at the left, no wider than it."""
    title = "\n".join(textwrap.shorten(line, _TITLE_LETTERS, placeholder=" ...") for line in title.splitlines())
    axis.set_title(title, loc="left", fontsize="medium", fontweight="bold", color=PALETTE["ink"], parse_math=False)
    axis.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(PALETTE["dense"])
    axis.tick_params(colors=PALETTE["muted"])
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(PALETTE["ink"])


def _legend_beside(axis: Axes) -> None:
    """Draw a legend at the right of the axis, clear of what is drawn; its names are not read as formulas."""
    legend = axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False, fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)


def describe_widths(plan: PruningPlan, removed: float | None = None) -> str:
    """Return a title that says the result, as "20 % of the parameters gone; most neurons from layers 12 to 20".

    Args:
        plan: The plan.
        removed: Share of all parameters that was removed; None where it is not known.
    """
    gone = {
        unit: [getattr(d, unit) - getattr(w, unit) for d, w in zip(plan.dense, plan.widths, strict=True)]
        for unit in units_of(plan.dense)
    }
    named = {"neurons": "neurons", "kv_groups": "KV groups", "experts": "experts"}
    unit = next((one for one in gone if any(gone[one])), next(iter(gone)))
    name = named[unit]
    lost, total = gone[unit], sum(getattr(widths, unit) for widths in plan.dense)
    share = f"{100 * sum(lost) / total:.0f} % of the {name} gone" if removed is None else ""
    start = share or f"{100 * (removed or 0.0):.0f} % of the parameters gone"
    if not any(lost):
        return start
    first, last = _shortest_half(lost)
    if last - first + 1 > 0.4 * len(lost):  # more than half from half of the layers says little
        return f"{start}; {name} from all over the layers"
    where = f"layer {first}" if first == last else f"layers {first} to {last}"
    return f"{start}; most {name} from {where}"


def _shortest_half(lost: Sequence[int]) -> tuple[int, int]:
    """Return the first and last layer of the shortest stretch that holds more than half of what was removed."""
    for length in range(1, len(lost) + 1):
        first = max(range(len(lost) - length + 1), key=lambda at: sum(lost[at : at + length]))
        if 2 * sum(lost[first : first + length]) > sum(lost):
            return first, first + length - 1
    return 0, len(lost) - 1


def plot_widths(plan: PruningPlan, title: str) -> Figure:
    """Draw the neurons and KV groups of every layer, kept and removed."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.1, right=0.86, top=0.92, bottom=0.11)  # a fitted layout takes twice as long
    units = units_of(plan.dense)
    axes = figure.subplots(len(units), 1, sharex=True, squeeze=False, height_ratios=(3, 1, 1)[: len(units)])[:, 0]
    shown = [(axis, unit, _UNIT_LABELS[unit]) for axis, unit in zip(axes, units, strict=True)]
    layers = range(len(plan.dense))
    for axis, unit, label in shown:
        before, kept = ([getattr(widths, unit) for widths in which] for which in (plan.dense, plan.widths))
        removed = [all_ - left for all_, left in zip(before, kept, strict=True)]
        axis.bar(layers, kept, width=0.9, color=PALETTE["pruned"], label="kept")
        axis.bar(layers, removed, width=0.9, bottom=kept, color=PALETTE["removed"], label="removed")
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.02 * max(before))
        axis.yaxis.set_major_locator(MaxNLocator(nbins=6 if unit == "neurons" else min(4, max(before)), integer=True))
        style_axis(axis, title if unit == "neurons" else "")
    axes[0].set_xlim(-0.5, len(plan.dense) - 0.5)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=15, integer=True))
    axes[-1].set_xlabel("layer", color=PALETTE["ink"])
    _legend_beside(axes[0])
    return figure


def plot_losses(panels: Mapping[str, Sequence[PlotPoint]]) -> Figure:
    """Draw losses against sizes, one panel per text, since losses on different texts can't be compared.

    With one base in a panel, both axes are in per cent of it; else they are parameters and bits per byte.

    Args:
        panels: By the name of the text, points of (millions of parameters, bits per byte).
    """
    figure = new_figure(figsize=(8.5, 0.8 + 3.7 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (text, points) in zip(axes, panels.items(), strict=True):
        bases = [point for point in points if point.marker == "*"]
        base = bases[0] if len(bases) == 1 else None
        shown = [_against(point, base) for point in points]
        colours: dict[str, str] = {}
        for point in shown:
            if point.marker == "*":
                axis.plot(point.x, point.y, "*", color=PALETTE["ink"], markersize=12, label=point.label, linestyle="")
                continue
            colour = colours.setdefault(point.label, SERIES[len(colours) % len(SERIES)])
            low, high = point.interval or (point.y, point.y)
            axis.errorbar(
                point.x,
                point.y,
                yerr=[[max(0.0, point.y - low)], [max(0.0, high - point.y)]],
                fmt=point.marker,
                color=colour,
                capsize=3,
                label=point.label,
            )
        result = _describe_losses(shown) if base is not None else ""
        style_axis(axis, "\n".join(line for line in (result, text) if line))
        axis.set_ylabel("bits per byte" if base is None else "bits per byte, change in per cent")
        axis.set_xlabel("parameters, millions" if base is None else "parameters, per cent of the base")
        _legend_beside(axis)
    return figure


def _against(point: PlotPoint, base: PlotPoint | None) -> PlotPoint:
    """Return a point in per cent of a base: its size, and the change of its loss with the paired interval."""
    if base is None:
        return point
    interval = None if point.change is None else (100 * point.change[0], 100 * point.change[1])
    return replace(point, x=100 * point.x / base.x, y=100 * (point.y / base.y - 1), interval=interval)


def _describe_losses(points: Sequence[PlotPoint]) -> str:
    pruned = [point for point in points if point.marker != "*"]
    if not pruned:
        return ""
    sizes, losses = ((min(values), max(values)) for values in zip(*((p.x, p.y) for p in pruned), strict=True))
    size = " to ".join(dict.fromkeys(f"{value:.0f}" for value in sizes))
    loss = " to ".join(dict.fromkeys(f"{value:+.1f}" for value in losses))
    return f"At {size} % of the size, {loss} % bits per byte"


def plot_matrix(
    names: Sequence[str], changes: Mapping[tuple[str, str], tuple[float, tuple[float, float] | None]]
) -> Figure:
    """Draw the domain matrix as a heat map.

    Args:
        names: Domains, in order.
        changes: Change of the bits per byte against the base and its interval, by (calibrated on, measured on).
    """
    from matplotlib.colors import LinearSegmentedColormap

    side = 2.0 + 0.9 * len(names)
    figure = new_figure(figsize=(side + 1.5, side), layout="constrained")
    axis = figure.subplots()
    values = [[100 * changes[row, column][0] for column in names] for row in names]
    every = [value for line in values for value in line]
    most = max(1e-9, *(abs(value) for value in every))
    scale = LinearSegmentedColormap.from_list("change", (PALETTE["pruned"], "#ffffff", PALETTE["problem"]))
    image = axis.imshow(values, cmap=scale, vmin=-most, vmax=most)  # white: as the base
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "white" if abs(value) > 0.6 * most else PALETTE["ink"]
            style: dict[str, Any] = {"ha": "center", "color": colour}
            interval = changes[names[row], names[column]][1]
            axis.text(column, row, f"{value:+.1f} %", va="bottom" if interval else "center", **style)
            if interval:
                shown = ", ".join(f"{100 * end:+.1f}" for end in interval)
                axis.text(column, row, f"[{shown}]", va="top", fontsize="x-small", **style)
    own = sum(values[at][at] == min(line[at] for line in values) for at in range(len(names)))
    style_axis(axis, f"{own} of {len(names)} texts cost the model of their own domain least")
    axis.grid(visible=False)
    axis.set_xticks(range(len(names)), names, parse_math=False)
    axis.set_yticks(range(len(names)), names, parse_math=False)
    axis.set_xlabel("measured on")
    axis.set_ylabel("calibrated on")
    bar = figure.colorbar(image, ax=axis, shrink=0.8, label="bits per byte against the base, per cent")
    bar.ax.set_ylim(min(0.0, *every), max(1e-9, *every))  # no colours where nothing is
    return figure


def plot_curves(curves: Mapping[str, Sequence[tuple[float, float, float]]], reference: str) -> Figure:
    """Draw what general text in the calibration changes, one line per domain, from its own text alone to general text.

    Args:
        curves: (share of general text, change on the domain's text, change on general text), in order, by domain.
        reference: Name of the domain of general text.
    """
    figure = new_figure(figsize=(8.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        own, general = [100 * point[1] for point in points], [100 * point[2] for point in points]
        axis.plot(own, general, "o-", color=SERIES[number % len(SERIES)], label=name)
        for (share, *_), x, y in zip(points, own, general, strict=True):
            axis.annotate(f"{100 * share:g} %", (x, y), textcoords="offset points", xytext=(5, 5), fontsize="small")
    axis.set_xlabel("bits per byte on the domain's text, change in per cent")
    axis.set_ylabel(f"on {reference} text, change in per cent", parse_math=False)
    axis.margins(0.1)  # room for the labels
    style_axis(axis, _describe_curves(curves, reference))
    axis.grid(axis="x", color=PALETTE["grid"], linewidth=0.8)
    _legend_beside(axis)
    return figure


def _describe_curves(curves: Mapping[str, Sequence[tuple[float, float, float]]], reference: str) -> str:
    """Return what the largest share of general text changes, in percentage points, as the mean of the domains."""
    ends = [(points[0], points[-1]) for points in curves.values() if len(points) > 1]
    if not ends:
        return f"Share of {reference} text in the calibration"
    own, general = (100 * sum(last[at] - first[at] for first, last in ends) / len(ends) for at in (1, 2))
    most = max(100 * last[0] for _, last in ends)
    return (
        f"{most:g} % {reference} text in the calibration: {general:+.1f} points on {reference} text, {own:+.1f} on the "
        f"domain"
    )
