"""Small files that somebody else may have written: read within bounds of time and memory, and parsed strictly."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Hashable
from typing import Any

import yaml

from .files import open_regular

MAX_JSON_BYTES = 16 * 2**20
MAX_YAML_BYTES = 2**18
_MAX_JSON_PARTS, _MAX_JSON_VALUES = 500_000, 7_000_000
_MAX_YAML_NODES, _MAX_YAML_DEPTH, _LONGEST_NUMBER = 10_000, 32, 40


def read_bounded(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a whole file, if it is a regular one and not too large.

    Raises:
        OSError: See [`open_regular`][].
        ValueError: It is too large; the message is a part of a sentence.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has over {max_bytes:,} bytes")
    return content


def read_text(path: str | os.PathLike[str], max_bytes: int) -> str:
    """Read a UTF-8 file as [`read_bounded`][] does.

    Raises:
        OSError: See [`open_regular`][].
        ValueError: See [`read_bounded`][]; or it is not UTF-8.
    """
    try:
        return read_bounded(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start:,})") from error


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_JSON_BYTES) -> Any:  # noqa: ANN401
    """Read a JSON file.

    Python's own parser would take NaN, infinity, half characters, and the last of several values of one key.

    Args:
        path: The file.
        max_bytes: The largest size.

    Raises:
        OSError: See [`open_regular`][].
        ValueError: It is no JSON, too large, nested too deeply, or holds one of the above; the message is a part of a
            sentence.
    """
    text = read_text(path, max_bytes)
    if text.count("{") + text.count("[") > _MAX_JSON_PARTS or text.count(",") > _MAX_JSON_VALUES:
        raise ValueError("it has too many parts")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if "\\ud" in text.lower():
        check_characters(json.dumps(value, ensure_ascii=False))
    return value


def check_characters(text: str) -> None:
    """Refuse half characters (lone surrogates), which can be neither shown nor saved.

    Raises:
        ValueError: The text holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half a character ({text[error.start]!r})") from error


def why(error: Exception) -> str:
    """Return what a reader of this module raised as a part of a sentence, without the path."""
    return (isinstance(error, OSError) and error.strerror) or str(error).rstrip(".")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {next(name for name in counts if counts[name] > 1)!r:.80} is there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


def read_yaml(path: str | os.PathLike[str]) -> Any:  # noqa: ANN401 - YAML has no narrower type
    """Read a YAML file of plain values: no tags, no key twice, and what aliases stand for counts.

    Raises:
        OSError: See [`open_regular`][].
        ValueError: See [`parse_yaml`][]; or the file is too large or not UTF-8.
    """
    return parse_yaml(read_text(path, MAX_YAML_BYTES))


def parse_yaml(text: str) -> Any:  # noqa: ANN401 - YAML has no narrower type
    """Return the value of a YAML text, as [`read_yaml`][] does.

    Raises:
        ValueError: It is no YAML, has too many values, is nested too deeply, or holds a tag, a number beyond 64 bits,
            half a character, a key twice, or an alias of what it is a part of.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it has over {MAX_YAML_BYTES:,} characters")
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(_in_words(error)) from error


def _in_words(error: Exception) -> str:
    """Return an error of PyYAML on one line, without its picture of the place."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None or error.problem_mark is None:
        return " ".join(str(error).split())
    mark, said = error.problem_mark, error.problem
    said = f"{error.context}, {said}" if said.startswith("but ") else said
    return f"{said} (line {mark.line + 1:,}, column {mark.column + 1:,})"


class _PlainLoader(yaml.SafeLoader):
    """A `SafeLoader` that refuses whatever is more than plain values, while it reads."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - nodes of PyYAML
        event = self.peek_event()  # type: ignore[no-untyped-call]
        before, is_alias = self._nodes, isinstance(event, yaml.AliasEvent)
        if is_alias and event.anchor not in self._sizes:
            raise _at(event, f"the alias *{event.anchor} stands for nothing before it")
        if not is_alias and event.tag is not None:
            raise _at(event, f"the tag {event.tag} is not read: write a plain value")
        self._nodes += self._sizes[event.anchor] if is_alias else 1  # an alias counts as all that it stands for
        if self._nodes > _MAX_YAML_NODES:
            raise _at(event, f"there are over {_MAX_YAML_NODES:,} values")
        if self._depth > _MAX_YAML_DEPTH:
            raise _at(event, f"values are nested over {_MAX_YAML_DEPTH} deep")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:  # noqa: ANN401
        found = super().construct_mapping(node, deep=deep)
        if len(found) < len(node.value):
            raise _at(node, "a key of this mapping is there twice")
        return found

    def construct_scalar(self, node: Any) -> Any:  # noqa: ANN401
        value = super().construct_scalar(node)
        try:
            check_characters(value)
        except ValueError as error:
            raise _at(node, str(error)) from error
        return value

    def construct_number(self, node: Any) -> int | float:  # noqa: ANN401
        make = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        if len(node.value) <= _LONGEST_NUMBER:
            number: int | float = make(node)
            if isinstance(number, float) or abs(number) < 2**63:
                return number
        raise _at(node, f"{node.value[:20]}... is a number beyond 64 bits")

    def construct_date(self, node: Any) -> Any:  # noqa: ANN401
        try:
            return self.construct_yaml_timestamp(node)
        except ValueError as error:
            raise _at(node, f"{node.value} is no date: {error}") from error


_PlainLoader.add_constructor("tag:yaml.org,2002:timestamp", _PlainLoader.construct_date)
for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _PlainLoader.construct_number)


def _at(place: Any, problem: str) -> yaml.MarkedYAMLError:  # noqa: ANN401 - a node or event
    return yaml.MarkedYAMLError(None, None, problem, place.start_mark)
