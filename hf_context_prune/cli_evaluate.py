"""``hf-context-prune evaluate`` and ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_options import (
    DATA_HELP,
    DeviceOption,
    Dtype,
    DtypeOption,
    Format,
    FormatOption,
    GeneralData,
    MaxEvalTokens,
    ModelArgument,
    RevisionOption,
    SpeedOption,
    TextColumn,
    needs_questions,
)
from .cli_output import out, out_json, out_table
from .distributed import on_main_process
from .errors import ConfigError
from .tables import bench_table, report_table

if TYPE_CHECKING:
    from .evaluation.bench import Bench


def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    base: Annotated[
        str | None, typer.Option(help="The model that it was pruned from: both are measured, and compared in pairs.")
    ] = None,
    mcq: Annotated[
        str | None,
        typer.Option(
            help="Multiple-choice questions: a .jsonl file or Hub dataset with question, choices, answer (index from "
            "0, or letter), optionally context, source, split (test rows are asked, dev rows are examples) and id."
        ),
    ] = None,
    mcq_columns: Annotated[
        str | None, typer.Option(help="Names of its columns, where they differ: question=query,choices=options.")
    ] = None,
    mcq_scorer: Annotated[
        str, typer.Option(help="likelihood_normalised (a byte), likelihood, letter, or paper (arXiv 2312.12682).")
    ] = "likelihood_normalised",
    few_shot: Annotated[int, typer.Option(min=0, help="Examples from the dev rows of a question's source.")] = 0,
    max_questions: Annotated[int | None, typer.Option(min=1, help="Questions at most, evenly spread.")] = None,
    harness_task: Annotated[
        Path | None, typer.Option(help="Also write the questions to this folder, as a task of lm-evaluation-harness.")
    ] = None,
    general_data: GeneralData = None,
    text_column: TextColumn = None,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    max_eval_tokens: MaxEvalTokens = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap and of the choice of documents.")] = 0,
    speed: SpeedOption = True,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    format: FormatOption = Format.auto,
) -> None:
    """Measure MODEL on a text (and questions): bits per byte, perplexity, accuracy, size, speed and memory."""
    from .loading import load_model
    from .measuring import QuestionOptions
    from .measuring import evaluate as run
    from .pipeline import EvalOptions

    questions = None
    if mcq is not None:
        questions = QuestionOptions(
            mcq,
            _columns(mcq_columns),
            mcq_scorer,  # type: ignore[arg-type]  # checked where it is used
            few_shot,
            max_questions,
            harness_task,
        )
    else:
        needs_questions(
            {
                "--mcq-columns": mcq_columns,
                "--few-shot": few_shot,
                "--max-questions": max_questions,
                "--harness-task": harness_task,
            }
        )
    report = on_main_process(
        lambda: run(
            load_model(model, dtype=dtype.value, device=device, revision=revision),
            data,
            base=None if base is None else load_model(base, dtype=dtype.value, device=device),
            questions=questions,
            text_column=text_column,
            max_seq_length=max_seq_length,
            seed=seed,
            options=EvalOptions(max_eval_tokens, speed, memory=speed, general_data=general_data),
        )
    )
    if format is Format.json:
        out_json(report.to_dict())
    elif format is Format.quiet:
        out(f"{report.loss.base.bits_per_byte.value:.6f}")
    else:
        out_table(report_table(report))


def _columns(text: str | None) -> dict[str, str]:
    """``ours=theirs,...`` as a mapping."""
    pairs = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    for ours, _, theirs in pairs:
        if not ours.strip() or not theirs.strip():
            raise ConfigError(f"--mcq-columns is {text!r}; it must be pairs, as in question=query,choices=options.")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def bench(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The dense model: folder, .gguf file, or Hub id.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The pruned model.")],
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds of prefill and decoding; of loading in fresh processes, at most 3.")
    ] = 5,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    format: FormatOption = Format.auto,
) -> None:
    """Measure BASE and MODEL in turns: load time, prefill, decoding, peak memory, bytes on disk."""
    from .evaluation.bench import bench as run
    from .loading import load_model

    def measure() -> Bench:
        first, second = (load_model(name, dtype=dtype.value, device=device) for name in (base, model))
        return run(
            first.model,
            second.model,
            base_folder=first.folder,
            pruned_folder=second.folder,
            new_tokens=new_tokens,
            repeats=repeats,
            memory_repeats=min(repeats, 3),
        )

    result = on_main_process(measure)
    if format is Format.json:
        out_json(result.to_dict())
    elif format is Format.quiet:
        out("\n".join("\t".join(row) for row in result.table_rows()))
    else:
        out_table(bench_table(result))
        out(result.caption())
