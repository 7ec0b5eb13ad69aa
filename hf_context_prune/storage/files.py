"""Places that can be written, checked before the long work."""

from __future__ import annotations

import os
from pathlib import Path

from hf_context_prune.errors import SaveError
from hf_context_prune.utils.files import expand_home

from .manifest import read_manifest


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


def refuse_inside_own(path: Path) -> None:
    """Refuse an output inside a saved folder, whose manifest does not list it: that folder could not be loaded again.

    Args:
        path: Absolute path of the output, with links resolved; it need not exist.

    Raises:
        SaveError: A folder above the path was saved by this package.
    """
    for folder in path.parents:
        if read_manifest(folder) is not None:
            raise SaveError(
                f"{path} lies in {folder}, a folder that this package saved: its manifest would no longer fit it. "
                f"Choose another --output."
            )
