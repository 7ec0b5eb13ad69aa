"""Tables for the terminal, from the facts; printing them is the command line's business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from .evaluation import EvalReport
    from .evaluation.bench import Bench
    from .export import ExportReport
    from .matrix_facts import DomainMatrix
    from .modeling.specs import LayerWidths
    from .sweep import Sweep


def report_table(report: EvalReport) -> Table:
    """Base against pruned, or one model alone."""
    single = report.size.pruned_parameters is None
    table = Table(title=escape(report.base_model), title_justify="left")
    for index, name in enumerate(("measure", "value") if single else ("measure", "base", "pruned", "change")):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in report.table_rows():
        table.add_row(*(escape(cell) for cell in row))
    return table


def bench_table(bench: Bench) -> Table:
    """Speed, memory and disk of two models."""
    table = Table(title="Base and pruned, in turns", title_justify="left")
    for index, name in enumerate(("measure", "base", "pruned", "pruned / base")):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in bench.table_rows():
        table.add_row(*(escape(cell) for cell in row))
    return table


def sweep_table(sweep: Sweep) -> Table:
    """The paper's grid."""
    table = Table(title=escape(sweep.name), title_justify="left")
    for name in sweep.header:
        table.add_column(name, justify="right")
    for row in sweep.table_rows():
        table.add_row(*row)
    return table


def matrix_tables(matrix: DomainMatrix) -> list[Table]:
    """Losses, whether the context matters, and accuracies, of those that were measured."""
    parts: list[tuple[str, Sequence[str], Sequence[tuple[str, ...]]]] = [
        ("Bits a byte", ("calibrated on", "parameters", *matrix.domains), matrix.loss_rows()),
        (
            f"Own domain against {matrix.reference}: change of the bits a byte",
            ("domain", "on its own text", f"on {matrix.reference} text"),
            matrix.context_rows(),
        ),
        ("Accuracy, all sources (*: not clear of guessing)", ("calibrated on", *matrix.asked), matrix.accuracy_rows()),
        ("Accuracy by source", matrix.source_header, matrix.source_rows()),
    ]
    tables = []
    for title, header, rows in parts:
        if not rows:
            continue
        table = Table(title=escape(title), title_justify="left")
        for index, name in enumerate(header):
            table.add_column(escape(name), justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        tables.append(table)
    return tables


def export_table(report: ExportReport) -> Table:
    """An export beside the folder it was made from."""
    versions = ", ".join(f"{name} {version}" for name, version in report.packages.items())
    title = f"{report.source} as {report.format}, {report.weights} ({versions})"
    table = Table(title=escape(title), title_justify="left")
    for index, name in enumerate(("measure", "folder", "export", "change")):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in report.table_rows():
        table.add_row(*(escape(cell) for cell in row))
    return table


def widths_table(dense: tuple[LayerWidths, ...], widths: tuple[LayerWidths, ...]) -> Table:
    """Sizes before and after, layer by layer."""
    table = Table(title="Widths by layer", title_justify="left")
    for name in ("layer", "MLP neurons", "kept", "KV groups", "kept"):
        table.add_column(name, justify="right")
    for index, (a, b) in enumerate(zip(dense, widths, strict=True)):
        table.add_row(*map(str, (index, a.neurons, b.neurons, a.kv_groups, b.kv_groups)))
    return table
