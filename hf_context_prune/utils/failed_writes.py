"""Which exceptions mean that a file could not be written: each library has its own."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from hf_context_prune.errors import ContextPruneError, SaveError

ONLY_OF_WRITES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Error numbers that no read has."""
_OF_WRITES = ONLY_OF_WRITES | {errno.EACCES, errno.EPERM, errno.EIO, errno.ENFILE, errno.EMFILE, errno.ENAMETOOLONG}
_OF_NUMPY = re.compile(r"requested and \d+ written|problem writing element \d+ to file")


@dataclass(frozen=True)
class FailedWrite:
    """What an exception says of a write that failed.

    Attributes:
        number: The system's error number; None if the exception does not tell it.
        reason: The reason in words.
        path: The file that it names; None if it names none.
    """

    number: int | None
    reason: str
    path: Path | None


def find_failed_write(error: BaseException, folder: Path, *, any_os_error: bool = False) -> FailedWrite | None:
    """Return what an exception says of a failed write to a folder; None if it is another error.

    An `OSError` is a failed write if it names a file in the folder (`shutil.copyfile` names the target second), if it
    has an error number that only writes have, or if it names no file and has an error number of writes. numpy tells
    neither. `safetensors` raises errors of its own, and `tokenizers` bare exceptions, with the system's error number in
    the text.

    Args:
        error: The exception.
        folder: The folder that was being written.
        any_os_error: Whether every `OSError` is a failed write, because nothing was read.
    """
    if isinstance(error, SaveError) and any(path.is_relative_to(folder) for path in _named(error.__cause__)):
        error = error.__cause__ or error  # of a single file, which is told with its folder
    if isinstance(error, ContextPruneError):
        return None
    if isinstance(error, OSError):
        paths = _named(error)
        inside = [path for path in paths if path.is_relative_to(folder)]
        bare = error.errno is None and _OF_NUMPY.search(str(error)) is not None
        writes = error.errno in (ONLY_OF_WRITES if paths else _OF_WRITES)
        if not (inside or bare or writes or any_os_error):
            return None
        return FailedWrite(error.errno, error.strerror or str(error), next(iter(inside or paths), None))
    match = re.search(r"\(os error (\d+)\)", str(error))
    number = int(match.group(1)) if match and os.name == "posix" else None
    if isinstance(error, SafetensorError) or (type(error) is Exception and number in _OF_WRITES):
        return FailedWrite(number, str(error) if number is None else os.strerror(number), None)
    return None


def _named(error: BaseException | None) -> list[Path]:
    """Return the files that an `OSError` names, the target of a copy first."""
    if not isinstance(error, OSError):
        return []
    names = (error.filename2, error.filename)
    return [Path(os.fsdecode(name)) for name in names if isinstance(name, str | bytes | os.PathLike)]
