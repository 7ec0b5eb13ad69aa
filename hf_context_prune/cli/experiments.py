"""``hf-context-prune matrix`` and ``sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_context_prune.errors import ConfigError
from hf_context_prune.utils.file_names import REPORT_NAME

from .options import (
    DATA_HELP,
    AllocationOption,
    AttentionRatio,
    CriterionOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    FormatOption,
    MaxEvalTokens,
    MlpRatio,
    ModelArgument,
    OutputFormat,
    PruningRatio,
    ReconstructionOption,
    RevisionOption,
    TargetParams,
    TextColumn,
    VocabSize,
    given_options,
)
from .output import out, out_json, out_table
from .questions import FewShot, MaxQuestions, McqColumns, McqScorer, McqSource, McqSources, McqSplit, question_options
from .tables import run_tables


def _thresholds(name: str, text: str) -> tuple[float | None, ...]:
    """``1e-5,0.1,off`` as thresholds."""
    try:
        return tuple(None if part.strip() == "off" else float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}; it must be numbers or 'off', as in 1e-5,1e-3,off.") from error


def sweep(
    model: ModelArgument,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    output: Annotated[Path, typer.Option(help="Folder of the rows and the table; the same command goes on from it.")],
    linear: Annotated[str, typer.Option(help="Thresholds of linear layers; off: none.")] = "1e-5,1e-3,1e-1",
    activation: Annotated[str, typer.Option(help="Thresholds of activations.")] = "1e-5,1e-3,1e-1",
    embedding: Annotated[str, typer.Option(help="Thresholds of the embedding: shares of the text.")] = "off,0",
    tune_steps: Annotated[
        int | None, typer.Option(min=1, help="Also train every pruned model on the text for so many steps.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Text for the figures; by default a tenth of the documents of --data.")
    ] = None,
    mcq: McqSource = None,
    mcq_columns: McqColumns = None,
    mcq_split: McqSplit = None,
    mcq_scorer: McqScorer = None,
    few_shot: FewShot = None,
    max_questions: MaxQuestions = None,
    num_calibration_samples: Annotated[int, typer.Option(min=1, help="Calibration blocks.")] = 128,
    max_seq_length: Annotated[int, typer.Option(min=8, help="Tokens a block.")] = 512,
    text_column: TextColumn = None,
    max_eval_tokens: MaxEvalTokens = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Run the paper's grid of thresholds on MODEL: what goes for real, what is only zeroed, what it costs."""
    asked = question_options({} if mcq is None else {"": mcq}, locals(), scorer="paper", max_questions=100)
    from hf_context_prune.evaluation.reports.files import check_report_folder
    from hf_context_prune.pipelines.sweep import SweepOptions
    from hf_context_prune.pipelines.sweep import sweep as run
    from hf_context_prune.storage.loading import load_model
    from hf_context_prune.training.recovery.config import RecoveryConfig

    options = SweepOptions(
        _thresholds("--linear", linear),
        _thresholds("--activation", activation),
        _thresholds("--embedding", embedding),
        None
        if tune_steps is None
        # As in the paper: cross-entropy on the text alone.
        else RecoveryConfig(
            max_steps=tune_steps, num_epochs=1e6, distillation=0.0, max_seq_length=max_seq_length, recovery_seed=seed
        ),
        num_calibration_samples,
        max_seq_length,
        max_eval_tokens,
        seed,
    )
    options.configs()  # refused before the model is loaded
    check_report_folder(output, "sweep")
    loaded = load_model(model, dtype=dtype.value, device=device, revision=revision)
    run(loaded, data, output, options, eval_data=eval_data, text_column=text_column, questions=asked.get(""))
    _show(output, "sweep.md", format)


def _show(output: Path, file: str, format: OutputFormat) -> None:
    """What a run wrote to its folder."""
    from hf_context_prune.evaluation.reports.run_report import RunReport, load_report

    report = load_report(output / REPORT_NAME)
    assert isinstance(report, RunReport)
    if format is OutputFormat.json:
        out_json(report.to_dict())
    elif format is OutputFormat.quiet:
        out(str(output / file))
    else:
        for table in run_tables(report):
            out_table(table)
        out(f"Wrote {output / file}")


def _shares(name: str, text: str) -> tuple[float, ...]:
    """``0.25,0.5`` as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--mix of {name} is {text!r}; it must be shares, as in {name}=0.25,0.5.") from error


def _pairs(name: str, values: list[str] | None, example: str = "law=laws.jsonl") -> dict[str, str]:
    """``law=laws.jsonl`` as a mapping; order is kept."""
    found: dict[str, str] = {}
    for text in values or []:
        domain, _, source = text.partition("=")
        if not domain.strip() or not source.strip():
            raise ConfigError(f"{name} is {text!r}; it must be as in {example}.")
        if domain.strip() in found:
            raise ConfigError(f"{name} names {domain.strip()!r} twice.")
        found[domain.strip()] = source.strip()
    return found


def matrix(
    model: ModelArgument,
    domains: Annotated[list[str], typer.Option(metavar="NAME=SOURCE", help=f"A domain. {DATA_HELP}")],
    output: Annotated[Path, typer.Option(help="Folder of all results; the same command goes on from it.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[NAME=SOURCE]...", help="More domains.")] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SOURCE", help="Text for the figures of a domain.")
    ] = None,
    mcq: McqSources = None,
    mcq_columns: McqColumns = None,
    mcq_split: McqSplit = None,
    mcq_scorer: McqScorer = None,
    few_shot: FewShot = None,
    max_questions: MaxQuestions = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SHARE,...",
            help="Also mix shares of the reference's text into a domain's calibration: law=0.25,0.5.",
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The domain that the others are compared with. Default general, if it is one.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with options, as for prune.")] = None,
    pruning_ratio: PruningRatio = None,
    target_params: TargetParams = None,
    mlp_ratio: MlpRatio = None,
    attention_ratio: AttentionRatio = None,
    vocab_size: VocabSize = None,
    criterion: CriterionOption = None,
    reconstruction: ReconstructionOption = None,
    allocation: AllocationOption = None,
    num_calibration_samples: Annotated[int | None, typer.Option(help="Calibration blocks. Default 128.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens a block. Default 512.")] = None,
    text_column: TextColumn = None,
    max_eval_tokens: MaxEvalTokens = 20_000,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. Default 0.")] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Prune MODEL once for each domain, and measure every result on every domain."""
    given = locals()
    chosen = given_options(config, {**given, "pruning_seed": seed})
    from hf_context_prune.pipelines.matrix import check_matrix, domain_matrix
    from hf_context_prune.storage.loading import load_model

    texts, held_out = _pairs("--domains", [*domains, *(more or [])]), _pairs("--eval-data", eval_data)
    asked = question_options(_pairs("--mcq", mcq), given)
    mixes = {name: _shares(name, text) for name, text in _pairs("--mix", mix, "law=0.25,0.5").items()}
    check_matrix(tuple(texts), output, chosen, held_out, asked, reference, mixes)
    domain_matrix(
        load_model(model, dtype=dtype.value, device=device, revision=revision),
        texts,
        output,
        chosen,
        eval_data=held_out,
        questions=asked,
        reference=reference,
        mixes=mixes,
        max_tokens=max_eval_tokens,
    )
    _show(output, "matrix.md", format)
