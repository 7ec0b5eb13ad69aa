"""Pictures, drawn without a window."""

from __future__ import annotations

from typing import Any

from .plan import PruningPlan


def new_figure(**options: Any) -> Any:  # noqa: ANN401 - matplotlib's, imported when it is needed
    """A figure with a canvas of its own: no pyplot, so no state and no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def widths_figure(plan: PruningPlan, title: str) -> Any:  # noqa: ANN401
    """Neurons and KV groups of every layer, before and after."""
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
