"""``hf-context-prune export``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hf_context_prune.config import CalibrationConfig
from hf_context_prune.utils.options import EVALUATION, TEXT

from .options import DATA_HELP, NONE, FormatOption, Given, Output, OutputFormat, options_of, shared
from .output import out, out_json, out_table
from .tables import export_table

if TYPE_CHECKING:
    from hf_context_prune.export.report import ExportReport


@options_of(CalibrationConfig, into="column", only=("text_column",))
def export(
    folder: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A pruned folder, or any other model: folder, .gguf file, Hub id, or demo."),
    ],
    to: Annotated[str, shared("Format of the export: quanto, torchao, onnx or gguf.")],
    output: Output,
    dtype: Annotated[
        str | None,
        shared(
            "Data type of the weights. quanto: int8, int4; torchao: int8; onnx: float32, int8; gguf: q8_0, f16, bf16, "
            "q6_k, q5_k_m, q4_k_m, q3_k_m, q2_k. By default the first."
        ),
    ] = None,
    data: Annotated[
        str | None, shared("Test text to compare on; by default text that the model itself writes. " + DATA_HELP, TEXT)
    ] = None,
    importance_data: Annotated[
        str | None,
        shared("Text of the domain that tells which inputs matter, for q6_k to q2_k of gguf. " + DATA_HELP, TEXT),
    ] = None,
    column: Given = NONE,
    max_tokens: Annotated[int, shared("Largest number of tokens of --data to compare on.", EVALUATION, min=1)] = 2000,
    tolerance: Annotated[
        float | None,
        shared("Relative change of the perplexity to allow, instead of the format's own limit.", EVALUATION),
    ] = None,
    seed: Annotated[int, shared("Seed of the text to compare on.", EVALUATION, min=0)] = 0,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Write DIR for another runtime, and keep the export only if its loss there stays within a limit.

    The other runtime loads the export, which is compared with DIR on test text: loss, greedy text, size, speed. The
    limit is that of the data type, wide for few bits (perplexity: 3 % for q8_0, 25 % for q4_k_m); --tolerance sets one.
    `inspect` verifies and shows it later. Beside a GGUF file lies a Modelfile for Ollama. The k-quants (q6_k to q2_k)
    take about 6.6, 5.7, 4.9, 3.9 and 3.0 bits per weight; rows that blocks of 256 don't divide take more.
    """
    from hf_context_prune import export_model

    result = export_model(
        folder,
        output,
        format=to,
        dtype=dtype,
        data=data,
        importance_data=importance_data,
        max_tokens=max_tokens,
        tolerance=tolerance,
        seed=seed,
        **column,
    )
    if format is OutputFormat.quiet:
        out(str(result.folder))
    else:
        show_export(result.report, format)
        if format is OutputFormat.auto:
            out(f"Wrote {result.folder}")


def show_export(report: ExportReport, format: OutputFormat) -> None:
    """Show the facts of an export."""
    if format is OutputFormat.json:
        out_json(report.to_dict())
    elif format is OutputFormat.quiet:
        out(f"{report.verification.perplexity_change:.6f}")
    else:
        out_table(export_table(report))
        if report.importance is not None:
            out(f"Errors were weighed by the inputs on {report.importance}.")
        out(f"Compared on {report.verification.num_tokens:,} tokens: {report.verification.text}. {report.machine}.")
