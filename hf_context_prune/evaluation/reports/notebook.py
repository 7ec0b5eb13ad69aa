"""A report as HTML, for notebooks."""

from __future__ import annotations

import base64
from html import escape

from hf_context_prune.modeling.depth import WARNING, describe_layers
from hf_context_prune.modeling.geometry import widths_vary
from hf_context_prune.modeling.plan import PruningPlan

from .plots import describe_widths, plot_widths, png_of
from .report import EvalReport
from .rows import table_header, table_rows
from .summary import headline


def result_html(report: EvalReport, plan: PruningPlan) -> str:
    """Return size, speed and losses as sentences and a table, and a picture of the widths where they differ.

    Args:
        report: The figures.
        plan: The widths.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in table_header(report))
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table_rows(report, intervals=True)
    )
    layers = describe_layers(plan)
    lines = [*headline(report), *([] if layers is None else [f"{layers} {WARNING}"])]
    words = "".join(f"<p>{escape(line)}</p>" for line in lines)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div><p><b>{escape(report.base_model)}, pruned</b></p>{words}{table}{_widths(plan)}</div>"


def _widths(plan: PruningPlan) -> str:
    if not widths_vary(plan.widths):
        return ""
    data = base64.b64encode(png_of(plot_widths(plan, describe_widths(plan)), dpi=80)).decode()
    return f'<img alt="Neurons and KV groups of every layer, before and after" src="data:image/png;base64,{data}">'
