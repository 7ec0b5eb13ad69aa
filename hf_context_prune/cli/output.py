"""What the command line prints: data on stdout, messages on stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hf_context_prune.utils.distributed import on_main_process

from .options import OutputFormat
from .tables import report_table

if TYPE_CHECKING:
    from hf_context_prune.pipelines.result import PruneResult

errors = Console(stderr=True, highlight=False)


def out(text: str) -> None:
    """A line."""
    print(text)


def out_json(value: object) -> None:
    """A JSON document."""
    out(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def out_table(table: Table) -> None:
    """A table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width; don't fold figures at 80 columns
    console.print(table)


def save_and_show(result: PruneResult, output: Path, *, measure_memory: bool, format: OutputFormat) -> None:
    """Write the folder of a result, and show its figures."""
    folder = on_main_process(lambda: result.save_pretrained(output, measure_memory=measure_memory))
    if format is OutputFormat.quiet:
        out(str(folder))
    elif format is OutputFormat.json:
        out_json({"output": str(folder), "plan_sha256": result.plan.sha256, "report": result.report.to_dict()})
    else:
        out_table(report_table(result.report))
        size = result.report.size
        asked = "" if size.asked_ratio is None else f"asked {size.asked_ratio:.2%}, "
        out(f"Removed of all parameters: {asked}achieved {size.achieved_ratio:.2%}")
        out(f"Held-out text: {result.report.dataset.held_out}")
        for note in result.report.notes:
            out(note)
        how = (
            "opens with plain transformers"
            if result.native_fit.fits
            else "opens with this package or trust_remote_code"
        )
        out(f"Wrote {folder} ({how})")
