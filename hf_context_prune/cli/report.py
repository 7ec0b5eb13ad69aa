"""``hf-context-prune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_context_prune.utils.locks import reserves

from .options import FormatOption, OutputFormat, shared
from .output import out, out_json, out_table
from .tables import plain_table, report_table, run_tables


@reserves("output")
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Pruned models, and folders of evaluate, bench, cross-domain and paper-grid (their --output).",
        ),
    ],
    output: Annotated[
        Path | None, shared("Folder for report.md and its pictures (widths, loss against size, matrix of domains).")
    ] = None,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Show the results of runs, and write them as Markdown with pictures."""
    from hf_context_prune.evaluation.reports.rendering import (
        SIDE_BY_SIDE,
        read_folders,
        render,
        render_markdown,
        side_by_side,
    )
    from hf_context_prune.evaluation.reports.run_report import RunReport

    found = read_folders(folders)
    written = None if output is None else render(found, output)
    if format is OutputFormat.json:
        out_json({folder.name: folder.report.to_dict() for folder in found})
        return
    if format is OutputFormat.quiet:
        out(render_markdown(found) if written is None else str(written))
        return
    if rows := side_by_side(found):
        out_table(plain_table(SIDE_BY_SIDE, rows))
    for folder in found:
        out(folder.name)
        one = folder.report
        for table in run_tables(one) if isinstance(one, RunReport) else [report_table(one)]:
            out_table(table)
    if written is not None:
        out(f"Wrote {written}")
