"""Arguments and options that commands share."""

from __future__ import annotations

from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from hf_context_prune.config import (
    CriterionName,
    PrunerConfig,
    ReconstructionName,
    VocabCriterion,
    read_yaml,
)


class OutputFormat(StrEnum):
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
    OutputFormat,
    typer.Option("--format", help="auto: a table; json: everything, for programs; quiet: only the essential."),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Floating-point type to load the weights in.")]
DeviceOption = Annotated[str | None, typer.Option(help="Torch device; by default an accelerator if there is one.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub model.")]
MaxEvalTokens = Annotated[
    int,
    typer.Option(
        "--max-eval-tokens",
        min=1,
        help="Held-out tokens to measure on at most, in whole documents (the first one always).",
    ),
]
GeneralData = Annotated[
    str | None,
    typer.Option(help="Text of no domain, to measure what the model forgot: the model card says if it is missing."),
]
GeneralMix = Annotated[
    float | None,
    typer.Option(
        help="Share of the calibration blocks that comes from --general-data (a tenth of whose documents is then held "
        "out for the figures), in [0, 1). Default 0."
    ),
]
SpeedOption = Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed and peak memory.")]

DomainOption = Annotated[str | None, typer.Option(help="Name of the domain, such as law, for the model card.")]
PruningRatio = Annotated[float | None, typer.Option(help="Share of all parameters to remove, in [0, 1). Default 0.2.")]
TargetParams = Annotated[int | None, typer.Option(help="Parameters to keep at most, instead of a share.")]
MlpRatio = Annotated[float | None, typer.Option(help="Share of the MLP neurons to remove, in [0, 1).")]
AttentionRatio = Annotated[float | None, typer.Option(help="Share of the attention KV groups to remove, in [0, 1).")]
MaxLossIncrease = Annotated[
    float | None,
    typer.Option(help="As small as possible, at most this share worse on the domain (0.03: 3 %); found by search."),
]
LinearThreshold = Annotated[
    float | None,
    typer.Option(
        help="The paper's protocol, with --criterion l1 --reconstruction none: zero rows and columns of linear layers "
        "with mean |x| of at most this, remove the units that are then dead."
    ),
]
ActivationThreshold = Annotated[
    float | None, typer.Option(help="The same: MLP neurons with a mean |activation| of at most this.")
]
EmbeddingThreshold = Annotated[
    float | None, typer.Option(help="The same: tokens whose share of the text is at most this.")
]
CriterionOption = Annotated[str | None, typer.Option(help=f"{names(CriterionName)}. Default obs.")]
ReconstructionOption = Annotated[
    str | None, typer.Option(help=f"How what is left is repaired: {names(ReconstructionName)}.")
]
AllocationOption = Annotated[
    str | None,
    typer.Option(
        help="adaptive: widths by each layer's measured effect on the loss; uniform: the same in every layer. Default "
        "adaptive, but uniform with --mlp-ratio, --attention-ratio, --native-architecture, thresholds or a single block of text."
    ),
]
RefitOption = Annotated[
    bool | None,
    typer.Option(
        "--refit-lm-head/--no-refit-lm-head",
        help="After pruning, also refit the LM head (and the tied embedding) on the calibration text: less loss at the "
        "same size, in more time.",
    ),
]
RoundTo = Annotated[
    int | None, typer.Option(help="Keep MLP widths at multiples of this; 8 or 32 run faster. Default 1.")
]
VocabSize = Annotated[int | None, typer.Option(help="Tokens of the vocabulary to keep. Default all.")]
VocabCoverage = Annotated[
    float | None, typer.Option(help="Keep as many tokens as make up this share of the text, in (0, 1], instead.")
]
VocabMinCount = Annotated[int | None, typer.Option(help="Keep tokens that the text has at least this often, instead.")]
VocabAuto = Annotated[
    bool | None,
    typer.Option(
        "--vocab-auto/--no-vocab-auto",
        help="Let the budget choose the number of tokens too, by measured cost (not with --allocation uniform).",
    ),
]
VocabCriterionOption = Annotated[
    str | None,
    typer.Option("--vocab-criterion", help=f"Which tokens matter: {names(VocabCriterion)}. Default expected."),
]
VocabMultiple = Annotated[
    int | None, typer.Option(help="The number of kept tokens is rounded up to a multiple of this. Default 64.")
]


_EXCLUDES = {
    "max_loss_increase": ("mlp_ratio", "attention_ratio"),
    "mlp_ratio": ("max_loss_increase",),
    "attention_ratio": ("max_loss_increase",),
    "native_architecture": ("allocation",),
}
"""Options of a file that one of the command line leaves no sense to."""


def given_options(config_file: Path | None, options: dict[str, Any]) -> PrunerConfig:
    """Those options of the command line that are a config's, over those of the file."""
    values = read_yaml(config_file) if config_file else {}
    known = {field.name for field in fields(PrunerConfig)}
    given = {name: value for name, value in options.items() if name in known and value is not None}
    for sizes in (
        {"pruning_ratio", "target_params", "max_loss_increase"},
        {"vocab_size", "vocab_coverage", "vocab_min_count", "vocab_auto", "embedding_threshold"},
    ):
        # Any one on the command line replaces the others in the file.
        if any(name in given and given[name] is not False for name in sizes):
            values = {name: value for name, value in values.items() if name not in sizes}
    for name, beside in _EXCLUDES.items():
        if given.get(name) not in (None, False):
            values = {other: value for other, value in values.items() if other not in beside}
    return PrunerConfig.from_dict({**values, **given})
