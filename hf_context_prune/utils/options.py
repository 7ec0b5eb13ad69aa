"""Options as dataclass fields, whose metadata hold help text, panel of ``--help`` and allowed values.

The values are checked, and the command line is made, from these fields.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from hf_context_prune.errors import ConfigError, unknown_name

from .files import expand_home
from .reading import read_yaml, why

Config = TypeVar("Config")

PANELS = (
    *("Budget", "Vocabulary", "Method", "Text"),
    *("Paper's thresholds", "Evaluation", "Questions", "Generation", "Model", "Output"),
)
"""Panels of ``--help``, in their order."""
BUDGET, VOCABULARY, METHOD, TEXT, PAPER, EVALUATION, QUESTIONS, GENERATION, MODEL, OUTPUT = PANELS
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


@dataclass(frozen=True)
class Allowed:
    """The values that an option may have.

    Attributes:
        test: Returns whether a value is one of them.
        text: The same in words, for the error: "it must be ...".
    """

    test: Callable[[Any], bool]
    text: str


def is_number(value: object) -> bool:
    """Return whether a value is a finite number (and no bool)."""
    if isinstance(value, float):
        return math.isfinite(value)
    return is_integer(value)


def is_integer(value: object) -> bool:
    """Return whether a value is an integer (and no bool)."""
    return isinstance(value, int) and not isinstance(value, bool)


def at_least(lowest: int, bits: int = 63) -> Allowed:
    """Allow integers from a lowest one up to what generators and tensors take, or fewer bits."""
    return Allowed(
        lambda value: is_integer(value) and lowest <= value < 2**bits,
        f"an integer of at least {lowest}, below 2^{bits}",
    )


def below_one(example: str) -> Allowed:
    """Allow shares from 0 up to, not including, 1."""
    return Allowed(lambda value: is_number(value) and 0 <= value < 1, f"a share in [0, 1): {example}")


def above_zero(example: str) -> Allowed:
    """Allow shares above 0, up to 1."""
    return Allowed(lambda value: is_number(value) and 0 < value <= 1, f"a share above 0, up to 1: {example}")


def name_such_as(example: str) -> Allowed:
    """Allow strings that are not blank."""
    return Allowed(lambda value: isinstance(value, str) and bool(value.strip()), f"a name, such as {example!r}")


class OptionHelp(str):
    """The help text of an option with what else is known of the option.

    It is one string because HfArgumentParser hands all metadata of a field to argparse, which refuses unknown keys. The
    attributes are the arguments of [`option`][].
    """

    panel: str | None
    allowed: Allowed | None
    flag: str | None
    metavar: str | None


def option(
    default: Any,  # noqa: ANN401 - of the option's own type
    help: str,
    *,
    panel: str | None = None,
    allowed: Allowed | None = None,
    flag: str | None = None,
    metavar: str | None = None,
) -> Any:  # noqa: ANN401 - a dataclass field, as `dataclasses.field` returns it
    """Return the field of an option.

    Args:
        default: Its default; `dataclasses.MISSING` if it has none.
        help: Its help text (HfArgumentParser reads it by this name).
        panel: The panel of ``--help`` that shows it.
        allowed: Its values, where the annotation does not give them (names of a Literal, true and false).
        flag: Its flag without dashes, if that is not the name of the field.
        metavar: How ``--help`` shows its value, if not by its type.
    """
    about = OptionHelp(help)
    about.panel, about.allowed, about.flag, about.metavar = panel, allowed, flag, metavar
    return field(default=default, metadata={"help": about})


def help_of(item: Field[Any]) -> OptionHelp | None:
    """Return the help text of a config's field; None if the field is no option of the command line."""
    found: OptionHelp | None = item.metadata.get("help")
    return found


def check_options(config: object) -> None:
    """Check every option of a config by its annotation and its metadata.

    Raises:
        ConfigError: A value that is not allowed.
    """
    hints = get_type_hints(type(config))
    for item in fields(config):  # type: ignore[arg-type]
        name, value, hint = item.name, getattr(config, item.name), hints[item.name]
        if value is None and type(None) in get_args(hint):
            continue
        names = choices(hint)
        if names and value not in names:
            raise ConfigError(unknown_name(name, value, names))
        if bool in (hint, *get_args(hint)) and not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}; it must be true or false.")
        about = help_of(item)
        if about is not None and about.allowed is not None and not about.allowed.test(value):
            raise ConfigError(f"{name} is {value!r}; it must be {about.allowed.text}.")


def choices(annotation: object) -> tuple[str, ...]:
    """Return the names that an annotation allows (a Literal, or a Literal or None); empty for any other."""
    parts = (annotation, *get_args(annotation))
    return next((get_args(part) for part in parts if get_origin(part) is Literal), ())


def describe_options(config_class: type[Config]) -> type[Config]:
    """Add the options and their help texts to the docstring of a class, for `help`.

    It may be called before `dataclass` is, which is why the fields are read from the class itself.
    """
    found: dict[str, OptionHelp] = {}
    for base in reversed(config_class.__mro__):
        for name, item in {**vars(base), **getattr(base, "__dataclass_fields__", {})}.items():
            about = help_of(item) if isinstance(item, Field) else None
            if about is not None:
                found[name] = about
    doc = inspect.cleandoc(config_class.__doc__ or "")
    if found and "Attributes:\n" not in doc:
        lines = "\n".join(f"    {name}: {about}" for name, about in found.items())
        config_class.__doc__ = f"{doc}\n\nAttributes:\n{lines}"
    return config_class


class OptionSet:
    """A dataclass of options as a mapping and back."""

    def __init_subclass__(cls) -> None:
        """List the options in the docstring."""
        super().__init_subclass__()
        describe_options(cls)

    def to_dict(self) -> dict[str, Any]:
        """Return all options as plain values."""
        return asdict(self)  # type: ignore[call-overload]

    def to_json_string(self) -> str:
        """Return all options as JSON, sorted by name."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from a mapping of options.

        Raises:
            ConfigError: An unknown key; names the nearest known one.
        """
        return from_options(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a config from a YAML file (a flat mapping).

        Raises:
            ConfigError: The file is missing, not YAML or not a mapping, or has an unknown key.
        """
        return cls.from_dict(read_options(path))


def from_options(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a config from a mapping of options.

    Raises:
        ConfigError: An unknown key, with the nearest known one.
    """
    allowed = [item.name for item in fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in allowed:
            raise ConfigError(unknown_name("option", key, allowed))
    return config_class(**values)


def read_options(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping of options.

    Raises:
        ConfigError: The file is missing, not plain YAML (see [`read_yaml`][]) or not a mapping.
    """
    try:
        values = read_yaml(expand_home(path))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"The config file {path} can't be read: {why(error)}. Correct it.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"The config file {path} holds a {type(values).__name__}; it must be a mapping, as in 'pruning_ratio: 0.2'."
        )
    return {name: _with_numbers(value) for name, value in values.items()}


def _with_numbers(value: Any) -> Any:  # noqa: ANN401 - a value of YAML
    """Return a value, or a mapping of them, with the numbers that 1e-2 or 5e7 mean; YAML 1.1 reads them as strings."""
    if isinstance(value, dict):
        return {name: _with_numbers(item) for name, item in value.items()}
    if not isinstance(value, str) or not _EXPONENT.fullmatch(value):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number


def listed_names(value: object, allowed: Sequence[str]) -> tuple[str, ...] | None:
    """Return the names in ``"tokens,neurons"``, in the order of those allowed; None where it names anything else."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not set(names) <= set(allowed):
        return None
    return tuple(name for name in allowed if name in names)
