"""``hf-context-prune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_output import out, out_table
from .tables import report_table


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Pruned folders that this tool wrote.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.md and its pictures (widths, loss against size).")
    ] = None,
) -> None:
    """Show the figures of pruned folders, and write them as Markdown with pictures."""
    from .rendering import read_folder, render

    found = [read_folder(folder) for folder in folders]
    for folder in found:
        out(folder.name)
        out_table(report_table(folder.report))
    if output is not None:
        out(f"Wrote {render(found, output)}")
