"""Tables for the terminal, made from reports and plans."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from hf_context_prune.evaluation.reports.report import EvalReport
    from hf_context_prune.evaluation.reports.run_report import RunReport
    from hf_context_prune.export.report import ExportReport
    from hf_context_prune.modeling.geometry import LayerWidths


def report_table(report: EvalReport, *, verbose: bool = False) -> Table:
    """Return the table of an evaluation: base against pruned, or one model alone; with intervals if verbose."""
    from hf_context_prune.evaluation.reports.rows import table_header, table_rows

    return plain_table(table_header(report), table_rows(report, intervals=verbose))


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of text: the first column to the left, the others to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def run_tables(report: RunReport) -> list[Table]:
    """Return the tables of a run."""
    tables = []
    for one in report.tables:
        table = Table(title=escape(one.title), caption=escape(one.caption) or None, title_justify="left")
        table.caption_justify = "left"
        for index, name in enumerate(one.header):
            table.add_column(escape(name), justify="left" if index == 0 else "right")
        for row in one.rows:
            table.add_row(*map(escape, row))
        tables.append(table)
    return tables


def export_table(report: ExportReport) -> Table:
    """Return the table of an export beside the folder that it was made from."""
    versions = ", ".join(f"{name} {version}" for name, version in report.packages.items())
    title = f"{report.source} as {report.format}, {report.weights} ({versions})"
    table = Table(title=escape(title), title_justify="left")
    for index, name in enumerate(("measure", "folder", "export", "change")):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in report.table_rows():
        table.add_row(*(escape(cell) for cell in row))
    return table


_UNITS = {"neurons": "MLP neurons", "kv_groups": "KV groups", "experts": "experts"}


def inside_experts_line(neurons: tuple[int, int], shared: tuple[int, int]) -> str:
    """Return a line on the neurons that stay inside experts.

    Args:
        neurons: Those of every expert that stay, and how many there are.
        shared: The same of a shared expert; (0, 0) where there is none.
    """
    beside = f", and {shared[0]:,} of {shared[1]:,} of the shared one" if shared[1] else ""
    return f"Inside experts: {neurons[0]:,} of {neurons[1]:,} neurons of every expert stay{beside}"


def widths_table(dense: tuple[LayerWidths, ...], widths: tuple[LayerWidths, ...]) -> Table:
    """Return the sizes before and after pruning; a row for each run of equal layers."""
    table = Table(title="Widths by layer", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    units = [unit for unit in _UNITS if any(getattr(layer, unit) for layer in dense)]
    for name in ("layers", *(heading for unit in units for heading in (_UNITS[unit], "kept"))):
        table.add_column(name, justify="right")
    first = 0
    for (a, b), run in groupby(zip(dense, widths, strict=True)):
        last = first + len(list(run)) - 1
        layers = str(first) if first == last else f"{first} to {last}"
        counts = [(getattr(a, unit), "gone" if b.gone else str(getattr(b, unit))) for unit in units]
        table.add_row(layers, *(text if before else "-" for before, kept in counts for text in (str(before), kept)))
        first = last + 1
    return table
