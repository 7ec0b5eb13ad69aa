"""Places that can be written, checked before the long work."""

from __future__ import annotations

import os
from pathlib import Path

from hf_context_prune.errors import SaveError
from hf_context_prune.utils.files import expand_home


def find_existing_folder(path: Path) -> Path:
    """Return the path itself if it exists, else the nearest existing folder above it."""
    return next(folder for folder in (path, *path.parents) if os.path.lexists(folder))


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder in which nothing can be made, before the long work; leave nothing behind.

    Args:
        folder: The folder; it and its parents need not exist.

    Raises:
        ConfigError: The path names the home folder of an unknown user.
        SaveError: The folder, or its nearest existing parent, is a file or is not writable.
    """
    existing = find_existing_folder(Path(os.path.abspath(expand_home(folder, SaveError))))
    if not existing.is_dir():
        raise SaveError(f"{existing} is not a folder, so nothing can be made in it: choose another --output.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SaveError(f"{existing} can't be written by this user: change its permissions or choose another --output.")
