"""Sentences for failed writes: the file, the reason, the state of the target, and a remedy."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from hf_context_prune.errors import SaveError
from hf_context_prune.utils.failed_writes import find_failed_write

from .files import find_existing_folder


def explain_failed_write(
    error: BaseException, staging: Path, goal: Path, needed: int, *, in_block: bool
) -> SaveError | None:
    """Return the SaveError for a failed write of a folder, or None for an error that is not a failed write.

    Call this function before the staging folder is removed: it reads which file was written last.

    Args:
        error: The exception that ended the write.
        staging: The staging folder.
        goal: The target.
        needed: Bytes that the write needs.
        in_block: Whether the caller's block raised the error: outside it, every `OSError` is a failed write.
    """
    failed = find_failed_write(error, staging, any_os_error=not in_block)
    if failed is None:
        return None
    state = "The target is as it was before." if os.path.lexists(goal) else "Nothing was put in place."
    path = failed.path
    if path is not None and not path.is_relative_to(staging.parent):
        remedy = _remedy(failed.number, path)
        return SaveError(f"Could not write {path}: {failed.reason}. {state} {remedy} and run again.")
    written = sum(path.lstat().st_size for path in staging.rglob("*")) if staging.is_dir() else 0
    remedy = _remedy(failed.number, goal, needed - written)
    where = _locate(error, path, staging, goal)
    return SaveError(f"Could not write {where}: {failed.reason}. {state} {remedy} or choose another --output.")


def _locate(error: BaseException, path: Path | None, staging: Path, goal: Path) -> str:
    """Return the file that could not be written: the named one, else the weights or the file written last."""
    if path is not None and staging in path.parents:
        return f"{path.relative_to(staging)} of {goal}"
    if isinstance(error, SafetensorError):
        return f"the *.safetensors weights of {goal}"
    files = [path for path in staging.rglob("*") if path.is_file()] if staging.is_dir() else []
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    return f"{newest.relative_to(staging)} of {goal}" if newest else str(goal)


def _remedy(number: int | None, path: Path, needed: int = 0) -> str:
    """Return the beginning of a sentence: what to do so that a path can be written, with bytes that are yet needed."""
    parent = find_existing_folder(path.parent)
    free = shutil.disk_usage(parent).free
    if number is None and free < needed:
        number = errno.ENOSPC  # numpy does not tell the number
    if number == errno.EFBIG:
        return "The file is over this process's file-size limit: raise it (ulimit -f)"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Change the permissions of {parent}"
    if number in (errno.EBUSY, errno.EXDEV):
        return f"{path} seems to be a mount point: name a folder in it as --output,"
    if number == errno.ENOSPC and has_no_inodes(parent):
        return f"The disk of {parent} has no inodes left: remove some files there"
    if number in (errno.ENOSPC, errno.EDQUOT):
        amount = format_bytes(needed - free if needed > free else needed) if needed > 0 else "some space"
        return f"Free {amount} {'in your quota' if number == errno.EDQUOT else f'on the disk of {parent}'}"
    return "Remove the cause,"


def has_no_inodes(folder: Path) -> bool:
    """Return whether the disk of a folder has room for no further file, whatever its size."""
    if not hasattr(os, "statvfs"):
        return False  # Windows
    found = os.statvfs(folder)
    return found.f_files > 0 and found.f_favail == 0  # some file systems count no inodes


def format_bytes(number: int) -> str:
    """Return a number of bytes, also in kB, MB or GB if it is large."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number} bytes ({number / factor:.1f} {unit})"
    return f"{number} bytes"
