"""Output of the command line: data on stdout, messages on stderr."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_context_prune.utils.files import resolve_path

from .options import OutputFormat
from .tables import plain_table, report_table

if TYPE_CHECKING:
    from hf_context_prune import EvalReport
    from hf_context_prune.pipelines.result import PruneResult

NextSteps = Sequence[tuple[str, str]]
"""Names of lines, and the lines; such as a purpose and its command."""

errors = Console(stderr=True, highlight=False)


def show_error(text: str, console: Console = errors) -> None:
    """Show an error, on stderr unless a conversation has a console of its own; the text has no markup."""
    console.print(f"[red]Error:[/] {escape(text)}", soft_wrap=True)


def out(text: str) -> None:
    """Print a line."""
    print(text, flush=True)  # whoever reads a pipe sees each answer of `chat` when it is there


def mark(holds: bool) -> str:
    """Return a tick or a cross, in letters where the output has no such signs."""
    tick, cross = "✓", "✗"
    try:
        (tick + cross).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        tick, cross = "ok:", "no:"
    return tick if holds else cross


def out_json(value: object) -> None:
    """Print a JSON document."""
    out(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def out_table(table: Table) -> None:
    """Print a table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width; don't fold numbers at 80 columns
    console.print(table)


def show_report(report: EvalReport, *, verbose: bool = False) -> None:
    """Show a report: its four numbers in words, then its table, in the end what a reader of it must know."""
    from hf_context_prune.evaluation.reports.rows import source_tables
    from hf_context_prune.evaluation.reports.summary import headline, legend

    for line in headline(report):
        out(line)
    out_table(report_table(report, verbose=verbose))
    if verbose:
        for title, rows in source_tables(report):
            out(f"{title}:")
            out_table(plain_table(rows[0], rows[1:]))
        for line in legend(report):
            out(line)
        out(f"Test text: {report.dataset.held_out}")
    for note in report.notes:
        out(note)


def show_result(
    result: PruneResult, output: Path, format: OutputFormat, *, verbose: bool = False, steps: NextSteps = ()
) -> None:
    """Show the numbers of a result that was saved to a folder, where it opens, and the commands to go on with."""
    folder = resolve_path(output)
    if format is OutputFormat.quiet:
        out(str(folder))
    elif format is OutputFormat.json:
        out_json({"output": str(folder), "plan_sha256": result.plan.sha256, "report": result.report.to_dict()})
    else:
        show_report(result.report, verbose=verbose)
        out(f"Wrote {folder}")
        show_lines(f"{output} opens in:", [(one.name, one.how) for one in result.opens_in(output)])
        show_lines("To go on:", steps)


def next_steps(output: Path, *between: tuple[str, str]) -> NextSteps:
    """Return the commands to go on with, from talking to a folder to publishing it.

    Args:
        output: The folder, as the user named it.
        between: What may come between the two.
    """
    folder = shlex.quote(str(output))
    talk, publish = f"hf-context-prune chat {folder}", f"hf-context-prune push {folder} OWNER/NAME"
    return (("Talk to it", talk), *between, ("Publish it", publish))


def show_lines(title: str, lines: NextSteps) -> None:
    """Show lines with their names, below a title; nothing where there are none."""
    if lines:
        out(title)
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            out(f"  {name.ljust(width)}  {text}")
