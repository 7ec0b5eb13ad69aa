"""The prune command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_context_prune.errors import ConfigError
from hf_context_prune.utils.distributed import fail_together

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
    EmbeddingThreshold,
    FormatOption,
    GeneralData,
    GeneralMix,
    LinearThreshold,
    MaxEvalTokens,
    MaxLossIncrease,
    MlpRatio,
    ModelArgument,
    OutputFormat,
    PruningRatio,
    ReconstructionOption,
    RefitOption,
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
from .output import out, out_json, out_table, save_and_show
from .tables import widths_table

if TYPE_CHECKING:
    from hf_context_prune.config import PrunerConfig


@fail_together()
def prune(
    model: ModelArgument,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; an older one of ours is replaced.")] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Text for the figures; by default a tenth of the documents of --data.")
    ] = None,
    general_data: GeneralData = None,
    general_data_ratio: GeneralMix = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with options; the command line wins.")] = None,
    pruning_ratio: PruningRatio = None,
    target_params: TargetParams = None,
    mlp_ratio: MlpRatio = None,
    attention_ratio: AttentionRatio = None,
    max_loss_increase: MaxLossIncrease = None,
    criterion: CriterionOption = None,
    reconstruction: ReconstructionOption = None,
    allocation: AllocationOption = None,
    refit_lm_head: RefitOption = None,
    round_to: RoundTo = None,
    native_architecture: Annotated[
        bool | None,
        typer.Option(
            "--native-architecture/--no-native-architecture",
            help="Plan only widths that the native architecture can hold.",
        ),
    ] = None,
    vocab_size: VocabSize = None,
    vocab_coverage: VocabCoverage = None,
    vocab_min_count: VocabMinCount = None,
    vocab_auto: VocabAuto = None,
    vocab_criterion: VocabCriterionOption = None,
    pad_to_multiple_of: VocabMultiple = None,
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
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Prune MODEL for the domain of a text, measure the loss on held-out text, and write a model folder."""
    chosen = given_options(config, {**locals(), "pruning_seed": seed})
    from hf_context_prune.pruning.calibration.samples import check_general_data_ratio

    check_general_data_ratio(chosen, general_data)
    if dry_run:
        _dry_run(model, chosen, revision, format)
        return
    missing = [name for name, value in (("--data", data), ("--output", output)) if value is None]
    if missing or output is None:
        raise ConfigError(f"{' and '.join(missing)} must be given (only --dry-run needs neither).")
    from hf_context_prune.evaluation.options import EvalOptions
    from hf_context_prune.pipelines.prune import prune as run
    from hf_context_prune.storage.loading import load_model
    from hf_context_prune.storage.resume import open_resume_folder
    from hf_context_prune.storage.staging import check_target

    check_target(output)
    loaded = load_model(model, dtype=dtype.value, device=device, revision=revision)
    with open_resume_folder("prune", output.resolve(), model, revision, data, eval_data, chosen) as resume_dir:
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


def _dry_run(model: str, config: PrunerConfig, revision: str | None, format: OutputFormat) -> None:
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
    if format is OutputFormat.json:
        out_json(outline.to_dict())
    elif format is OutputFormat.quiet:
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
        out(f"Architecture: {'stock' if outline.native_fit.fits else 'variable-width'}: {outline.native_fit.reason}")
