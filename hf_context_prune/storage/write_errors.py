"""Sentences for failed writes: the file, the reason, the state of the target, and a remedy."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from hf_context_prune.errors import ContextPruneError, SaveError

from .files import find_existing_folder

_WRITE_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENFILE, errno.EMFILE, errno.ENAMETOOLONG),
}


def explain_failed_write(
    error: BaseException, staging: Path, goal: Path, needed: int, *, in_block: bool
) -> SaveError | None:
    """Return the SaveError for a failed write of a folder, or None for an error that is not a failed write.

    Call this function before the staging folder is removed: it reads which file was written last.

    An `OSError` outside the caller's block is always a failed write. Inside the block it is one if it names a file in
    the staging folder, or names no file (as `write` does) and has an error number of writing. `safetensors` and
    `tokenizers` raise their own and bare exceptions, with the system's error number in the text.

    Args:
        error: The exception that ended the write.
        staging: The staging folder.
        goal: The target.
        needed: Bytes that the write needs.
        in_block: Whether the caller's block raised the error.
    """
    if isinstance(error, ContextPruneError):
        return None
    number, reason, name = None, str(error), None
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or str(error)
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else None
        inside = name is not None and Path(name).is_relative_to(staging)
        if in_block and not inside and (name is not None or number not in _WRITE_ERRNOS):
            return None
    else:
        match = re.search(r"\(os error (\d+)\)", reason)
        number = int(match.group(1)) if match and os.name == "posix" else None
        if not isinstance(error, SafetensorError) and (type(error) is not Exception or number not in _WRITE_ERRNOS):
            return None
        reason = os.strerror(number) if number is not None else reason
    state = "The target is as it was before." if os.path.lexists(goal) else "Nothing was put in place."
    where = _locate(error, name, staging, goal)
    return SaveError(f"Could not write {where}: {reason}. {state} {_remedy(number, staging, goal, needed)}")


def _locate(error: BaseException, name: str | None, staging: Path, goal: Path) -> str:
    """Return the file that could not be written: the named one, else the weights or the file written last."""
    if name is not None and Path(name) != staging:
        return f"{os.path.relpath(name, staging)} of {goal}" if Path(name).is_relative_to(staging) else name
    if isinstance(error, SafetensorError):
        return f"the *.safetensors weights of {goal}"
    files = [path for path in staging.rglob("*") if path.is_file()] if staging.is_dir() else []
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    return f"{newest.relative_to(staging)} of {goal}" if newest else str(goal)


def _remedy(number: int | None, staging: Path, goal: Path, needed: int) -> str:
    parent = find_existing_folder(goal.parent)
    if number == errno.EFBIG:
        return "The file is over this process's file-size limit: raise it (ulimit -f) or choose another --output."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Change the permissions of {parent} or choose another --output."
    if number in (errno.EBUSY, errno.EXDEV):
        return f"{goal} seems to be a mount point: name a folder in it as --output."
    if number in (errno.ENOSPC, errno.EDQUOT):
        written = sum(path.lstat().st_size for path in staging.rglob("*")) if staging.is_dir() else 0
        missing = needed - written - shutil.disk_usage(parent).free
        where = "in your quota" if number == errno.EDQUOT else f"on the disk of {parent}"
        return f"Free {format_bytes(missing if missing > 0 else needed)} {where} or choose another --output."
    return "Remove the cause and run again, or choose another --output."


def format_bytes(number: int) -> str:
    """Return a number of bytes, also in kB, MB or GB if it is large."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number} bytes ({number / factor:.1f} {unit})"
    return f"{number} bytes"
