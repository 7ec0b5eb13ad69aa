"""This user's folder for temporary files, and folders in it that are removed even if their run was killed."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hf_context_prune.errors import SaveError

from .failed_writes import find_failed_write

_SWEEP_SECONDS = 10.0
"""Longest wait for a sweep by another run, which may look at a lock between its making and its locking."""
_REMEDY = "Make room there, or set TMPDIR to a writable folder with free space."


def own_temporary_folder() -> Path:
    """Return a folder for this user alone in ``$TMPDIR``: in one of all users another could put a file or a link.

    Raises:
        SaveError: It can't be made, or belongs to another user.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    try:
        folder = Path(tempfile.gettempdir(), f"hf_context_prune-{user}")
    except FileNotFoundError as error:  # it tries several, and names them
        raise SaveError(f"Temporary files can't be written: {error.strerror}. {_REMEDY}") from error
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != user):
            raise OSError("it is not a folder of this user")
    except OSError as error:
        raise SaveError(
            f"The folder {folder} for temporary files can't be used: {error.strerror or error}. {_REMEDY}"
        ) from error
    return folder


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder for temporary files, and remove it at the end.

    Folders that killed runs have left are removed first: the system frees the lock of a process that dies.

    Raises:
        SaveError: The folder can't be made, or a write to it failed in the block. Other exceptions of the block pass
            unchanged.
    """
    root = own_temporary_folder()
    _sweep(root)
    folder = root / f"scratch-{secrets.token_hex(8)}"
    # The thread that removes the folder of a push is not the one that made it.
    lock, in_block = FileLock(folder.with_suffix(".lock"), thread_local=False), False
    try:
        lock.acquire(timeout=_SWEEP_SECONDS)
        folder.mkdir(mode=0o700)
        in_block = True
        yield folder
    except Exception as error:
        failed = find_failed_write(error, folder, any_os_error=not in_block)
        if failed is None:
            raise
        raise SaveError(
            f"{failed.path or 'A file'} in the folder for temporary files could not be written: "
            f"{failed.reason}. {_REMEDY}"
        ) from error
    finally:
        _remove(folder, lock)


def _sweep(root: Path) -> None:
    for path in root.glob("scratch-*.lock"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # its run is at work, or has just removed it
            continue
        _remove(path.with_suffix(""), lock)


def _remove(folder: Path, lock: FileLock) -> None:
    """Remove a folder, then its lock file: as long as that is there, the next run tries again."""
    shutil.rmtree(folder, ignore_errors=True)
    if not os.path.lexists(folder):
        with suppress(OSError):  # absent; or on Windows, where it can't be removed while it is open
            os.unlink(lock.lock_file)
    lock.release()
