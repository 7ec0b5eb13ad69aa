"""Records of JSON files: one per line, the elements of one list, or values one after the other.

pyarrow and `datasets` are not used: pyarrow 25 ends the process by a signal for a line that is null, and it reads text
that looks like a date as a time.
"""

import gzip
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from hf_context_prune.errors import DataError

from .records import Record

_MAX_BYTES = 2**29
_BLANKS = re.compile(r"[ \t\n\r]*")


def read_json_records(file: Path) -> Iterator[Record]:
    """Yield the records of a JSON file, which may be compressed by gzip; a string becomes a record with a text.

    Lines are read one by one if the first that is not blank is a whole value, other than a list; else the whole file is
    read.

    Raises:
        DataError: A value is no record, or over 512 MiB would have to be read at once.
        ValueError: It is no JSON, or no UTF-8.
    """
    with _open(file) as opened:
        number, begun = 0, False
        for line in iter(lambda: opened.readline(_MAX_BYTES + 1), b""):
            number += 1
            text = _checked(line, file).decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                if begun:
                    raise ValueError(f"{error.msg} in line {number:,}, column {error.colno:,}") from error
                value = []  # it may go on in the next line
            if not begun and isinstance(value, list):
                rest = _checked(line + opened.read(_MAX_BYTES + 1 - len(line)), file)
                yield from _read_whole(rest.decode("utf-8-sig"), file)
                return
            begun = True
            yield _record(value, f"{file}: line {number:,}")


def _open(file: Path) -> BufferedIOBase:
    return gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")


def _checked(part: bytes, file: Path) -> bytes:
    if len(part) > _MAX_BYTES:
        raise DataError(
            f"{file}: over {_MAX_BYTES:,} bytes would have to be read at once; write one record per line, and divide "
            f"longer texts"
        )
    return part


def _read_whole(text: str, file: Path) -> Iterator[Record]:
    values, what = list(_values(text)), "value {:,}"
    if len(values) == 1 and isinstance(values[0], list):
        values, what = values[0], "element {:,} of the list"
    for number, value in enumerate(values, start=1):
        yield _record(value, f"{file}: {what.format(number)}")


def _values(text: str) -> Iterator[Any]:
    decoder, position = json.JSONDecoder(), 0
    while (position := _skip_blanks(text, position)) < len(text):
        value, position = decoder.raw_decode(text, position)
        yield value


def _skip_blanks(text: str, position: int) -> int:
    match = _BLANKS.match(text, position)
    return position if match is None else match.end()


def _record(value: object, where: str) -> Record:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    shown = "null" if value is None else f"{value!r:.40}"
    raise DataError(f'{where} is {shown}, not a record; remove it, or write an object such as {{"text": ...}}')
