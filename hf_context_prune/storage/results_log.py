"""Finished rows of a long run, one JSON line each, from which the same run resumes when it is started again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hf_context_prune.errors import ConfigError, NumericsError, SaveError

from .files import hold_lock


class ResultsLog:
    """A file of rows by key, whose first line holds the setting in which they are measured.

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
        lines = self._read()
        if not lines or (len(lines) == 1 and lines[0].keys() == {"setting"}):  # nothing was measured yet
            if lines:
                os.truncate(path, 0)
            self._append({"setting": setting}, new=True)
            return
        known = lines[0].get("setting")
        if not isinstance(known, dict) or any("key" not in line for line in lines[1:]):
            raise ConfigError(f"{path} is not a file of rows of this package. Name another --output.")
        differing = sorted(name for name in known.keys() | setting.keys() if known.get(name) != setting.get(name))
        if differing:
            raise ConfigError(
                f"{path} holds rows that were measured with other values of {', '.join(differing)}. Name another "
                f"--output, or remove the file to measure all rows again."
            )
        self.rows = {json.dumps(line["key"]): line for line in lines[1:]}

    def get_or_measure(self, key: Sequence[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of a key: the row on disk, or one that is measured now and written."""
        name = json.dumps(key)
        if name not in self.rows:
            row = {"key": list(key), **measure()}
            self._append(row)
            self.rows[name] = json.loads(json.dumps(row))
        return self.rows[name]

    def _read(self) -> list[dict[str, Any]]:
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            whole, _, rest = text.rpartition("\n")
            if rest:  # a line that was not finished when the run was killed
                os.truncate(self.path, len(f"{whole}\n".encode()) if whole else 0)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path} is not a file of rows of this package ({error}).") from error
        except OSError as error:
            raise SaveError(f"{self.path} can't be read: {error.strerror or error}. Name another --output.") from error
        lines = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                if number == 1:  # the setting
                    raise ConfigError(f"{self.path} is not a file of rows of this package ({error}).") from error
                raise ConfigError(
                    f"Line {number} of {self.path} is damaged ({error}). Remove that line, so that its row is measured "
                    f"again, or name another --output."
                ) from error
        if not all(isinstance(line, dict) for line in lines):
            raise ConfigError(f"{self.path} is not a file of rows of this package. Name another --output.")
        return lines

    def _append(self, row: Mapping[str, Any], *, new: bool = False) -> None:
        try:
            line = json.dumps(row, allow_nan=False) + "\n"
        except ValueError as error:
            raise NumericsError(
                f"A number in the row {row.get('key')} for {self.path} is NaN or Inf, so the row is not written. Load "
                f"the model in float32."
            ) from error
        size = None
        try:
            if new:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                size = os.fstat(file.fileno()).st_size
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if size is not None:  # leave no half line
                with suppress(OSError):
                    os.truncate(self.path, size)
            raise SaveError(
                f"A row could not be written to {self.path}: {error.strerror or error}. Earlier rows are kept: free "
                f"some space or change the permissions, and run the same command again."
            ) from error


@contextmanager
def open_results_log(path: Path, setting: Mapping[str, Any]) -> Iterator[ResultsLog]:
    """Open a [`ResultsLog`][] and lock it, so that no other run can write to it.

    Raises:
        ConfigError: See [`ResultsLog`][].
        SaveError: Another run holds the lock, or the file can't be read or written.
    """
    with hold_lock(Path(os.path.realpath(path))):
        yield ResultsLog(path, setting)
