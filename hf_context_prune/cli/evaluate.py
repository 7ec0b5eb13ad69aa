"""``hf-context-prune evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hf_context_prune import EvalOptions, QuestionOptions
from hf_context_prune.config import CalibrationConfig
from hf_context_prune.utils.distributed import on_main_process
from hf_context_prune.utils.file_names import REPORT_NAME
from hf_context_prune.utils.locks import reserves
from hf_context_prune.utils.options import EVALUATION, MODEL, TEXT

from .options import (
    NONE,
    Data,
    DeviceOption,
    Dtype,
    DtypeOption,
    FormatOption,
    Given,
    ModelArgument,
    OutputFormat,
    ReportFolder,
    RevisionOption,
    VerboseOption,
    eval_options,
    options_of,
    shared,
)
from .output import out, out_json, show_report
from .questions import single_question_options

if TYPE_CHECKING:
    from hf_context_prune.evaluation.reports.report import EvalReport


@options_of(EvalOptions, into="evaluation", without=("example",))
@options_of(QuestionOptions, into="questions")
@options_of(CalibrationConfig, into="column", only=("text_column",))
@reserves("output")
def evaluate(
    model: ModelArgument,
    data: Data,
    base: Annotated[
        str | None, shared("The base that MODEL was pruned from: both are measured, and compared in pairs.", MODEL)
    ] = None,
    questions: Given = NONE,
    evaluation: Given = NONE,
    column: Given = NONE,
    max_seq_length: Annotated[int, shared("Tokens per window of text.", TEXT, min=2)] = 512,
    seed: Annotated[int, shared("Seed of the bootstrap and of the choice of documents.", EVALUATION, min=0)] = 0,
    output: ReportFolder = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    format: FormatOption = OutputFormat.auto,
    verbose: VerboseOption = False,
) -> None:
    """Measure MODEL on a text (and questions): bits per byte, perplexity, accuracy, size, speed and memory."""
    asked, options = single_question_options(questions), eval_options(evaluation)
    from hf_context_prune import load_model
    from hf_context_prune.evaluation.reports.files import check_report_folder, save_report
    from hf_context_prune.pipelines.evaluate import evaluate as run

    if output is not None:
        check_report_folder(output, "evaluate")
    report = on_main_process(
        lambda: run(
            load_model(model, dtype=dtype.value, device=device, revision=revision),
            data,
            base=None if base is None else load_model(base, dtype=dtype.value, device=device),
            questions=asked,
            max_seq_length=max_seq_length,
            seed=seed,
            eval_options=options,
            **column,
        )
    )
    if output is not None:
        save_report(report, output)
    if format is OutputFormat.json:
        out_json(report.to_dict())
    elif format is OutputFormat.quiet:
        out(f"{report.loss.last.bits_per_byte.value:.6f}")
    else:
        show_report(report, verbose=verbose)
        if output is not None:
            out(f"Wrote {output / REPORT_NAME}")
        _show_harness_task(model, report, questions.get("harness_task"))


def _show_harness_task(model: str, report: EvalReport, folder: str | None) -> None:
    """Show the command that asks the written questions through lm-evaluation-harness."""
    from hf_context_prune.evaluation.harness import format_harness_command, harness_task_name

    if folder is None or report.multiple_choice is None:
        return
    name = report.multiple_choice.name
    command = format_harness_command(model, name, folder)
    out(f"Wrote {Path(folder) / harness_task_name(name)}.yaml, for: {command}")
