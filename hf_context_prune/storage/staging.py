"""The staged write of a folder: a kill, a full disk or an error leaves the target absent or whole.

A folder is written beside its target under the name ``.<name>.staging-<random>``, made durable, sealed with a manifest
(`manifest.py`), and put in place by one rename. An older folder of ours at the target is exchanged in one step where
the system can (Linux), else it stands as ``.<name>.previous`` for the moment between two renames. What a killed run
leaves behind is swept, or put back, by the next run for the same target.

Two runs for one target exclude each other by a lock in the system's temporary folder: on one machine, for one user.
Two machines that share a disk do not see each other's lock, so there each run needs an output folder of its own.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hf_context_prune.errors import ContextPruneError, LoadError, SaveError

from .files import check_writable, find_existing_folder, hold_lock
from .manifest import find_unlisted_files, fsync_folder, read_manifest, verify_folder, write_manifest

_MARGIN_BYTES = 16 * 2**20
_NAME_MAX = 255  # bytes, on every common file system
_HARMLESS = {".cache", ".DS_Store", "__pycache__"}  # made by tools beside any folder, and made anew
_DEBRIS = re.compile(r"\..+\.(staging-[0-9a-f]{16}|previous)", re.DOTALL)
_WRITE_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENFILE, errno.EMFILE, errno.ENAMETOOLONG),
}
_LOGGER = logging.getLogger(__name__)


def check_target(target: str | os.PathLike[str], *, discard_edits: bool = False, replaces: str | None = None) -> None:
    """Refuse a folder that can't or must not be written, before the long work; leaves nothing behind.

    Allowed is a path that is absent (missing parents are made later), an empty folder, or a folder that this package
    saved and to which nobody added files. A link is followed, if it leads to one of these folders.

    Args:
        target: The output folder.
        discard_edits: Its card may have been edited by hand; it is lost.
        replaces: File that marks the folders of ours that may be replaced; None: a folder of any kind.

    Raises:
        SaveError: The target is something else, or its parent is not a folder that may be written.
    """
    goal = resolve_target(target)
    _check_occupant(goal, discard_edits=discard_edits, replaces=replaces)
    check_writable(goal.parent)


def resolve_target(target: str | os.PathLike[str]) -> Path:
    """The absolute path of a target, links followed.

    Args:
        target: The output folder.

    Raises:
        SaveError: It is a place that can't be replaced by a rename: the current folder or one that holds it, a mount
            point, a link to no folder, a name that is too long or is kept for unfinished runs.
    """
    goal = Path(os.path.realpath(os.path.expanduser(target)))
    if goal == Path.cwd() or goal in Path.cwd().parents:
        raise SaveError(
            f"{os.fspath(target)!r} is the current folder or holds it, and can't be replaced from inside: "
            f"name a new folder in it, such as --output mini-gpt."
        )
    if os.path.ismount(goal):
        raise SaveError(f"{goal} is a mount point and can't be replaced: name a folder in it, as --output {goal}/model")
    if os.path.islink(target) and not os.path.isdir(goal):
        raise SaveError(f"{target} is a link to {goal}, which is no folder: remove it or choose another --output.")
    if len(os.fsencode(_new_staging_path(goal).name)) > _NAME_MAX:
        raise SaveError(f"The name {goal.name!r} is too long: choose an --output name of at most 200 bytes.")
    if _DEBRIS.fullmatch(goal.name):
        raise SaveError(f"The name {goal.name!r} is kept for unfinished runs: choose another --output.")
    return goal


def _check_occupant(goal: Path, *, discard_edits: bool = False, replaces: str | None = None) -> None:
    """Refuse to replace anything but an empty folder or an untouched one of ours (but for its card, if so asked)."""
    if not os.path.lexists(goal):
        return
    remedy = "choose another --output, or move or remove it."
    if not goal.is_dir():
        raise SaveError(f"{goal} exists and is a file: {remedy}")
    try:
        if _is_empty(goal):
            return
    except OSError as error:
        raise SaveError(f"{goal} exists and can't be read ({error.strerror}): {remedy}") from error
    manifest = read_manifest(goal)
    if manifest is None:
        raise SaveError(f"{goal} exists, is not empty and was not made by this package (it has no manifest): {remedy}")
    if replaces is not None and replaces not in manifest["files"]:
        raise SaveError(
            f"{goal} was made by this package, but as something else (it has no {replaces}), which would be lost: "
            f"{remedy}"
        )
    foreign = [name for name in find_unlisted_files(goal, manifest) if not _HARMLESS.intersection(name.split("/"))]
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise SaveError(
            f"{goal} was made by this package, but holds files that it did not save and that would be lost ({shown}): "
            f"move them away, or choose another --output."
        )
    try:
        verify_folder(goal, allow_edits=discard_edits)
    except LoadError as error:
        raise SaveError(
            f"{goal} was made by this package, but was changed since, and the changes would be lost ({error}): {remedy}"
        ) from error


def _is_empty(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


@contextmanager
def staged_folder(
    target: str | os.PathLike[str],
    *,
    required_bytes: int,
    wait_seconds: float = 0,
    discard_edits: bool = False,
    replaces: str | None = None,
) -> Iterator[Path]:
    """Yield a new empty folder that becomes the target when the block ends, and vanishes when the block fails.

    Args:
        target: The folder to make or replace; see `check_target`.
        required_bytes: What will be written, in bytes; that plus 5 % and 16 MiB must be free.
        wait_seconds: How long to wait for another run that is saving to the same target.
        discard_edits: Replace an older folder of ours although its card was edited.
        replaces: As for `check_target`.

    Yields:
        The absolute path of the staging folder.

    Raises:
        SaveError: The target can't be written, another process is saving to it, the disk is or becomes full, or a
            write fails. Other exceptions of the block pass as they are. In each case the target is as it was.
    """
    goal = resolve_target(target)
    with hold_lock(goal, wait_seconds):
        needed = required_bytes + required_bytes // 20 + _MARGIN_BYTES
        staging = _new_staging_path(goal)
        new_parents = [folder for folder in goal.parents if not os.path.exists(folder)]
        in_block = False
        try:
            _sweep(goal)
            check_target(goal, discard_edits=discard_edits, replaces=replaces)
            goal.parent.mkdir(parents=True, exist_ok=True)
            _check_space(goal, required_bytes, needed)
            staging.mkdir()
            in_block = True
            yield staging
            in_block = False
            write_manifest(staging)
            _check_occupant(
                goal, discard_edits=discard_edits, replaces=replaces
            )  # again: the block may have taken hours
            older = _put_in_place(staging, goal)
            _finish(goal, new_parents, older)
        except BaseException as error:
            save_error = _as_save_error(error, staging, goal, needed, in_block=in_block)
            _clean_up(staging, new_parents, error)
            if save_error is None:
                raise
            raise save_error from error


def _new_staging_path(goal: Path) -> Path:
    return goal.with_name(f".{goal.name}.staging-{secrets.token_hex(8)}")


def _previous_path(goal: Path) -> Path:
    return goal.with_name(f".{goal.name}.previous")


def _sweep(goal: Path) -> None:
    """Put back an older folder that a killed run had moved aside, and remove what else dead runs left behind."""
    if not goal.parent.is_dir():
        return
    previous = _previous_path(goal)
    if previous.is_dir():
        occupied = os.path.lexists(goal) and not (goal.is_dir() and _is_empty(goal))
        if not occupied and _is_whole(previous):
            os.rename(previous, goal)
            _LOGGER.warning("A run was killed while it replaced %s; the older folder was put back.", goal)
        elif read_manifest(previous) is not None or _is_empty(previous):
            _remove(previous, goal)
        else:
            raise SaveError(
                f"{previous} is in the way and was not made by this package: move it, or choose another --output."
            )
    staging = re.compile(re.escape(f".{goal.name}.staging-") + "[0-9a-f]{16}")
    for path in sorted(goal.parent.iterdir()):
        if staging.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _remove(path, goal)


def _is_whole(folder: Path) -> bool:
    try:
        verify_folder(folder)
    except OSError:  # LoadError is one
        return False
    return True


def _remove(path: Path, goal: Path) -> None:
    """Remove a folder such that it is never met half removed: under its name it is there or not."""
    dead = _new_staging_path(goal)
    os.rename(path, dead)
    shutil.rmtree(dead)


def _check_space(goal: Path, required: int, needed: int) -> None:
    free = shutil.disk_usage(goal.parent).free
    if free < needed:
        raise SaveError(
            f"{goal.parent} has {_size(free)} free, but saving needs {_size(needed)} (the model's {_size(required)} "
            f"plus 5 % and 16 MiB): free {_size(needed - free)} or choose another --output."
        )


def _put_in_place(staging: Path, goal: Path) -> Path | None:
    """Rename the finished folder to its target; return where the older one is now, if there was one."""
    if not os.path.lexists(goal):
        os.rename(staging, goal)
        return None
    if _exchange(staging, goal):
        return staging
    previous = _previous_path(goal)
    try:
        os.rename(goal, previous)
        os.rename(staging, goal)
    except BaseException:
        if previous.exists() and not os.path.lexists(goal):
            os.rename(previous, goal)
        raise
    return previous


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system can't."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # musl before 1.2.5
        return False
    at_fdcwd, rename_exchange = -100, 2  # fcntl.h, linux/fs.h
    if renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), ctypes.c_uint(rename_exchange)) == 0:
        return True
    number = ctypes.get_errno()
    # EPERM: a sandbox that doesn't know the call. Where it means the folder, the renames that follow say so too.
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), os.fspath(first), None, os.fspath(second))


def _finish(goal: Path, new_parents: list[Path], older: Path | None) -> None:
    """Make the new name durable and remove the older folder. The target is whole by now: a failure only warns."""
    try:
        for folder in (goal.parent, *(parent.parent for parent in new_parents)):
            fsync_folder(folder)
        if older is not None:
            _remove(older, goal)
    except OSError as error:
        message = "%s is saved, but a last step failed (%s): a power cut now may undo it, or debris is left beside it."
        _LOGGER.warning(message, goal, error)


def _clean_up(staging: Path, new_parents: list[Path], error: BaseException) -> None:
    try:
        if staging.exists():
            shutil.rmtree(staging)
        for folder in new_parents:  # innermost first
            if folder.is_dir() and _is_empty(folder):
                folder.rmdir()
    except OSError as failure:
        error.add_note(f"The staging folder could not be removed: {failure}. The next run for this target does it.")


def _as_save_error(error: BaseException, staging: Path, goal: Path, needed: int, *, in_block: bool) -> SaveError | None:
    """The SaveError for a failed write; None for an error that is not one. To be called before the clean-up.

    `OSError` of our own steps always is one. In the caller's block it is one if it names a file in the staging folder,
    or names none (as `write` does) and has an error number of writing. `safetensors` and `tokenizers` raise their own
    and bare exceptions, with the system's error number in the text.
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
    if name is not None and Path(name) != staging:
        where = f"{os.path.relpath(name, staging)} of {goal}" if Path(name).is_relative_to(staging) else name
    elif isinstance(error, SafetensorError):
        where = f"the *.safetensors weights of {goal}"
    else:
        files = [path for path in staging.rglob("*") if path.is_file()] if staging.is_dir() else []
        newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
        where = f"{newest.relative_to(staging)} of {goal}" if newest else str(goal)
    state = "It is as it was before." if os.path.lexists(goal) else "Nothing was put in place."
    return SaveError(f"Could not write {where}: {reason}. {state} {_remedy(number, staging, goal, needed)}")


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
        return f"Free {_size(missing if missing > 0 else needed)} {where} or choose another --output."
    return "Mend that and run again, or choose another --output."


def _size(number: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number} bytes ({number / factor:.1f} {unit})"
    return f"{number} bytes"
