"""Frozen dataclasses as plain JSON values and back; pydantic checks what is read."""

import dataclasses
import json
import math
import os
import typing
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hf_context_prune.errors import LoadError, NumericsError
from hf_context_prune.utils.files import write_file
from hf_context_prune.utils.reading import read_json, why

_LARGEST = 2**63 - 1

_Dataclass = TypeVar("_Dataclass")


def to_plain(value: object, where: str) -> Any:  # noqa: ANN401 - JSON has no narrower type
    """Return a value of dicts, lists, tuples and scalars with its tuples as lists.

    Args:
        value: The value.
        where: Name of the value in errors.

    Raises:
        NumericsError: A number is NaN, infinite or an integer beyond 64 bits, which not every reader of JSON can hold.
    """
    if isinstance(value, dict):
        return {key: to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise NumericsError(f"{where} is {value}; a report holds finite numbers only.")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise NumericsError(f"{where} has over {len(str(_LARGEST)) - 1} digits; a report holds 64-bit integers only.")
    return value


def decode(kind: type[_Dataclass], value: object, where: str) -> _Dataclass:
    """Return plain JSON values as a dataclass.

    Unknown keys and values of another type are refused (an integer may stand for a float); a key may be absent where
    the dataclass has a default.

    Args:
        kind: The dataclass.
        value: Plain JSON values.
        where: Name of the value in errors.

    Raises:
        LoadError: The value does not fit; names the key, what it holds and what it must hold.
        ContextPruneError: The dataclass itself refuses the values.
    """
    try:
        text = json.dumps(to_plain(value, where))
    except NumericsError as error:
        raise LoadError(f"{error} The file is damaged.") from error
    except RecursionError as error:
        raise LoadError(f"{where} is nested too deeply; the file is damaged.") from error
    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if isinstance(refusal := first.get("ctx", {}).get("error"), Exception):  # of the dataclass's own __post_init__
            raise refusal from error
        place = where + "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"])
        if word := {"missing": "missing", "unexpected_keyword_argument": "unknown"}.get(first["type"]):
            raise LoadError(f"{place} is {word}; the file is damaged.") from error
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise LoadError(f"{place} is {first['input']!r:.80}: {message}. The file is damaged.") from error


def now() -> str:
    """Return the UTC time, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Saved:
    """Base of the dataclasses that are saved as reports."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values (dicts, lists, str, int, float, None).

        Raises:
            NumericsError: A figure is NaN or infinite; names it.
        """
        return typing.cast(dict[str, Any], to_plain(dataclasses.asdict(typing.cast(Any, self)), "report"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON with sorted keys; `path` is replaced whole or stays as it was.

        Raises:
            NumericsError: A figure is NaN or infinite; nothing is written.
            SaveError: The file can't be written.
        """
        write_file(
            path, json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        )


def load_json(path: str | os.PathLike[str]) -> Any:  # noqa: ANN401 - JSON has no narrower type
    """Read the plain values of a saved report.

    Raises:
        LoadError: The file is missing or is no JSON.
    """
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise LoadError(f"{os.fspath(path)!r} is not a readable evaluation report: {why(error)}") from error
