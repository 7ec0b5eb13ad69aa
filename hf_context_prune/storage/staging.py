"""The staged write of a folder: a kill, a full disk or an error leaves the target absent or whole.

A folder is written beside its target, inside a folder ``.<name>.staging-<random>`` that is marked as this package's own
(`own_folders.py`). It is made durable, sealed with a manifest (`manifest.py`), and put in place by one rename. An older
folder of this package at the target is exchanged in one step where the system can do that (Linux); elsewhere it has the
name ``.<name>.previous`` for the moment between two renames. The next run for the same target removes, or puts back,
the folders that a killed run has left, and no others.

Two runs for one target exclude each other by a lock (`utils/locks.py`). The staging folder is locked, too: a run with
another temporary folder, or on another machine, neither removes it nor writes beside it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hf_context_prune.errors import LoadError, SaveError
from hf_context_prune.utils.file_names import (
    EXPORT_REPORT_NAME,
    MANIFEST_NAME,
    REPORT_MARKDOWN_NAME,
    SPACE_SETTINGS_NAME,
)
from hf_context_prune.utils.files import resolve_path
from hf_context_prune.utils.locks import hold_lock

from .files import check_writable, find_existing_folder, refuse_inside_own
from .manifest import (
    claims_to_be_ours,
    find_changed_files,
    find_unlisted_files,
    fsync_folder,
    read_manifest,
    verify_folder,
    write_manifest,
)
from .own_folders import hold_own, is_empty, is_live, is_own, make_own, remove_folder, remove_left, remove_own
from .write_errors import explain_failed_write, format_bytes, has_no_inodes

_MARGIN_BYTES = 16 * 2**20
_NAME_MAX = 255  # bytes, on every common file system
_HARMLESS = {".cache", ".DS_Store", "__pycache__"}  # tools make them in any folder, and make them again
_KINDS = {
    EXPORT_REPORT_NAME: "an export",
    SPACE_SETTINGS_NAME: "a Space",
    REPORT_MARKDOWN_NAME: "a rendered report",
}
"""Kinds of saved folders, by the file that tells them; one without any of these files is a model."""
_DEBRIS = re.compile(r"\..+\.(staging-[0-9a-f]{16}|previous)", re.DOTALL)
_LOGGER = logging.getLogger(__name__)


def check_target(target: str | os.PathLike[str], *, discard_edits: bool = False, replaces: str | None = None) -> None:
    """Refuse a folder that can't or must not be written, before the long work; leave nothing behind.

    Allowed are a path that is absent (missing parents are made later), an empty folder, and a folder that this package
    saved and to which nobody added files. A link to one of these folders is followed.

    Args:
        target: The output folder.
        discard_edits: Allow a folder whose card was edited by hand; the edits are lost.
        replaces: File that tells the kind of folder that is written, and that alone may be replaced: ``space.yaml``,
            ``export_report.json`` or ``report.md``; None: a model.

    Raises:
        ConfigError: The target names the home folder of an unknown user.
        SaveError: The target is something else, its parent is not a writable folder, or another run is saving to it.
    """
    goal = resolve_target(target)
    _check_occupant(goal, discard_edits=discard_edits, replaces=replaces)
    check_writable(goal.parent)
    _refuse_beside_other_run(goal)


def resolve_target(target: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a target, with links followed.

    Args:
        target: The output folder.

    Raises:
        ConfigError: The target names the home folder of an unknown user.
        SaveError: The target lies in a folder that this package saved; or a rename can't replace it: it is the current
            folder or holds it, is a mount point or a link to no folder, or its name is too long or is reserved for
            unfinished runs.
    """
    goal = resolve_path(target, SaveError)
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
    refuse_inside_own(goal)
    return goal


def _check_occupant(goal: Path, *, discard_edits: bool = False, replaces: str | None = None) -> None:
    """Refuse to replace anything but an empty folder or an unchanged folder of this package (see `discard_edits`)."""
    if not os.path.lexists(goal):
        return
    remedy = "choose another --output, or move or remove the target."
    if not goal.is_dir():
        raise SaveError(f"{goal} exists and is a file: {remedy}")
    try:
        if is_empty(goal):
            return
    except OSError as error:
        raise SaveError(f"{goal} exists and can't be read ({error.strerror}): {remedy}") from error
    manifest = read_manifest(goal)
    if manifest is None:
        problem = f"its {MANIFEST_NAME} is damaged" if claims_to_be_ours(goal) else "it has no manifest"
        raise SaveError(f"{goal} exists, is not empty and was not made by this package ({problem}): {remedy}")
    held = next((kind for name, kind in _KINDS.items() if name in manifest["files"]), "a model")
    if held != (wanted := "a model" if replaces is None else _KINDS[replaces]):
        raise SaveError(
            f"{goal} was made by this package, but is another kind of folder ({held}, not {wanted}), which would be "
            f"lost: {remedy}"
        )
    if foreign := _find_foreign(goal, manifest):
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


def _find_foreign(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the files in a folder of this package that neither this package nor a common tool put there."""
    return [name for name in find_unlisted_files(folder, manifest) if not _HARMLESS.intersection(name.split("/"))]


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
    with hold_lock(goal, wait_seconds), ExitStack() as held:
        needed = bytes_with_margin(required_bytes)
        place = _new_staging_path(goal)
        staging = place / goal.name
        new_parents = [folder for folder in goal.parents if not os.path.exists(folder)]
        in_block = False
        try:
            _sweep(goal)
            check_target(goal, discard_edits=discard_edits, replaces=replaces)
            goal.parent.mkdir(parents=True, exist_ok=True)
            check_space(goal, required_bytes)
            make_own(place)
            held.enter_context(hold_own(place))
            staging.mkdir()
            in_block = True
            yield staging
            in_block = False
            write_manifest(staging)
            # Again, because the block may have taken hours.
            _check_occupant(goal, discard_edits=discard_edits, replaces=replaces)
            previous = _put_in_place(staging, goal)
            _finish(goal, new_parents, place, previous, held)
        except BaseException as error:
            save_error = explain_failed_write(error, staging, goal, needed, in_block=in_block)
            _clean_up(place, new_parents, error, held)
            if save_error is None:
                raise
            raise save_error from error


def bytes_with_margin(required_bytes: int) -> int:
    """Return the bytes that must be free to write so many: these plus 5 % and 16 MiB."""
    return required_bytes + required_bytes // 20 + _MARGIN_BYTES


def _new_staging_path(goal: Path) -> Path:
    return goal.with_name(f".{goal.name}.staging-{secrets.token_hex(8)}")


def _previous_path(goal: Path) -> Path:
    return goal.with_name(f".{goal.name}.previous")


def _sweep(goal: Path) -> None:
    """Put back an older folder that a killed run had moved aside, and remove all else that dead runs have left."""
    _refuse_beside_other_run(goal)
    previous = _previous_path(goal)
    if os.path.lexists(previous):
        _sweep_previous(previous, goal)
    for place in _find_staging(goal):
        remove_left(place)


def _refuse_beside_other_run(goal: Path) -> None:
    try:
        live = next((place for place in _find_staging(goal) if is_live(place)), None)
    except OSError as error:
        raise SaveError(
            f"{error.filename or goal.parent} can't be read ({error.strerror}), so it is unknown whether another run "
            f"is saving to {goal}: change its permissions or choose another --output."
        ) from error
    if live is not None:
        raise SaveError(
            f"Another run is saving to {goal} (its unfinished work is in {live}): wait for it to end, or choose "
            f"another --output."
        )


def _find_staging(goal: Path) -> list[Path]:
    """Return the staging folders of a target, sorted."""
    if not goal.parent.is_dir():
        return []
    pattern = re.compile(re.escape(f".{goal.name}.staging-") + "[0-9a-f]{16}")
    return sorted(path for path in goal.parent.iterdir() if pattern.fullmatch(path.name) and is_own(path))


def _sweep_previous(previous: Path, goal: Path) -> None:
    occupied = os.path.lexists(goal) and not (goal.is_dir() and is_empty(goal))
    manifest = read_manifest(previous) if stat.S_ISDIR(previous.lstat().st_mode) else None
    if manifest is None and is_own(previous):
        remove_own(previous)
    elif manifest is None or _find_foreign(previous, manifest):
        raise SaveError(
            f"{previous} is in the way and was not made by this package: move it, or choose another --output."
        )
    elif changed := find_changed_files(previous, manifest):
        raise SaveError(
            f"{previous} is in the way: a run was killed while it replaced that folder, and {changed[0]} in it was "
            f"changed since. Move it, or choose another --output."
        )
    elif not occupied and all(os.path.lexists(previous / name) for name in manifest["files"]):
        os.rename(previous, goal)
        _LOGGER.warning("A run was killed while it replaced %s; the older folder was put back.", goal)
    elif occupied and read_manifest(goal) is None:
        return  # `check_target` refuses the target, so this may stay the only result
    else:
        remove_folder(previous, last=MANIFEST_NAME)


def check_space(goal: Path, required: int) -> None:
    """Refuse a target whose disk has no room.

    Args:
        goal: Absolute path of the output; its parents need not exist.
        required: Bytes that will be written; see `staged_folder`.

    Raises:
        SaveError: The message says how much room there is, and how much saving needs.
    """
    needed, place = bytes_with_margin(required), find_existing_folder(goal.parent)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise SaveError(
            f"{place} has {format_bytes(free)} free, but saving needs {format_bytes(needed)} (the model's "
            f"{format_bytes(required)} plus 5 % and 16 MiB): free {format_bytes(needed - free)} or choose another "
            f"--output."
        )
    if has_no_inodes(place):
        raise SaveError(
            f"The disk of {place} has no inodes left, of which every file needs one: remove some files there or "
            f"choose another --output."
        )


def _put_in_place(staging: Path, goal: Path) -> Path | None:
    """Rename the finished folder to its target; an older folder is then in its place.

    Returns:
        The path of the older folder where the two could not be exchanged; else None.
    """
    if not os.path.lexists(goal):
        os.rename(staging, goal)
        return None
    if _exchange(staging, goal):
        return None
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


def _finish(goal: Path, new_parents: list[Path], place: Path, previous: Path | None, held: ExitStack) -> None:
    """Make the new name durable and remove older folders. The target is already whole, so a failure only warns."""
    try:
        for folder in (goal.parent, *(parent.parent for parent in new_parents)):
            fsync_folder(folder)
        if previous is not None:
            remove_folder(previous, last=MANIFEST_NAME)
        remove_own(place, held)
    except OSError as error:
        message = (
            "%s is saved, but a last step failed (%s): a power cut now may undo the save, or leave files beside it."
        )
        _LOGGER.warning(message, goal, error)


def _clean_up(place: Path, new_parents: list[Path], error: BaseException, held: ExitStack) -> None:
    try:
        if place.exists():
            remove_own(place, held)
        for folder in new_parents:  # innermost first
            if folder.is_dir() and is_empty(folder):
                folder.rmdir()
    except OSError as failure:
        error.add_note(f"The staging folder could not be removed: {failure}. The next run for this target removes it.")
