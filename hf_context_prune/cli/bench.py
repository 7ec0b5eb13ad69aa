"""``hf-context-prune bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_context_prune.utils.distributed import on_main_process
from hf_context_prune.utils.file_names import REPORT_NAME
from hf_context_prune.utils.locks import reserves
from hf_context_prune.utils.options import EVALUATION

from .options import (
    MODEL_HELP,
    DeviceOption,
    Dtype,
    DtypeOption,
    FormatOption,
    OutputFormat,
    ReportFolder,
    shared,
)
from .output import out, out_json, out_table
from .tables import run_tables


@reserves("output")
def bench(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model. " + MODEL_HELP)],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The pruned model, in the same forms.")],
    new_tokens: Annotated[int, shared("Tokens to decode.", EVALUATION, min=1)] = 32,
    repeats: Annotated[
        int,
        shared(
            "Rounds of prefill and decoding; models are loaded in fresh processes at most 3 times.", EVALUATION, min=1
        ),
    ] = 5,
    output: ReportFolder = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Measure BASE and MODEL in turns: load time, prefill, decoding, peak memory, bytes on disk."""
    from hf_context_prune.evaluation.reports.files import check_report_folder, save_report
    from hf_context_prune.pipelines.bench import bench as run

    if output is not None:
        check_report_folder(output, "bench")
    report = on_main_process(
        lambda: run(base, model, new_tokens=new_tokens, repeats=repeats, dtype=dtype.value, device=device)
    )
    if output is not None:
        save_report(report, output)
    if format is OutputFormat.json:
        out_json(report.to_dict())
    elif format is OutputFormat.quiet:
        out("\n".join("\t".join(row) for row in report.tables[0].rows))
    else:
        for table in run_tables(report):
            out_table(table)
        if output is not None:
            out(f"Wrote {output / REPORT_NAME}")
