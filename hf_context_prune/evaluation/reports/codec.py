"""Frozen dataclasses to plain JSON values and back, strict in both directions."""

import dataclasses
import json
import math
import os
import types
import typing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_context_prune.errors import LoadError, NumericsError
from hf_context_prune.storage.files import write_file


def plain(value: object, where: str) -> Any:  # noqa: ANN401 - JSON has no narrower type
    """Return what `dataclasses.asdict` gave with tuples as lists; `where` names the value in errors.

    Raises:
        NumericsError: If a number is NaN or infinite, which JSON can't hold.
    """
    if isinstance(value, dict):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise NumericsError(f"{where} is {value}; a report holds finite numbers only. Find out what went wrong there.")
    return value


def decode(annotation: Any, value: object, where: str) -> Any:  # noqa: ANN401 - any annotation, any value
    """Return `value` (plain JSON) as what `annotation` says: a dataclass, tuple, dict, union with None, or scalar.

    Raises:
        LoadError: If a key is missing or unknown, or a value has another type; the message names the place.
    """
    if dataclasses.is_dataclass(annotation):
        return _decode_dataclass(annotation, value, where)
    if annotation is Any:
        return value
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else decode(inner, value, where)
    if origin is dict:
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in _expect(dict, value, where).items()}
    if origin is tuple:
        items = _expect(list, value, where)
        kinds = [arguments[0]] * len(items) if arguments[1:] == (Ellipsis,) else list(arguments)
        if len(items) != len(kinds):
            raise LoadError(f"{where} has {len(items)} items; it must have {len(kinds)}.")
        return tuple(
            decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, items, strict=True))
        )
    if annotation is int:
        return _expect_int(_expect(int, value, where), where)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(_expect_int(value, where))
    if origin is typing.Literal:
        if value not in arguments:
            raise LoadError(f"{where} is {value!r:.80}; it must be one of {', '.join(arguments)}. The file is damaged.")
        return value
    return _expect(annotation, value, where)


def now() -> str:
    """UTC time, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Saved:
    """What the dataclasses that are saved as reports have in common."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values (dicts, lists, str, int, float, None).

        Raises:
            NumericsError: If a figure is NaN or infinite; the message names it.
        """
        return typing.cast(dict[str, Any], plain(dataclasses.asdict(typing.cast(Any, self)), "report"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON with sorted keys; `path` is replaced whole or stays as it was.

        Raises:
            NumericsError: If a figure is NaN or infinite; nothing is written.
            SaveError: If the file can't be written.
        """
        write_file(
            path, json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        )


def load_json(path: str | os.PathLike[str]) -> Any:  # noqa: ANN401 - JSON has no narrower type
    """Read a saved report's plain values.

    Raises:
        LoadError: If the file is missing or no JSON.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(data, ensure_ascii=False).encode()  # what can't be written can't be shown: half a character, say
        return data
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{os.fspath(path)!r} is not a readable evaluation report: {error}") from error


def _decode_dataclass(kind: Any, value: object, where: str) -> Any:  # noqa: ANN401 - the instance of a given class
    given = _expect(dict, value, where)
    fields = typing.get_type_hints(kind)
    if given.keys() != fields.keys():
        missing, unknown = sorted(fields.keys() - given.keys()), sorted(given.keys() - fields.keys())
        raise LoadError(f"{where} lacks the keys {missing} and has the unknown keys {unknown}; the file is damaged.")
    return kind(**{name: decode(hint, given[name], f"{where}.{name}") for name, hint in fields.items()})


def _expect_int(value: int, where: str) -> int:
    if abs(value) >= 2**63:
        raise LoadError(f"{where} has over {len(str(2**63)) - 1} digits; the file is damaged.")
    return value


def _expect(kind: type, value: object, where: str) -> Any:  # noqa: ANN401 - an instance of `kind`
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise LoadError(f"{where} is {value!r:.80}; it must be of type {kind.__name__}. The file is damaged.")
    return value
