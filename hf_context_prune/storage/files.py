"""Single files that are written whole or not at all, and locks that keep two runs out of one place."""

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
    """The path itself, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if os.path.lexists(folder))


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder in which nothing can be made, before the long work; leaves nothing behind.

    Args:
        folder: May be absent, and so may its parents.

    Raises:
        SaveError: It or what would hold it is a file, or may not be written.
    """
    existing = find_existing_folder(Path(os.path.abspath(os.path.expanduser(folder))))
    if not existing.is_dir():
        raise SaveError(f"{existing} is not a folder, so nothing can be made in it: choose another --output.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SaveError(f"{existing} can't be written by this user: change its permissions or choose another --output.")


@contextmanager
def hold_lock(goal: Path, wait_seconds: float = 0, *, what: str | None = None) -> Iterator[None]:
    """Hold the lock of a file or folder that this run writes. The system frees it when a process dies.

    Args:
        goal: Its absolute path; need not exist.
        wait_seconds: How long to wait for another run.
        what: What the other run is doing, for the message; by default saving to the goal.

    Raises:
        SaveError: Another run has it still.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0  # another user's file in a shared folder can't be opened
    key = hashlib.sha256(os.fsencode(goal)).hexdigest()[:32]
    path = Path(tempfile.gettempdir(), f"hf_context_prune-{user}-{key}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout as error:
        doing = what or f"saving to {goal}"
        raise SaveError(f"Another run is {doing}: wait for it to end, or choose another --output.") from error
    except OSError as error:
        raise SaveError(f"The lock file {path} can't be used ({error.strerror}): remove it and run again.") from error
    try:
        yield
    finally:
        lock.release()


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file; it is replaced whole, or stays as it was.

    Args:
        path: In a folder that is there.
        content: Text is written as UTF-8.

    Raises:
        SaveError: It can't be written.
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
            f"{path} could not be written: {error.strerror or error}. Name a place in a writable folder with free "
            f"space; what was there before is as it was."
        ) from error
