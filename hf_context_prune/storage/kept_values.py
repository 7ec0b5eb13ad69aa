"""Plain values of finished work in a resume folder: one JSON file, whole or absent, that belongs to exactly one key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_context_prune.errors import SaveError
from hf_context_prune.utils.files import write_file
from hf_context_prune.utils.reading import read_json


def read_kept_values(path: Path, key: str) -> Any:  # noqa: ANN401 - JSON values
    """Return the values of a file that was written whole with this key; else None: the work is done again.

    Args:
        path: The file; it need not exist.
        key: See [`resume_key`][].
    """
    try:
        kept = read_json(path)
    except (OSError, ValueError):  # absent, cut short by a kill, or damaged
        return None
    return kept.get("values") if isinstance(kept, dict) and kept.get("key") == key else None


def write_kept_values(path: Path, values: Any, key: str, *, what: str) -> None:  # noqa: ANN401 - JSON values
    """Write a file that replaces an older one as a whole.

    Args:
        path: The file; its folder is made.
        values: JSON values.
        key: See [`resume_key`][].
        what: The work that the file holds, for the message: "measured widths".

    Raises:
        SaveError: The folder can't be made, or the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"The {what} can't be kept in {path}: {error}. Name another folder (resume_dir).") from error
    write_file(path, json.dumps({"key": key, "values": values}))
