"""Folders of unfinished work, which a later run removes: an empty file marks each as made by this package.

The marker is the first file that is made in such a folder and the last one that is removed. A kill at any moment leaves
a folder that is marked or empty, and a folder of another program is neither.

A run holds the lock of the marker while it works in the folder, so that no other run takes the folder for one that a
killed run has left. Windows and some network file systems have no such lock.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hf_context_prune.utils.descriptors import lock_descriptor

MARKER = ".hf_context_prune-unfinished"


def make_own(folder: Path) -> None:
    """Make a folder with its marker.

    Raises:
        OSError: The folder exists, or can't be made.
    """
    folder.mkdir()
    try:
        mark_own(folder)
    except BaseException:
        with suppress(OSError):  # an empty folder is removed by the next run, too
            folder.rmdir()
        raise


def mark_own(folder: Path) -> None:
    """Mark an empty folder.

    Raises:
        OSError: The marker exists, or can't be made.
    """
    (folder / MARKER).touch(exist_ok=False)


@contextmanager
def hold_own(folder: Path) -> Iterator[None]:
    """Hold the lock of a marked folder. The system frees it when the process dies.

    Raises:
        BlockingIOError: Another run is at work in the folder.
        OSError: The folder has no marker, or it can't be opened.
    """
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(folder / MARKER, flags)
    try:
        if lock_descriptor(descriptor):
            os.stat(folder / MARKER)  # the run that had the lock until now may have removed it
            yield
            return
    finally:
        os.close(descriptor)
    yield  # without a lock the file is closed: Windows removes no open file


def is_live(folder: Path) -> bool:
    """Return whether a run is at work in a folder; False where the system has no lock that could tell.

    Raises:
        OSError: The marker can't be opened.
    """
    try:
        with hold_own(folder):
            return False
    except BlockingIOError:
        return True
    except (FileNotFoundError, NotADirectoryError):  # it was removed meanwhile, or was never marked
        return False


def is_own(folder: Path) -> bool:
    """Return whether a path is a folder (no link to one) that this package made: marked, or empty."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return False
        return is_empty(folder) or stat.S_ISREG((folder / MARKER).lstat().st_mode)
    except OSError:  # it vanished, can't be read, or holds no marker
        return False


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing."""
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def remove_left(folder: Path) -> None:
    """Remove a folder of which [`is_own`][] is true and in which no run is at work.

    Raises:
        BlockingIOError: A run is at work in it.
        OSError: Something in it can't be removed; the marker is still there.
    """
    if is_empty(folder):
        os.rmdir(folder)  # which fails if its run marks it now
        return
    with hold_own(folder):
        _empty(folder, keep=MARKER)
    remove_own(folder)


def remove_own(folder: Path, held: ExitStack | None = None) -> None:
    """Remove a folder of which [`is_own`][] is true.

    Args:
        folder: The folder.
        held: Holds the lock of this run, which is freed before the marker is removed: a network file system keeps a
            removed file until it is closed.

    Raises:
        OSError: Something in it can't be removed; the marker is still there.
    """
    _empty(folder, keep=MARKER)
    if held is not None:
        held.close()
    remove_folder(folder, last=MARKER)


def remove_folder(folder: Path, *, last: str) -> None:
    """Remove a folder, and the file that proves whose folder it is only after all others. Links are not followed."""
    _empty(folder, keep=last)
    with suppress(FileNotFoundError):
        os.unlink(folder / last)
    os.rmdir(folder)


def _empty(folder: Path, *, keep: str) -> None:
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.name != keep]
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
