"""``hf-context-prune cross-domain`` and ``paper-grid``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from hf_context_prune import EvalOptions, QuestionOptions
from hf_context_prune.config import CalibrationConfig, PrunerConfig
from hf_context_prune.errors import ConfigError
from hf_context_prune.utils.file_names import REPORT_NAME
from hf_context_prune.utils.files import expand_home
from hf_context_prune.utils.locks import reserves
from hf_context_prune.utils.options import PAPER, TEXT

from . import questions as about_questions
from .options import (
    DATA_HELP,
    NONE,
    ConfigFile,
    Data,
    DeviceOption,
    Dtype,
    DtypeOption,
    EvalData,
    FormatOption,
    Given,
    ModelArgument,
    OutputFormat,
    ResultsFolder,
    RevisionOption,
    config_from,
    options_of,
    shared,
)
from .output import out, out_json, out_table
from .tables import run_tables

DomainTexts = Annotated[
    list[str],
    shared(f"A domain and its text; repeat it for each domain. {DATA_HELP}", TEXT, "--domain", metavar="NAME=SOURCE"),
]
TestTexts = Annotated[
    list[str] | None,
    shared(
        "Test text of a domain; by default a tenth of the documents of its text. Repeat it for more domains.",
        TEXT,
        "--eval-data",
        metavar="NAME=SOURCE",
    ),
]
Mixes = Annotated[
    list[str] | None,
    shared(
        "Also mix shares of the reference's text into the calibration of a domain: law=0.25,0.5.",
        TEXT,
        "--mix",
        metavar="NAME=SHARE,...",
    ),
]
_VARYING = ("vocab_coverage", "vocab_min_count", "max_loss_increase", "general_data_ratio", "domain")
"""Fields that can't be the same for all domains."""


@options_of(PrunerConfig, into="options", without=_VARYING)
@options_of(EvalOptions, into="evaluation", only=("max_tokens",))
@options_of(QuestionOptions, into="asked", without=("source", "harness_task"))
@reserves("output")
def cross_domain(
    model: ModelArgument,
    domain: DomainTexts,
    output: ResultsFolder,
    eval_data: TestTexts = None,
    questions: about_questions.QuestionSources = None,
    asked: Given = NONE,
    mix: Mixes = None,
    reference: Annotated[
        str | None,
        shared("The domain that the others are compared with. By default general, if that is a domain.", TEXT),
    ] = None,
    config: ConfigFile = None,
    options: Given = NONE,
    evaluation: Given = NONE,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Prune MODEL once for each domain, and measure every result on every domain."""
    chosen = config_from(config, options)
    texts, test_texts = _pairs("--domain", domain), _pairs("--eval-data", eval_data)
    by_domain = about_questions.question_options(_pairs("--questions", questions), asked)
    mixes = {name: _shares(name, text) for name, text in _pairs("--mix", mix, "law=0.25,0.5").items()}
    from hf_context_prune import load_model
    from hf_context_prune.pipelines.matrix import check_matrix, domain_matrix

    check_matrix(tuple(texts), output, chosen, test_texts, by_domain, reference, mixes)
    assert isinstance(chosen, PrunerConfig)  # the check refuses the other config
    domain_matrix(
        load_model(model, dtype=dtype.value, device=device, revision=revision),
        texts,
        output,
        chosen,
        eval_data=test_texts,
        questions=by_domain,
        reference=reference,
        mixes=mixes,
        **evaluation,
    )
    _show(output, "matrix.md", format)


@options_of(CalibrationConfig, into="calibration", only=("num_calibration_samples", "max_seq_length", "pruning_seed"))
@options_of(CalibrationConfig, into="column", only=("text_column",))
@options_of(EvalOptions, into="evaluation", only=("max_tokens",))
@options_of(QuestionOptions, into="questions", without=("harness_task",), defaults=about_questions.PAPER)
@reserves("output")
def paper_grid(
    model: ModelArgument,
    data: Data,
    output: ResultsFolder,
    linear: Annotated[str, shared("Thresholds of linear layers; off: none.", PAPER)] = "1e-5,1e-3,1e-1",
    activation: Annotated[str, shared("Thresholds of activations.", PAPER)] = "1e-5,1e-3,1e-1",
    embedding: Annotated[str, shared("Thresholds of the embedding: shares of the text.", PAPER)] = "off,0",
    tune_steps: Annotated[
        int | None, shared("Also train every pruned model on the text for this many steps.", PAPER, min=1)
    ] = None,
    eval_data: EvalData = None,
    calibration: Given = NONE,
    column: Given = NONE,
    evaluation: Given = NONE,
    questions: Given = NONE,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Run the paper's grid of thresholds on MODEL: what is removed, what is only zeroed, and what it costs."""
    asked = about_questions.single_question_options(questions, about_questions.PAPER)
    text = CalibrationConfig(**calibration)
    from hf_context_prune import RecoveryConfig, load_model
    from hf_context_prune.evaluation.reports.files import check_report_folder
    from hf_context_prune.pipelines.sweep import SweepOptions, sweep

    training = None
    if tune_steps is not None:
        training = RecoveryConfig(
            max_steps=tune_steps, num_epochs=1e6, max_seq_length=text.max_seq_length, recovery_seed=text.pruning_seed
        )
    options = SweepOptions(
        _thresholds("--linear", linear),
        _thresholds("--activation", activation),
        _thresholds("--embedding", embedding),
        training,
        text.num_calibration_samples,
        text.max_seq_length,
        seed=text.pruning_seed,
        **evaluation,
    )
    options.configs()  # refused before the model is loaded
    check_report_folder(output, "sweep")
    loaded = load_model(model, dtype=dtype.value, device=device, revision=revision)
    sweep(loaded, data, output, options, eval_data=eval_data, questions=asked, **column)
    _show(output, "sweep.md", format)


def _show(output: Path, file: str, format: OutputFormat) -> None:
    """Show what a run wrote to its folder."""
    from hf_context_prune.evaluation.reports.run_report import RunReport, load_report

    report = load_report(expand_home(output) / REPORT_NAME)
    assert isinstance(report, RunReport)
    if format is OutputFormat.json:
        out_json(report.to_dict())
    elif format is OutputFormat.quiet:
        out(str(output / file))
    else:
        for table in run_tables(report):
            out_table(table)
        out(f"Wrote {output / file}")


def _thresholds(name: str, text: str) -> tuple[float | None, ...]:
    """Read ``1e-5,0.1,off`` as thresholds."""
    try:
        return tuple(None if part.strip() == "off" else float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}; it must be numbers or 'off', as in 1e-5,1e-3,off.") from error


def _shares(name: str, text: str) -> tuple[float, ...]:
    """Read ``0.25,0.5`` as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--mix of {name} is {text!r}; it must be shares, as in {name}=0.25,0.5.") from error


def _pairs(name: str, values: list[str] | None, example: str = "law=laws.jsonl") -> dict[str, str]:
    """Read ``law=laws.jsonl`` as a mapping, in the given order."""
    found: dict[str, str] = {}
    for text in values or []:
        domain, _, source = text.partition("=")
        if not domain.strip() or not source.strip():
            raise ConfigError(f"{name} is {text!r}; it must be as in {example}.")
        if domain.strip() in found:
            raise ConfigError(f"{name} names {domain.strip()!r} twice.")
        found[domain.strip()] = source.strip()
    return found
