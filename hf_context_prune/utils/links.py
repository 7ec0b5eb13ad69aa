"""Files of a folder that may be copied or uploaded: regular ones that lie in the folder, and not where a link leads."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hf_context_prune.errors import ContextPruneError, LoadError

_HUB_CACHE = ("models--", "datasets--", "spaces--")
_REMEDY = "Put the file itself there, or remove it."


def resolve_inside(
    folder: str | Path, name: str, error: type[ContextPruneError] = LoadError, *, remedy: str = _REMEDY
) -> Path:
    """Return the real path of a file of a folder, after checking that the file lies there; the file is not opened.

    Links are followed as far as they stay in the folder. A snapshot of the Hub's cache may also link to the ``blobs``
    of its own repository.

    Args:
        folder: The folder, which may itself be a link.
        name: Relative path of the file.
        error: Type of the error.
        remedy: Last sentence of the error.

    Raises:
        ContextPruneError: The file is missing, is no regular file (a pipe, a device, a folder), or a link to it, or to
            a folder on the way, leads out of the folder.
    """
    root = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(root / name))
    if not any(real.is_relative_to(place) for place in (root, *_own_blobs(root))):
        raise error(
            f"{name} in {folder} leads to {real}, which is outside of the folder, and such links are not followed. "
            f"{remedy}"
        )
    try:
        mode = real.lstat().st_mode
    except OSError as failure:
        raise error(f"{name} in {folder} can't be read ({failure.strerror or failure}). {remedy}") from failure
    if not stat.S_ISREG(mode):
        raise error(f"{name} in {folder} is not a regular file. {remedy}")
    return real


def list_inside(folder: str | Path, error: type[ContextPruneError] = LoadError, *, remedy: str = _REMEDY) -> list[str]:
    """Return the relative paths of all files below a folder, sorted, after checking each with [`resolve_inside`][].

    Raises:
        ContextPruneError: As [`resolve_inside`][]; links to folders are refused wherever they lead.
    """
    names = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        names += [Path(root, name).relative_to(folder).as_posix() for name in (*links, *files)]
    for name in names:
        resolve_inside(folder, name, error, remedy=remedy)
    return sorted(names)


def _own_blobs(root: Path) -> list[Path]:
    """Return the ``blobs`` folder of the repository of which a folder is a snapshot, or of a folder in a snapshot."""
    for place in (root, *root.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith(_HUB_CACHE):
            return [place.parent.parent / "blobs"]
    return []
