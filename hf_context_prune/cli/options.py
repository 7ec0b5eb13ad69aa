"""Options of the command line: made from the fields of the configs, and those that several commands share."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from rich.markup import escape

from hf_context_prune import EvalOptions
from hf_context_prune.config import PrunerConfig, ThresholdConfig, build_config
from hf_context_prune.utils.options import MODEL, OUTPUT, PANELS, TEXT, choices, help_of, read_options


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


def shared(help: str, panel: str | None = None, *flags: str, **settings: Any) -> Any:  # noqa: ANN401 - typer's OptionInfo
    """Return an option that is no field of a config."""
    return typer.Option(*flags, help=escape(help), rich_help_panel=panel, **settings)


DATA_HELP = (
    "Domain text: .txt, .jsonl[.gz], .json, .csv or .parquet files, a folder of them, a Hub dataset "
    "(id[:config][@split]), or a preset of the paper's data sets."
)
MODEL_HELP = "Model folder, .gguf file, Hub id, or demo (SmolLM2-135M-Instruct, 93 MB from the package index)."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A pruned folder that this tool wrote.")]
Data = Annotated[str, shared(DATA_HELP, TEXT)]
EvalData = Annotated[
    str | None, shared("Test text to measure on; by default a tenth of the documents of --data.", TEXT)
]
ConfigFile = Annotated[
    Path | None, shared("YAML file with options by the names of the fields; the command line has precedence.")
]
Output = Annotated[Path, shared("Folder to write. An older folder that this tool wrote is replaced.", OUTPUT)]


def _be_quiet(context: typer.Context, value: OutputFormat) -> OutputFormat:
    """Show neither progress bars nor messages during a quiet command; warnings and errors stay."""
    if value is OutputFormat.quiet:
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        package = logging.getLogger("hf_context_prune")
        context.call_on_close(functools.partial(package.setLevel, package.level))
        package.setLevel(logging.WARNING)
        if not are_progress_bars_disabled():
            context.call_on_close(enable_progress_bars)
            disable_progress_bars()
    return value


FormatOption = Annotated[
    OutputFormat,
    shared(
        "auto: a table; json: everything, for programs; quiet: only the essential, without progress.",
        OUTPUT,
        "--format",
        callback=_be_quiet,
    ),
]
VerboseOption = Annotated[
    bool, shared("Show intervals, quartiles and the losses per token too.", OUTPUT, "--verbose", "-v")
]
ResultsFolder = Annotated[
    Path, shared("Folder of all results. The same command resumes a run that was interrupted.", OUTPUT)
]
ReportFolder = Annotated[
    Path | None, shared("Folder for eval_report.json, which `report` shows beside others.", OUTPUT, "--output")
]
DtypeOption = Annotated[
    Dtype,
    shared("Floating-point type to load the weights in: auto (as saved), float32, bfloat16 or float16.", MODEL),
]
DeviceOption = Annotated[str | None, shared("Torch device; by default an accelerator if there is one.", MODEL)]
RevisionOption = Annotated[str | None, shared("Branch, tag or commit of the Hub model.", MODEL)]

Given = dict[str, Any]
"""Options that were given on the command line, by the names of the fields."""
NONE: Given = {}
Command = TypeVar("Command", bound=Callable[..., None])


def options_of(
    *configs: type,
    into: str,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Command], Command]:
    """Give a command one option per field of some configs.

    Type, default, help text and panel come from the field. The command gets those that were given, and only those, as a
    dictionary.

    Args:
        configs: Dataclasses whose fields are made by [`option`][]; a field that several have is one option.
        into: The parameter of the command that takes the dictionary.
        only: Names of the fields to take; None takes all that have a help text.
        without: Names of the fields to leave out.
        defaults: Defaults that ``--help`` shows in place of the fields'.
    """
    chosen = {
        item.name: (item, get_type_hints(config)[item.name])
        for config in configs
        for item in fields(config)
        if help_of(item) and item.name not in without and (only is None or item.name in only)
    }
    made = [_parameter(item, annotation, defaults or {}) for item, annotation in chosen.values()]

    def extend(command: Command) -> Command:
        @functools.wraps(command)
        def run(context: typer.Context, **values: Any) -> None:  # noqa: ANN401 - the command's own parameters
            sources = {item.name: context.get_parameter_source(item.name) for item in made}
            taken = {name: values.pop(name) for name in sources}
            given = {name: taken[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}
            keep = {"context": context} if "context" in inspect.signature(command).parameters else {}
            command(**keep, **values, **{into: given})

        return _with_parameters(run, command, into, made)  # type: ignore[return-value]

    return extend


def _with_parameters(
    run: Callable[..., None], command: Callable[..., None], into: str, made: list[inspect.Parameter]
) -> Callable[..., None]:
    """Set the signature that typer reads: the command's own parameters and the made ones, by panel."""
    own = inspect.signature(command, eval_str=True).parameters
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    rest = [item.replace(kind=item.KEYWORD_ONLY) for name, item in own.items() if name not in ("context", into)]
    parameters = [context, *sorted((*rest, *made), key=_panel_index)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {item.name: item.annotation for item in parameters}
    return run


def _panel_index(parameter: inspect.Parameter) -> int:
    """Return the place of a parameter's panel in ``--help``; arguments and options without one come first."""
    for note in getattr(parameter.annotation, "__metadata__", ()):
        if getattr(note, "rich_help_panel", None) in PANELS:
            return PANELS.index(note.rich_help_panel)
    return -1


def flag_of(config: type, name: str) -> str:
    """Return the flag of a config's field."""
    return next(f"--{_flag(item)}" for item in fields(config) if item.name == name)


def _flag(item: Field[Any]) -> str:
    about = help_of(item)
    return (about and about.flag) or item.name.replace("_", "-")


def _parameter(item: Field[Any], annotation: object, defaults: Mapping[str, Any]) -> inspect.Parameter:
    """Return the option of a field; values that the command line can't hold are strings, which the command reads."""
    parts = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    kind = next((part for part in (bool, int, float) if part in parts and str not in parts), str)
    default = defaults.get(item.name, item.default)
    if default is MISSING or not isinstance(default, kind):
        default = None
    about, flag, names = help_of(item), _flag(item), choices(annotation)
    assert about is not None
    info = shared(
        about + (f" One of: {', '.join(names)}." if names else ""),
        about.panel,
        f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
        metavar=about.metavar,
    )
    hint = Annotated[kind | None if default is None else kind, info]  # type: ignore[valid-type]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


_SIZES = (
    {"pruning_ratio", "target_params", "max_loss_increase"},
    {"vocab_size", "vocab_coverage", "vocab_min_count", "embedding_threshold"},
)
"""Any option of a set on the command line replaces the others of the set in the file."""
_EXCLUDES = {
    "max_loss_increase": ("mlp_ratio", "attention_ratio"),
    "mlp_ratio": ("max_loss_increase", "units"),
    "attention_ratio": ("max_loss_increase", "units"),
    "units": ("mlp_ratio", "attention_ratio"),
}
"""Config-file options that are ignored when the command line sets the option on the left."""


def config_from(config_file: Path | None, given: Given) -> PrunerConfig | ThresholdConfig:
    """Build the config of a run; options of the command line replace those of the file.

    Raises:
        ConfigError: The file can't be read, an unknown name, or options that contradict each other.
    """
    return merge_options(read_options(config_file) if config_file else {}, given)


def merge_options(values: Given, given: Given) -> PrunerConfig | ThresholdConfig:
    """Build the config of a run from the options of a file and those of the command line, which replace them.

    Raises:
        ConfigError: An unknown name, or options that contradict each other.
    """
    return build_config(combine_options(values, given))


def combine_options(values: Given, given: Given) -> Given:
    """Return options with others that replace them: those of the same name, and those that these exclude."""
    replaced = set(_replaced(given))
    combined = {**{name: value for name, value in values.items() if name not in replaced}, **given}
    both = [options.get("recovery") for options in (values, given)]
    if all(isinstance(options, dict) for options in both):
        combined["recovery"] = {**both[0], **both[1]}  # type: ignore[dict-item]
    return combined


def _replaced(given: Given) -> Iterator[str]:
    """Yield the options of the file that the command line replaces beside those of the same name."""
    for sizes in _SIZES:
        if any(name in given for name in sizes):
            yield from sizes
    for name, others in _EXCLUDES.items():
        if given.get(name) not in (None, False):
            yield from others


def eval_options(given: Given) -> EvalOptions:
    """Build the options of the measurement; ``--benchmark`` covers speed and peak memory."""
    return EvalOptions(**given, memory=given.get("benchmark", True))
