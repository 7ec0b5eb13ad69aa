"""A single file on its way to its place, and the removal of those that killed runs have left on the way."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .descriptors import lock_descriptor


@contextmanager
def staged_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file beside a path that replaces what is there when the block ends, and vanishes when it fails.

    What killed runs left of earlier writes of the path is removed first.

    Raises:
        OSError: The file can't be made, written or put in place.
    """
    _remove_unfinished(path)
    token = secrets.token_hex(8)
    staged, lock = path.with_name(_staged_name(path.name, token)), None
    try:
        with staged.open("xb") as file:
            lock = _lock(file)
            yield file
        staged.replace(path)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _staged_name(name: str, token: str) -> str:
    """Return the name of a staged file. Its last digits prove that this package chose it."""
    seal = hashlib.sha256(f"hf_context_prune {name} {token}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f".{name}.{token}{seal}.tmp"


def _lock(file: BinaryIO) -> int | None:
    """Lock a file until the returned descriptor is closed, or this process dies; None where that is not possible."""
    descriptor = os.dup(file.fileno())
    try:
        if lock_descriptor(descriptor):
            return descriptor
    except BlockingIOError:
        pass  # another run looks whether it is of a killed one
    os.close(descriptor)
    return None


def _remove_unfinished(path: Path) -> None:
    """Remove the staged files of a path that no process has locked: those of killed runs."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"([0-9a-f]{16})[0-9a-f]{16}\.tmp")
    with os.scandir(path.parent) as entries:
        found = [match for entry in entries if (match := pattern.fullmatch(entry.name))]
    for match in found:
        name = match.group()
        if name != _staged_name(path.name, match[1]):
            continue
        with suppress(OSError), (path.parent / name).open("r+b") as file:  # another run may just have removed it
            if (lock := _lock(file)) is not None:
                os.unlink(path.parent / name)
                os.close(lock)
