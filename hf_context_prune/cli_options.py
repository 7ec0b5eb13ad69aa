"""Arguments and options that commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, get_args

import typer


class Format(StrEnum):
    """What goes to stdout."""

    auto = "auto"
    json = "json"
    quiet = "quiet"


class Dtype(StrEnum):
    """Floating-point type to load the weights in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def names(literal: object) -> str:
    """The values of a Literal, for a help text."""
    return ", ".join(get_args(literal))


DATA_HELP = (
    "Domain text: .txt, .jsonl[.gz], .json, .csv or .parquet files, a folder of them, a Hub dataset "
    r"(id[:config]\[@split]), or a preset of the paper's data sets."
)
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, .gguf file, or Hub id.")]
TextColumn = Annotated[
    str | None, typer.Option(help="Column with the text; found by itself if there is one candidate.")
]
FormatOption = Annotated[
    Format, typer.Option("--format", help="auto: a table; json: everything, for programs; quiet: only the essential.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Floating-point type to load the weights in.")]
DeviceOption = Annotated[str | None, typer.Option(help="Torch device; by default an accelerator if there is one.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub model.")]
MaxEvalTokens = Annotated[
    int, typer.Option("--max-eval-tokens", min=1, help="Held-out tokens to measure on at most, in whole documents.")
]
SpeedOption = Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed and peak memory.")]
