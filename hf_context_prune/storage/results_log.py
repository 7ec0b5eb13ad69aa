"""Finished rows of a long run, one JSON line each, from which the same run resumes when it is started again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from hf_context_prune.errors import ConfigError, NumericsError, SaveError
from hf_context_prune.utils.files import open_regular, resolve_path
from hf_context_prune.utils.locks import hold_lock

_FIRST, _OTHER = b'{"setting"', b'{"key"'
"""What the first line of a log begins with, and every other line."""
_MAX_BYTES = 128 * 2**20


class ResultsLog:
    """A file of rows by key, whose first line holds the setting in which they are measured.

    A file that was not written by this class is left as it is, and a link, a named pipe, a device or a folder in its
    place is not opened. Only a line of this class that a kill cut short is removed.

    Args:
        path: The file; made if it does not exist.
        setting: All values that the rows depend on, as JSON values.

    Raises:
        ConfigError: The file holds rows of another setting, or was not written by this class.
        SaveError: The file can't be read or written.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        self.path, self.rows = path, dict[str, dict[str, Any]]()
        setting = json.loads(json.dumps(setting))
        content = self._read()
        whole, _, rest = content.rpartition(b"\n")
        if not whole and _is_json(rest):  # only the end of the line is missing
            whole, rest = rest, b""
        lines = self._parse(whole)
        if rest:
            self._check_begun(rest, _OTHER if lines else _FIRST)
        known = lines[0]["setting"] if lines else {}
        # No row was measured, in this setting or in another one with the same fields: of another run of this command.
        if not lines or (len(lines) == 1 and known.keys() == setting.keys()):
            if content:
                self._cut(0)
            self._append({"setting": setting}, new=True)
            return
        differing = sorted(name for name in known.keys() | setting.keys() if known.get(name) != setting.get(name))
        if differing:
            raise ConfigError(
                f"{path} holds rows that were measured with other values of {', '.join(differing)}. Name another "
                f"--output, or remove the file to measure all rows again."
            )
        if rest:
            self._cut(len(whole) + 1)
        self.rows = {json.dumps(line["key"]): line for line in lines[1:]}

    def get_or_measure(self, key: Sequence[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of a key: the row on disk, or one that is measured now and written."""
        name = json.dumps(key)
        if name not in self.rows:
            row = {"key": list(key), **measure()}
            self._append(row)
            self.rows[name] = json.loads(json.dumps(row))
        return self.rows[name]

    def _read(self) -> bytes:
        """Return the content of the file; nothing if there is none. A file that is not a log is refused."""
        if not os.path.lexists(self.path):
            return b""
        try:
            with open_regular(self.path, follow_links=False) as file:
                content = file.read(len(_FIRST))
                if content and content != _FIRST:
                    raise self._foreign(f"it does not begin with {_FIRST.decode()}")
                content += file.read(_MAX_BYTES)
                if len(content) > _MAX_BYTES:
                    raise self._foreign(f"it is larger than {_MAX_BYTES} bytes")
                return content
        except OSError as error:
            raise SaveError(f"{self.path} can't be read: {error.strerror or error}. Name another --output.") from error

    def _foreign(self, reason: object) -> ConfigError:
        return ConfigError(f"{self.path} is not a file of rows of this package ({reason}). Name another --output.")

    def _parse(self, whole: bytes) -> list[dict[str, Any]]:
        """Return the lines that were finished: the setting, and rows."""
        lines: list[dict[str, Any]] = []
        for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                if number == 1:  # the setting
                    raise self._foreign(error) from error
                raise ConfigError(
                    f"Line {number} of {self.path} is damaged ({error}). Remove that line, so that its row is measured "
                    f"again, or name another --output."
                ) from error
        first, *others = lines or [{"setting": {}}]
        if not isinstance(first, dict) or first.keys() != {"setting"} or not isinstance(first["setting"], dict):
            raise self._foreign("its first line is not a setting")
        if not all(isinstance(line, dict) and "key" in line for line in others):
            raise self._foreign("not all lines are rows")
        return lines

    def _check_begun(self, rest: bytes, start: bytes) -> None:
        """Refuse a last line without an end that this class did not begin: it would be lost."""
        if rest[: len(start)] != start[: len(rest)]:
            raise ConfigError(
                f"The last line of {self.path} is not a row of this package, and would be lost. Remove the line, or "
                f"name another --output."
            )

    def _cut(self, size: int) -> None:
        """Keep the first bytes of the file; the others are a line that a kill cut short, or a setting without rows."""
        try:
            with self._open_to_write() as file:
                os.ftruncate(file.fileno(), size)
        except OSError as error:
            raise SaveError(
                f"{self.path} can't be written: {error.strerror or error}. Change its permissions, or name another "
                f"--output."
            ) from error

    def _open_to_write(self) -> BinaryIO:
        """Open the file to append; a link is not followed."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # as far as the system has them
            flags |= getattr(os, name, 0)
        return os.fdopen(os.open(self.path, flags, 0o666), "ab")

    def _append(self, row: Mapping[str, Any], *, new: bool = False) -> None:
        try:
            line = json.dumps(row, allow_nan=False) + "\n"
        except ValueError as error:
            raise NumericsError(
                f"A number in the row {row.get('key')} for {self.path} is NaN or Inf, so the row is not written. Load "
                f"the model in float32."
            ) from error
        try:
            if new:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open_to_write() as file:
                size = os.fstat(file.fileno()).st_size
                try:
                    file.write(line.encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    with suppress(OSError):  # leave no half line
                        os.ftruncate(file.fileno(), size)
                    raise
        except OSError as error:
            raise SaveError(
                f"A row could not be written to {self.path}: {error.strerror or error}. Earlier rows are kept: free "
                f"some space or change the permissions, and run the same command again."
            ) from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


@contextmanager
def open_results_log(path: Path, setting: Mapping[str, Any]) -> Iterator[ResultsLog]:
    """Open a [`ResultsLog`][] and lock it, so that no other run can write to it.

    Raises:
        ConfigError: See [`ResultsLog`][].
        SaveError: Another run holds the lock, or the file can't be read or written.
    """
    with hold_lock(resolve_path(path, SaveError)):
        yield ResultsLog(path, setting)
