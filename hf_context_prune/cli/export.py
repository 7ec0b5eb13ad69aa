"""``hf-context-prune export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import DATA_HELP, OutputFormat, TextColumn
from .output import out, out_json, out_table
from .tables import export_table

if TYPE_CHECKING:
    from hf_context_prune.export.report import ExportReport


def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A pruned folder (or any model folder, or Hub id).")],
    to: Annotated[str, typer.Option("--format", help="quanto, torchao, onnx or gguf.")],
    output: Annotated[Path, typer.Option(help="Folder to write; an older one of ours is replaced.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="quanto: int8, int4; torchao: int8; onnx: float32, int8; gguf: f16, bf16, q8_0. Default: the first."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Held-out text to compare on; by default text that the model itself writes. " + DATA_HELP),
    ] = None,
    text_column: TextColumn = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of --data to compare on at most.")] = 2000,
    tolerance: Annotated[
        float | None, typer.Option(help="Relative difference of the perplexity to allow, instead of the format's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the text to compare on.")] = 0,
    show: Annotated[
        OutputFormat,
        typer.Option("--show", help="auto: a table; json: everything, for programs; quiet: only the folder."),
    ] = OutputFormat.auto,
) -> None:
    """Write DIR for another runtime, and keep it only if it says there what DIR says.

    The artefact is loaded by the other runtime and compared with DIR on held-out text: loss, greedy text, size, speed.
    `inspect` verifies and shows it later.
    """
    from hf_context_prune.export.run import export_model

    result = export_model(
        folder,
        output,
        format=to,
        weights=weights,
        data=data,
        text_column=text_column,
        max_tokens=max_tokens,
        tolerance=tolerance,
        seed=seed,
    )
    if show is OutputFormat.quiet:
        out(str(result.folder))
    else:
        show_export(result.report, show)
        if show is OutputFormat.auto:
            out(f"Wrote {result.folder}")


def show_export(report: ExportReport, format: OutputFormat) -> None:
    """The facts of an export."""
    if format is OutputFormat.json:
        out_json(report.to_dict())
    elif format is OutputFormat.quiet:
        out(f"{report.verification.perplexity_change:.6f}")
    else:
        out_table(export_table(report))
        out(f"Compared on {report.verification.num_tokens:,} tokens: {report.verification.text}. {report.machine}.")
