"""The staged write of a folder: a kill, a full disk or an error leaves the target absent or whole.

A folder is written beside its target under the name ``.<name>.staging-<random>``, made durable, sealed with a manifest
(`manifest.py`), and put in place by one rename. An older folder of this package at the target is exchanged in one step
where the system can do that (Linux); elsewhere it has the name ``.<name>.previous`` for the moment between two renames.
The next run for the same target removes, or puts back, the folders that a killed run has left.

Two runs for one target exclude each other by a lock in the system's temporary folder: on one machine, for one user.
Two machines that share a disk do not see each other's lock, so there each run needs its own output folder.
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

from hf_context_prune.errors import LoadError, SaveError

from .files import check_writable, hold_lock
from .manifest import find_unlisted_files, fsync_folder, read_manifest, verify_folder, write_manifest
from .write_errors import explain_failed_write, format_bytes

_MARGIN_BYTES = 16 * 2**20
_NAME_MAX = 255  # bytes, on every common file system
_HARMLESS = {".cache", ".DS_Store", "__pycache__"}  # tools make them in any folder, and make them again
_DEBRIS = re.compile(r"\..+\.(staging-[0-9a-f]{16}|previous)", re.DOTALL)
_LOGGER = logging.getLogger(__name__)


def check_target(target: str | os.PathLike[str], *, discard_edits: bool = False, replaces: str | None = None) -> None:
    """Refuse a folder that can't or must not be written, before the long work; leave nothing behind.

    Allowed are a path that is absent (missing parents are made later), an empty folder, and a folder that this package
    saved and to which nobody added files. A link to one of these folders is followed.

    Args:
        target: The output folder.
        discard_edits: Allow a folder whose card was edited by hand; the edits are lost.
        replaces: File that a folder of this package must have to be replaced; None: any folder of this package.

    Raises:
        SaveError: The target is something else, or its parent is not a writable folder.
    """
    goal = resolve_target(target)
    _check_occupant(goal, discard_edits=discard_edits, replaces=replaces)
    check_writable(goal.parent)


def resolve_target(target: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a target, with links followed.

    Args:
        target: The output folder.

    Raises:
        SaveError: A rename can't replace the target: it is the current folder or holds it, is a mount point or a link
            to no folder, or its name is too long or is reserved for unfinished runs.
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
        raise SaveError(
            f"{target} is a link to {goal}, which is not a folder: remove the link or choose another --output."
        )
    if len(os.fsencode(_new_staging_path(goal).name)) > _NAME_MAX:
        raise SaveError(f"The name {goal.name!r} is too long: choose an --output name of at most 200 bytes.")
    if _DEBRIS.fullmatch(goal.name):
        raise SaveError(f"The name {goal.name!r} is reserved for unfinished runs: choose another --output.")
    return goal


def _check_occupant(goal: Path, *, discard_edits: bool = False, replaces: str | None = None) -> None:
    """Refuse to replace anything but an empty folder or an unchanged folder of this package (see `discard_edits`)."""
    if not os.path.lexists(goal):
        return
    remedy = "choose another --output, or move or remove the target."
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
            f"{goal} was made by this package, but is another kind of folder (it has no {replaces}), which would be "
            f"lost: {remedy}"
        )
    foreign = [name for name in find_unlisted_files(goal, manifest) if not _HARMLESS.intersection(name.split("/"))]
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise SaveError(
            f"{goal} was made by this package, but holds files that the package did not save and that would be lost "
            f"({shown}): move them away, or choose another --output."
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
        required_bytes: Bytes that will be written; these plus 5 % and 16 MiB must be free.
        wait_seconds: How long to wait for another run that is saving to the same target.
        discard_edits: Replace an older folder of this package even if its card was edited.
        replaces: As for `check_target`.

    Yields:
        The absolute path of the staging folder.

    Raises:
        SaveError: The target can't be written, another process is saving to the target, the disk is or becomes full,
            or a write fails. Other exceptions of the block pass unchanged. In each case the target is as it was.
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
            # Again, because the block may have taken hours.
            _check_occupant(goal, discard_edits=discard_edits, replaces=replaces)
            older = _put_in_place(staging, goal)
            _finish(goal, new_parents, older)
        except BaseException as error:
            save_error = explain_failed_write(error, staging, goal, needed, in_block=in_block)
            _clean_up(staging, new_parents, error)
            if save_error is None:
                raise
            raise save_error from error


def _new_staging_path(goal: Path) -> Path:
    return goal.with_name(f".{goal.name}.staging-{secrets.token_hex(8)}")


def _previous_path(goal: Path) -> Path:
    return goal.with_name(f".{goal.name}.previous")


def _sweep(goal: Path) -> None:
    """Put back an older folder that a killed run had moved aside, and remove all else that dead runs have left."""
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
                f"{previous} is in the way and was not made by this package: move that folder, or choose another "
                f"--output."
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
    """Remove a folder at once, by renaming it first, so that no run ever finds half of it under its name."""
    dead = _new_staging_path(goal)
    os.rename(path, dead)
    shutil.rmtree(dead)


def _check_space(goal: Path, required: int, needed: int) -> None:
    free = shutil.disk_usage(goal.parent).free
    if free < needed:
        raise SaveError(
            f"{goal.parent} has {format_bytes(free)} free, but saving needs {format_bytes(needed)} (the model's "
            f"{format_bytes(required)} plus 5 % and 16 MiB): free {format_bytes(needed - free)} or choose another "
            f"--output."
        )


def _put_in_place(staging: Path, goal: Path) -> Path | None:
    """Rename the finished folder to its target; return the present path of the older folder, if there was one."""
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
    """Swap two folders in one step; return False where the system or the file system can't."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # musl before 1.2.5
        return False
    at_fdcwd, rename_exchange = -100, 2  # fcntl.h, linux/fs.h
    if renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), ctypes.c_uint(rename_exchange)) == 0:
        return True
    number = ctypes.get_errno()
    # EPERM: a sandbox that doesn't know the call. If it is about the folder, the renames that follow fail with it too.
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), os.fspath(first), None, os.fspath(second))


def _finish(goal: Path, new_parents: list[Path], older: Path | None) -> None:
    """Make the new name durable and remove the older folder. The target is already whole, so a failure only warns."""
    try:
        for folder in (goal.parent, *(parent.parent for parent in new_parents)):
            fsync_folder(folder)
        if older is not None:
            _remove(older, goal)
    except OSError as error:
        message = (
            "%s is saved, but a last step failed (%s): a power cut now may undo the save, or leave files beside it."
        )
        _LOGGER.warning(message, goal, error)


def _clean_up(staging: Path, new_parents: list[Path], error: BaseException) -> None:
    try:
        if staging.exists():
            shutil.rmtree(staging)
        for folder in new_parents:  # innermost first
            if folder.is_dir() and _is_empty(folder):
                folder.rmdir()
    except OSError as failure:
        error.add_note(f"The staging folder could not be removed: {failure}. The next run for this target removes it.")
