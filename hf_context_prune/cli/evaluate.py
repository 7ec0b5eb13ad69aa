"""``hf-context-prune evaluate`` and ``bench``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_context_prune.utils.distributed import on_main_process
from hf_context_prune.utils.file_names import REPORT_NAME

from .options import (
    DATA_HELP,
    DeviceOption,
    Dtype,
    DtypeOption,
    FormatOption,
    GeneralData,
    MaxEvalTokens,
    ModelArgument,
    OutputFormat,
    RevisionOption,
    SpeedOption,
    TextColumn,
)
from .output import out, out_json, out_table
from .questions import FewShot, MaxQuestions, McqColumns, McqScorer, McqSource, McqSplit, question_options
from .tables import report_table, run_tables

if TYPE_CHECKING:
    from hf_context_prune.evaluation.reports.run_report import RunReport


ReportFolder = Annotated[
    Path | None, typer.Option("--output", help="Folder for eval_report.json, which `report` shows beside others.")
]


def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    base: Annotated[
        str | None, typer.Option(help="The model that it was pruned from: both are measured, and compared in pairs.")
    ] = None,
    mcq: McqSource = None,
    mcq_columns: McqColumns = None,
    mcq_split: McqSplit = None,
    mcq_scorer: McqScorer = None,
    few_shot: FewShot = None,
    max_questions: MaxQuestions = None,
    harness_task: Annotated[
        Path | None, typer.Option(help="Also write the questions to this folder, as a task of lm-evaluation-harness.")
    ] = None,
    general_data: GeneralData = None,
    text_column: TextColumn = None,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    max_eval_tokens: MaxEvalTokens = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap and of the choice of documents.")] = 0,
    speed: SpeedOption = True,
    output: ReportFolder = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Measure MODEL on a text (and questions): bits per byte, perplexity, accuracy, size, speed and memory."""
    asked = question_options({} if mcq is None else {"": mcq}, locals())
    from hf_context_prune.evaluation.harness import harness_task_name
    from hf_context_prune.evaluation.options import EvalOptions
    from hf_context_prune.evaluation.reports.files import check_report_folder, save_report
    from hf_context_prune.pipelines.evaluate import evaluate as run
    from hf_context_prune.storage.loading import load_model

    if output is not None:
        check_report_folder(output, "evaluate")
    report = on_main_process(
        lambda: run(
            load_model(model, dtype=dtype.value, device=device, revision=revision),
            data,
            base=None if base is None else load_model(base, dtype=dtype.value, device=device),
            questions=asked.get(""),
            text_column=text_column,
            max_seq_length=max_seq_length,
            seed=seed,
            options=EvalOptions(max_eval_tokens, speed, memory=speed, general_data=general_data),
        )
    )
    if output is not None:
        save_report(report, output)
    if format is OutputFormat.json:
        out_json(report.to_dict())
    elif format is OutputFormat.quiet:
        out(f"{report.loss.base.bits_per_byte.value:.6f}")
    else:
        out_table(report_table(report))
        if output is not None:
            out(f"Wrote {output / REPORT_NAME}")
        if harness_task is not None and report.multiple_choice is not None:
            name = harness_task_name(report.multiple_choice.name)
            place, folder = shlex.quote(model), shlex.quote(str(harness_task))
            out(
                f"Wrote {harness_task / name}.yaml, for: lm_eval --model hf --model_args pretrained={place},"
                f"trust_remote_code=True --include_path {folder} --tasks {name} --num_fewshot 0"
            )


def bench(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The dense model: folder, .gguf file, or Hub id.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The pruned model.")],
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds of prefill and decoding; of loading in fresh processes, at most 3.")
    ] = 5,
    output: ReportFolder = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Measure BASE and MODEL in turns: load time, prefill, decoding, peak memory, bytes on disk."""
    from hf_context_prune.evaluation.bench import bench as run
    from hf_context_prune.evaluation.reports.files import check_report_folder, save_report
    from hf_context_prune.storage.loading import explain_gguf_sizes, load_model

    if output is not None:
        check_report_folder(output, "bench")

    def measure() -> RunReport:
        first, second = (load_model(name, dtype=dtype.value, device=device) for name in (base, model))
        found = run(
            first.model,
            second.model,
            base_folder=first.folder,
            pruned_folder=second.folder,
            new_tokens=new_tokens,
            repeats=repeats,
            memory_repeats=min(repeats, 3),
        )
        return found.run_report(first.name, second.name, notes=explain_gguf_sizes(first, second))

    report = on_main_process(measure)
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
