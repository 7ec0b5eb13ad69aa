"""Pictures, drawn without a window."""

from __future__ import annotations

from typing import Any

from .plan import PruningPlan


def new_figure(**options: Any) -> Any:  # noqa: ANN401 - matplotlib's, imported when it is needed
    """A figure with a canvas of its own: no pyplot, so no state and no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def widths_figure(plan: PruningPlan, title: str) -> Any:  # noqa: ANN401
    """Neurons and KV groups of every layer, before and after."""
    figure = new_figure(figsize=(8, 4.5))
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    layers = range(len(plan.dense))
    for axis, unit, label in ((axes[0], "neurons", "MLP neurons"), (axes[1], "kv_groups", "KV groups")):
        axis.bar(layers, [getattr(w, unit) for w in plan.dense], color="0.85", label="before")
        axis.bar(layers, [getattr(w, unit) for w in plan.widths], color="tab:blue", label="kept")
        axis.set_ylabel(label)
    axes[0].set_title(title, parse_math=False)
    axes[0].legend(loc="lower right")
    axes[1].set_xlabel("layer")
    return figure
