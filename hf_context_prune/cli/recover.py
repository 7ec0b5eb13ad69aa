"""``hf-context-prune recover``."""

from __future__ import annotations

from typing import Annotated

from hf_context_prune import EvalOptions, RecoveryConfig
from hf_context_prune.config import CalibrationConfig
from hf_context_prune.utils.options import MODEL

from .options import (
    NONE,
    Data,
    DeviceOption,
    EvalData,
    FolderArgument,
    FormatOption,
    Given,
    Output,
    OutputFormat,
    VerboseOption,
    eval_options,
    options_of,
    shared,
)
from .output import next_steps, show_result


@options_of(RecoveryConfig, into="options")
@options_of(EvalOptions, into="evaluation")
@options_of(CalibrationConfig, into="column", only=("text_column",))
def recover(
    folder: FolderArgument,
    data: Data,
    output: Output,
    base: Annotated[
        str | None,
        shared(
            "The base model that was pruned, which is measured beside the folder. By default the base that the plan "
            "names, if it is on the Hub.",
            MODEL,
        ),
    ] = None,
    eval_data: EvalData = None,
    options: Given = NONE,
    evaluation: Given = NONE,
    column: Given = NONE,
    device: DeviceOption = None,
    format: FormatOption = OutputFormat.auto,
    verbose: VerboseOption = False,
) -> None:
    """Train a pruned folder back on text of its domain, and write a new folder.

    The weights that are best on validation documents are kept: there the result is never worse than the folder was.
    Ctrl-C ends the training and keeps the best weights so far.
    """
    config = RecoveryConfig(**options)
    from hf_context_prune.pipelines.recover import recover_to_folder

    result = recover_to_folder(
        folder,
        data,
        output,
        config,
        base=base,
        eval_data=eval_data,
        eval_options=eval_options(evaluation),
        device=device,
        **column,
    )
    show_result(result, output, format, verbose=verbose, steps=next_steps(output))
