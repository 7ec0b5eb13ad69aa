"""Output of the command line: data on stdout, messages on stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hf_context_prune.utils.files import resolve_path

from .options import OutputFormat
from .tables import report_table

if TYPE_CHECKING:
    from hf_context_prune.pipelines.result import PruneResult

errors = Console(stderr=True, highlight=False)


def out(text: str) -> None:
    """Print a line."""
    print(text, flush=True)  # whoever reads a pipe sees each answer of `chat` when it is there


def out_json(value: object) -> None:
    """Print a JSON document."""
    out(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def out_table(table: Table) -> None:
    """Print a table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width; don't fold numbers at 80 columns
    console.print(table)


def show_result(result: PruneResult, output: Path, format: OutputFormat) -> None:
    """Show the numbers of a result that was saved to a folder."""
    folder = resolve_path(output)
    if format is OutputFormat.quiet:
        out(str(folder))
    elif format is OutputFormat.json:
        out_json({"output": str(folder), "plan_sha256": result.plan.sha256, "report": result.report.to_dict()})
    else:
        out_table(report_table(result.report))
        size = result.report.size
        asked = "" if size.asked_ratio is None else f"asked {size.asked_ratio:.2%}, "
        out(f"Parameters removed: {asked}achieved {size.achieved_ratio:.2%}")
        out(f"Test text: {result.report.dataset.held_out}")
        for note in result.report.notes:
            out(note)
        how = (
            "opens with plain transformers"
            if result.native_fit.fits
            else "opens with this package or trust_remote_code"
        )
        out(f"Wrote {folder} ({how})")
