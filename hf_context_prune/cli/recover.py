"""``hf-context-prune recover``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from hf_context_prune.errors import ConfigError

from .options import (
    DATA_HELP,
    DeviceOption,
    FormatOption,
    GeneralData,
    MaxEvalTokens,
    OutputFormat,
    SpeedOption,
    TextColumn,
)
from .output import save_and_show


def recover(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned folder that this tool wrote.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    output: Annotated[Path, typer.Option(help="Folder to write; an older one of ours is replaced.")],
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The dense parent: measured beside the folder, and learned from with --distillation. By default the "
            "plan's base, where that is on the Hub."
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Text for the figures; by default a tenth of the documents of --data.")
    ] = None,
    general_data: GeneralData = None,
    method: Annotated[str, typer.Option(help="full, or lora: low-rank adapters, merged before saving.")] = "full",
    max_minutes: Annotated[float | None, typer.Option(help="Stop in that time, measuring included.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after that many steps.")] = None,
    num_epochs: Annotated[float, typer.Option(help="Passes over the text, at most.")] = 1.0,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate. Default 1.5e-4, for lora 2e-3.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks of text a step.")] = 4,
    max_seq_length: Annotated[int, typer.Option(help="Tokens a block.")] = 512,
    distillation: Annotated[
        float, typer.Option(help="Weight of the parent's distribution in the loss, in [0, 1]; the rest is the text's.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option(help="Temperature of the distillation.")] = 1.0,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 32,
    rewind: Annotated[
        str, typer.Option(help="none, or pretrained: start the kept weights at the parent's values (lottery ticket).")
    ] = "none",
    evaluations: Annotated[int, typer.Option(help="How often the withheld text is measured on the way.")] = 8,
    patience: Annotated[int, typer.Option(help="Stop after that many measurements in a row that did not fall.")] = 3,
    text_column: TextColumn = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: DeviceOption = None,
    max_eval_tokens: MaxEvalTokens = 20_000,
    speed: SpeedOption = True,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Train a pruned folder back on text of its domain, and write a new folder.

    The weights that are best on withheld documents are kept: the result is never worse there than the folder was (but
    with --rewind: than the rewound weights). Ctrl-C ends the training and keeps the best weights so far.
    """
    chosen = {**locals(), "recovery_seed": seed}
    from hf_context_prune.evaluation.options import EvalOptions
    from hf_context_prune.pipelines.recover import recover_folder
    from hf_context_prune.storage.staging import check_target
    from hf_context_prune.training.recovery.config import RecoveryConfig

    config = RecoveryConfig(**{item.name: chosen[item.name] for item in fields(RecoveryConfig) if item.name in chosen})
    check_target(output)
    if folder.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"--output {output} is {folder} or lies inside it, which would be lost. Name another folder.")
    result = recover_folder(
        folder,
        data,
        config,
        teacher=teacher,
        eval_data=eval_data,
        text_column=text_column,
        evaluation=EvalOptions(max_eval_tokens, speed, memory=speed, general_data=general_data),
        device=device,
    )
    save_and_show(result, output, measure_memory=speed, format=format)
