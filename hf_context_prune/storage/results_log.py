"""Finished rows of a long run, one JSON line each, so that the same run, started again, goes on from them."""

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
    """A file of rows by key; its first line says what they were measured with.

    Args:
        path: Made if it is not there.
        setting: All that the rows depend on, as JSON values.

    Raises:
        ConfigError: The file holds rows of another setting, or is none of ours.
        SaveError: It can't be read or written.
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
            raise ConfigError(f"{path} is not a file of rows that this tool wrote. Name another --output.")
        differing = sorted(name for name in known.keys() | setting.keys() if known.get(name) != setting.get(name))
        if differing:
            raise ConfigError(
                f"{path} holds rows that were measured with other values of {', '.join(differing)}. Name another "
                f"--output, or remove the file to begin anew."
            )
        self.rows = {json.dumps(line["key"]): line for line in lines[1:]}

    def get(self, key: Sequence[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a key: as it was measured before, or measured now and kept."""
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
            if rest:  # a line that a kill cut short
                os.truncate(self.path, len(f"{whole}\n".encode()) if whole else 0)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path} is not a file of rows that this tool wrote ({error}).") from error
        except OSError as error:
            raise SaveError(f"{self.path} can't be read: {error.strerror or error}. Name another --output.") from error
        lines = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                if number == 1:  # the setting
                    raise ConfigError(f"{self.path} is not a file of rows that this tool wrote ({error}).") from error
                raise ConfigError(
                    f"Line {number} of {self.path} is damaged ({error}). Remove that line, and its row is measured "
                    f"again; or name another --output."
                ) from error
        if not all(isinstance(line, dict) for line in lines):
            raise ConfigError(f"{self.path} is not a file of rows that this tool wrote. Name another --output.")
        return lines

    def _append(self, row: Mapping[str, Any], *, new: bool = False) -> None:
        try:
            line = json.dumps(row, allow_nan=False) + "\n"
        except ValueError as error:
            raise NumericsError(
                f"A figure of the row {row.get('key')} for {self.path} is NaN or Inf, so it is not kept. Load the "
                f"model in float32."
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
            if size is not None:  # no half a line
                with suppress(OSError):
                    os.truncate(self.path, size)
            raise SaveError(
                f"A row could not be written to {self.path}: {error.strerror or error}. Rows that were finished before "
                f"are kept; mend that, or free some space, and run the same command again."
            ) from error


@contextmanager
def open_results_log(path: Path, setting: Mapping[str, Any]) -> Iterator[ResultsLog]:
    """[`ResultsLog`][] that no other run can write meanwhile.

    Raises:
        ConfigError: See [`ResultsLog`][].
        SaveError: Another run has them, or they can't be read or written.
    """
    with hold_lock(Path(os.path.realpath(path))):
        yield ResultsLog(path, setting)
