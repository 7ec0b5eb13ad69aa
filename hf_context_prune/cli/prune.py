"""``hf-context-prune prune``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

from hf_context_prune import EvalOptions, RecoveryConfig
from hf_context_prune.config import PrunerConfig, ThresholdConfig
from hf_context_prune.errors import ConfigError
from hf_context_prune.pipelines.presets import describe_options, describe_presets, preset_options
from hf_context_prune.utils.distributed import fail_together
from hf_context_prune.utils.options import BUDGET, METHOD, MODEL, OUTPUT, TEXT, read_options

from .options import (
    DATA_HELP,
    NONE,
    ConfigFile,
    DeviceOption,
    Dtype,
    DtypeOption,
    EvalData,
    FormatOption,
    Given,
    ModelArgument,
    OutputFormat,
    RevisionOption,
    VerboseOption,
    combine_options,
    eval_options,
    merge_options,
    options_of,
    shared,
)
from .output import NextSteps, next_steps, out, out_json, out_table, show_result
from .tables import inside_experts_line, widths_table


@options_of(EvalOptions, into="evaluation")
@options_of(PrunerConfig, ThresholdConfig, into="options")
@fail_together()
def prune(
    model: ModelArgument,
    preset: Annotated[
        str | None,
        shared(f"Settings by a name. {describe_presets()}. Other options replace those of the preset.", BUDGET),
    ] = None,
    config: ConfigFile = None,
    options: Given = NONE,
    data: Annotated[str | None, shared(DATA_HELP, TEXT)] = None,
    eval_data: EvalData = None,
    evaluation: Given = NONE,
    recover_minutes: Annotated[
        float | None,
        shared(
            "Then train the pruned model back on the same text, within this many minutes, measuring included, as "
            "`recover --max-minutes` does. Other options of `recover` can be given in the YAML file, as a mapping "
            "named recovery.",
            METHOD,
        ),
    ] = None,
    text_only: Annotated[
        bool,
        shared(
            "Of a model of images and text, save the pruned text part alone, as a causal LM of its family. Without it, "
            "the text part is saved in its model, whose other weights are unchanged.",
            MODEL,
            "--text-only",
        ),
    ] = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    max_memory: Annotated[
        str | None,
        shared(
            "Most memory to hold beside the model's files, such as 8GiB; what does not fit lies in files. By default "
            "three quarters of what is free.",
            MODEL,
        ),
    ] = None,
    output: Annotated[
        Path | None, shared("Folder to write. An older folder that this tool wrote is replaced.", OUTPUT)
    ] = None,
    dry_run: Annotated[
        bool,
        shared(
            "Only print the sizes, from shapes alone (layer by layer for uniform widths), and the memory, disk and "
            "time that the run needs.",
            OUTPUT,
            "--dry-run",
        ),
    ] = False,
    format: FormatOption = OutputFormat.auto,
    verbose: VerboseOption = False,
) -> None:
    """Prune MODEL for the domain of a text, measure the loss on test text, and write a model folder."""
    values = preset_options(preset)
    if config:
        values = combine_options(values, read_options(config))
    recovery = _recovery(values.pop("recovery", None), recover_minutes)
    try:
        chosen = merge_options(values, options)
    except ConfigError as error:
        if preset is None:
            raise
        raise ConfigError(f"With --preset {preset} ({describe_options(preset)}): {error}") from error
    if dry_run:
        how: Given = {"eval_options": eval_options(evaluation), "recovery": recovery, "revision": revision}
        how["output"] = output
        _dry_run(model, chosen, format, max_memory=max_memory, text_only=text_only, dtype=dtype.value, **how)
        return
    if data is None or output is None:
        missing = " and ".join(name for name, value in (("--data", data), ("--output", output)) if value is None)
        raise ConfigError(f"{missing} must be given (only --dry-run needs neither).")
    from hf_context_prune.pipelines.prune import prune_to_folder

    result = prune_to_folder(
        model,
        data,
        output,
        chosen,
        eval_data=eval_data,
        eval_options=eval_options(evaluation),
        recovery=recovery,
        text_only=text_only,
        revision=revision,
        dtype=dtype.value,
        device=device,
        max_memory=max_memory,
    )
    steps = _next_steps(
        output,
        recovery,
        base=model if Path(model).exists() else None,  # a path of this machine is not in the plan
        data=data,
        eval_data=eval_data,
        general_data=evaluation.get("general_data"),
        text_column=chosen.text_column,
    )
    show_result(result, output, format, verbose=verbose, steps=steps)


def _next_steps(output: Path, recovery: RecoveryConfig | None, **text: str | None) -> NextSteps:
    """Return the commands to go on with; `text` holds the options that name the text of this run."""
    if recovery is not None:
        return next_steps(output)
    folder, target = shlex.quote(str(output)), shlex.quote(f"{output}-recovered")
    given = " ".join(f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in text.items() if value)
    return next_steps(output, ("Train it back", f"hf-context-prune recover {folder} {given} --output {target}"))


def _recovery(values: Any, minutes: float | None) -> RecoveryConfig | None:  # noqa: ANN401 - of the file
    """Build the config of the recovery; None if none is asked for. The time of the command line replaces the file's.

    Raises:
        ConfigError: The value in the file is no mapping, or a wrong option.
    """
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"recovery is {values!r} in the config file; it must be a mapping, as in 'max_minutes: 10'.")
    if values is None and minutes is None:
        return None
    given = {} if minutes is None else {"max_minutes": minutes}
    return RecoveryConfig.from_dict({**(values or {}), **given})


def _dry_run(
    model: str,
    config: PrunerConfig | ThresholdConfig,
    format: OutputFormat,
    **how: Any,  # noqa: ANN401 - of `dry_run`
) -> None:
    from hf_context_prune.pipelines.dry_run import dry_run
    from hf_context_prune.pipelines.durations import describe_seconds

    if isinstance(config, ThresholdConfig):
        raise ConfigError(
            "--dry-run works from shapes alone, but thresholds are compared with values measured on text."
        )
    found = dry_run(model, config, **how)
    if format is OutputFormat.json:
        out_json(found.to_dict())
    elif format is OutputFormat.quiet:
        out(str(found.pruned_parameters))
    else:
        if found.removed_layers is None:
            out("Layers: how many go as a whole, and which ones, is measured")
        elif found.removed_layers:
            out(f"Layers: {found.removed_layers} go as a whole, {len(found.dense)} stay; which ones is measured")
        if found.experts is not None:
            kept, count = found.experts
            out(f"Experts: {kept} of {count} stay in every layer that has them; which ones is measured")
        if found.inside_experts is not None:
            out(inside_experts_line(*found.inside_experts))
        if found.widths is not None:
            out_table(widths_table(found.dense, found.widths))
        if found.tokens != found.dense_tokens:
            out(
                f"Vocabulary: {found.tokens:,} of {found.dense_tokens:,} embedding rows kept (a dry run does not check "
                f"how many entries must stay)"
            )
        asked = "" if found.asked_ratio is None else f", asked {found.asked_ratio:.2%}"
        out(
            f"Parameters: {found.base_parameters:,} -> {found.pruned_parameters:,} "
            f"(-{1 - found.pruned_parameters / found.base_parameters:.2%}{asked})"
        )
        other = "not known yet" if found.widths is None else "variable widths"
        out(str(found.needs))
        if found.conversion_disk:
            out(f"The GGUF file is converted first, once, to {found.conversion_disk / 1e9:.1f} GB in the cache.")
        out(describe_seconds(found.seconds))
        for missing in (found.missing_memory, found.missing_disk):
            if missing is not None:
                out(f"Here the run would be refused. {missing}")
        out(f"Architecture: {'native' if found.native_fit.fits else other}: {found.native_fit.reason}")
