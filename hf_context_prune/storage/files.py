"""Single files that are written whole or not at all, and locks against two runs with one target."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hf_context_prune.errors import SaveError


def find_existing_folder(path: Path) -> Path:
    """Return the path itself if it exists, else the nearest existing folder above it."""
    return next(folder for folder in (path, *path.parents) if os.path.lexists(folder))


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder in which nothing can be made, before the long work; leave nothing behind.

    Args:
        folder: The folder; it and its parents need not exist.

    Raises:
        SaveError: The folder, or its nearest existing parent, is a file or is not writable.
    """
    existing = find_existing_folder(Path(os.path.abspath(os.path.expanduser(folder))))
    if not existing.is_dir():
        raise SaveError(f"{existing} is not a folder, so nothing can be made in it: choose another --output.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SaveError(f"{existing} can't be written by this user: change its permissions or choose another --output.")


@contextmanager
def hold_lock(goal: Path, wait_seconds: float = 0, *, what: str | None = None) -> Iterator[None]:
    """Hold the lock of a file or folder that this run writes. The system frees the lock when the process dies.

    Args:
        goal: Absolute path of the file or folder, which need not exist.
        wait_seconds: How long to wait for another run.
        what: The work of the other run, for the message; by default "saving to" the goal.

    Raises:
        SaveError: Another run still has the lock, or the lock file can't be used.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0  # another user's lock file can't be opened
    key = hashlib.sha256(os.fsencode(goal)).hexdigest()[:32]
    path = Path(tempfile.gettempdir(), f"hf_context_prune-{user}-{key}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout as error:
        doing = what or f"saving to {goal}"
        raise SaveError(f"Another run is {doing}: wait for it to end, or choose another --output.") from error
    except OSError as error:
        raise SaveError(
            f"The lock file {path} can't be used ({error.strerror}): remove the file and run again."
        ) from error
    try:
        yield
    finally:
        lock.release()


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file: an older file is replaced as a whole, or stays as it was.

    Args:
        path: The file, in an existing folder.
        content: Bytes, or text, which is written as UTF-8.

    Raises:
        SaveError: The file can't be written.
    """
    path = Path(path)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staged.write_bytes(content.encode() if isinstance(content, str) else content)
        staged.replace(path)
    except OSError as error:
        with suppress(OSError):
            staged.unlink()
        raise SaveError(
            f"{path} could not be written: {error.strerror or error}. Name a file in a writable folder with free "
            f"space; an older file is as it was."
        ) from error
