"""Views and facts as parts of the page: HTML, text, tables and charts."""

from __future__ import annotations

from typing import Any

from .compare import Side, View
from .facts import Facts, describe_removal, report_rows
from .html import render


def status_html(view: View) -> str:
    """Return the line of the status."""
    return render("status", text=view.status, bad=view.refused)


def side_html(side: Side) -> str:
    """Return the figures of one model: speed, first token, weights, tokens written."""
    progress = side.progress
    speed, first = progress.tokens_per_second, progress.first_seconds
    return render(
        "side",
        kind=side.kind,
        name=side.name,
        speed="–" if speed is None else f"{speed:.1f}",
        first="–" if first is None else f"{first:.2f} s",
        megabytes="–" if side.megabytes is None else f"{side.megabytes:,.0f} MB",
        tokens=f"{progress.tokens:,}" if progress.tokens else "–",
    )


def side_text(side: Side) -> str:
    """Return the text of one model, or the reason why it can't write."""
    return f"This model can't write: {side.problem}" if side.problem else side.progress.text.lstrip()


def side_values(side: Side) -> dict[str, Any]:
    """Return one model's progress as JSON values, for programs."""
    progress = side.progress
    return {
        "model": side.name,
        "text": progress.text,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens_per_second,
        "first_token_seconds": progress.first_seconds,
        "megabytes": side.megabytes,
        "stopped": progress.stopped,
        "problem": side.problem,
    }


def removed_html(facts: Facts) -> str:
    """Return the tab on the removed parts."""
    return render(
        "removed",
        problems=facts.problems,
        sentences=describe_removal(facts),
        rows=report_rows(facts.report),
        notes=facts.report.notes if facts.report else (),
    )


def table_html(content: tuple[list[str], list[list[str]]], caption: str, empty: str) -> str:
    """Return a table with its caption; `empty` stands for a table without rows."""
    header, rows = content
    return render("table", header=header, rows=rows, caption=caption, empty=empty)


def width_chart(gr: Any, facts: Facts, unit: str) -> Any:  # noqa: ANN401 - gradio, and its BarPlot
    """Return the chart of the kept and removed units of every layer.

    Args:
        gr: The package gradio.
        facts: The facts of a pruned model.
        unit: ``"neurons"`` or ``"kv_groups"``.
    """
    return gr.BarPlot(
        _widths_frame(facts, unit),
        x="layer",
        y=unit,
        color="what",
        color_map={"kept": "#0d9488", "removed": "#cbd5e1"},
        title={"neurons": "MLP neurons, layer by layer", "kv_groups": "KV groups (attention), layer by layer"}[unit],
        x_title="layer",
        y_title="neurons" if unit == "neurons" else "groups",
        color_title=" ",
        height=260 if unit == "neurons" else 200,
        x_bin=1,
        x_axis_format="d",
        y_aggregate="sum",
        colors_in_legend=["kept", "removed"],
        elem_id=f"widths-{unit}",
        buttons=["fullscreen"],
    )


def _widths_frame(facts: Facts, unit: str) -> Any:  # noqa: ANN401 - a DataFrame; pandas comes with gradio
    import pandas as pd

    rows = []
    if facts.plan is not None:
        for layer, (dense, kept) in enumerate(zip(facts.plan.dense, facts.plan.widths, strict=True)):
            before, left = getattr(dense, unit), getattr(kept, unit)
            rows += [(layer, before - left, "removed"), (layer, left, "kept")]  # stacked from the last one up
        rows.append((len(facts.plan.dense), 0, "kept"))  # the last bin is closed: without this it holds two layers
    return pd.DataFrame(rows, columns=["layer", unit, "what"])
