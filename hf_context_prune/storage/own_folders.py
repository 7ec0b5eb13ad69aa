"""Folders of unfinished work, which a later run removes: an empty file marks each as made by this package.

The marker is the first file that is made in such a folder and the last one that is removed. A kill at any moment leaves
a folder that is marked or empty, and a folder of another program is neither.
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

MARKER = ".hf_context_prune-unfinished"


def make_own(folder: Path) -> None:
    """Make a folder with its marker.

    Raises:
        OSError: The folder exists, or can't be made.
    """
    folder.mkdir()
    mark_own(folder)


def mark_own(folder: Path) -> None:
    """Mark an empty folder.

    Raises:
        OSError: The marker exists, or can't be made.
    """
    (folder / MARKER).touch(exist_ok=False)


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


def remove_own(folder: Path) -> None:
    """Remove a folder of which [`is_own`][] is true.

    Raises:
        OSError: Something in it can't be removed; the marker is still there.
    """
    remove_folder(folder, last=MARKER)


def remove_folder(folder: Path, *, last: str) -> None:
    """Remove a folder, and the file that proves whose folder it is only after all others. Links are not followed."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.name != last]
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    with suppress(FileNotFoundError):
        os.unlink(folder / last)
    os.rmdir(folder)
