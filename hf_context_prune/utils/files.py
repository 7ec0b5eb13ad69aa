"""Single files: read only if they are regular files, and written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from hf_context_prune.errors import ConfigError, ContextPruneError, SaveError

from .staged_files import staged_file

_LONGEST_SHOWN = 120
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def expand_home(path: str | os.PathLike[str], error: type[ContextPruneError] = ConfigError) -> Path:
    """Return a path that a user named, with a leading ``~`` or ``~user`` replaced by that user's home folder.

    Args:
        path: The path; it need not exist.
        error: Type of the error.

    Raises:
        ContextPruneError: The path is blank, not UTF-8, or one that the system can't look up (a name of over 255 bytes,
            a NUL, a folder on the way that may not be entered); or the user is unknown, so that the path would name a
            folder ``~user`` in the current folder.
    """
    text = os.fspath(path)
    if not text.strip():
        raise error(f"The path is {text!r}, an empty name (is a shell variable unset?); the current folder is '.'.")
    shown = repr(text) if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]!r}... ({len(text):,} characters)"
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = Path(expanded).parts[0]
        raise error(
            f"The path {shown} begins with {user:.80}, but this system knows no home folder for it. To name a file or "
            f"folder {user:.80}, give its absolute path."
        )
    try:
        expanded.encode()
        os.stat(expanded)
    except (FileNotFoundError, NotADirectoryError):
        pass  # the caller knows whether it must exist
    except UnicodeEncodeError as failure:
        raise error(f"The path {shown} is not UTF-8, so no report could show it: rename it.") from failure
    except (OSError, ValueError) as failure:
        why = failure.strerror if isinstance(failure, OSError) else str(failure)
        raise error(f"The path {shown} can't be looked up: {why}. Check it.") from failure
    return Path(expanded)


def resolve_path(path: str | os.PathLike[str], error: type[ContextPruneError] = ConfigError) -> Path:
    """Return the absolute path, with home folder and links resolved; it need not exist.

    Raises:
        ContextPruneError: See [`expand_home`][].
    """
    return Path(os.path.realpath(expand_home(path, error)))


def open_regular(path: str | os.PathLike[str], *, follow_links: bool = True) -> BufferedReader:
    """Open a file for reading if it is a regular file.

    A named pipe, a socket, a device or a folder is not opened, so that nothing waits for another program.

    Args:
        path: The file.
        follow_links: Open the file that a link leads to; False refuses links.

    Raises:
        OSError: The file is missing, is not a regular file, or can't be opened; ``strerror`` says which.
    """
    _refuse_special((os.stat if follow_links else os.lstat)(path).st_mode, path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags if follow_links else flags | getattr(os, "O_NOFOLLOW", 0))
    try:
        _refuse_special(os.fstat(descriptor).st_mode, path)  # again: it may have been exchanged in between
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file: an older regular file is replaced as a whole, or stays as it was.

    Args:
        path: The file, in an existing folder.
        content: Bytes, or text, which is written as UTF-8.

    Raises:
        SaveError: The file can't be written, or a link, a folder, a named pipe or a device is in its place.
    """
    path = Path(path)
    try:
        if os.path.lexists(path):
            _refuse_special(path.lstat().st_mode, path)
        with staged_file(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None  # `write` names no file, and `open` the staged one
        raise SaveError(
            f"{path} could not be written: {error.strerror or error}. Name a file in a writable folder with free "
            f"space; an older file is as it was."
        ) from error


def _refuse_special(mode: int, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))
