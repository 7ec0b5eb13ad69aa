"""Locks against two runs with one output.

They lie in a folder of this user in the system's temporary folder, and exclude each other on one machine. Two machines
that share a disk do not see each other's locks, so there each run needs its own output folder.

A lock file is empty and stays: if it were removed, a run that had just opened it and one that made it again would both
hold "the" lock (older versions of filelock do not compare the two). Beside it, a note names the command that holds it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout

from hf_context_prune.errors import SaveError

from .distributed import is_main_process
from .files import open_regular, resolve_path, write_file
from .secret_scan import hide_tokens
from .temporary import own_temporary_folder

P = ParamSpec("P")
R = TypeVar("R")

_RESERVED: ContextVar[frozenset[Path]] = ContextVar("outputs whose lock this run holds", default=frozenset())
_MAX_NOTE_BYTES = 64 * 2**10
_LONGEST_COMMAND = 400
_SECRET_NAME = re.compile(r"token$|secret|passw|credential|api[-_]?key|auth(?!or)", re.IGNORECASE)
_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


@contextmanager
def hold_lock(goal: Path, wait_seconds: float = 0, *, what: str | None = None) -> Iterator[None]:
    """Hold the lock of a file or folder that this run writes. The system frees the lock when the process dies.

    Args:
        goal: Absolute path of the file or folder, which need not exist.
        wait_seconds: How long to wait for another run.
        what: The work of the other run, for the message; by default "saving to" the goal.

    Raises:
        SaveError: Another run still has the lock (the message names its command), or the lock file can't be used.
    """
    reserved = _RESERVED.get()
    if goal in reserved:  # this run holds the lock from its start to its end; a save inside it excludes other saves
        token = _RESERVED.set(reserved - {goal})
        try:
            yield
        finally:
            _RESERVED.reset(token)
        return
    path = own_temporary_folder() / f"{hashlib.sha256(os.fsencode(goal)).hexdigest()[:32]}.lock"
    note, lock = path.with_suffix(".json"), FileLock(path)
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout as error:
        raise SaveError(
            f"Another run is {what or f'saving to {goal}'}{_describe_holder(note)}: wait for it to end, or choose "
            f"another --output."
        ) from error
    except OSError as error:
        raise SaveError(
            f"The lock file {path} can't be used ({error.strerror or error}): make room there, or remove the "
            f"file, and run again."
        ) from error
    try:
        _write_note(note)
        yield
    finally:
        with suppress(OSError):
            note.unlink()
        lock.release()


@contextmanager
def reserve_output(output: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of an output from the start of a run to its end, so that another run with it is refused at once.

    What this run saves there in between, in the same thread, needs no lock of its own. Of several processes that work
    together, the main one holds the lock.

    Args:
        output: The file or folder that the run writes at the end.

    Raises:
        ConfigError: The path names the home folder of an unknown user.
        SaveError: Another run is at work for this output.
    """
    goal = resolve_path(output, SaveError)
    if not is_main_process():
        yield
        return
    with hold_lock(goal):
        token = _RESERVED.set(_RESERVED.get() | {goal})
        try:
            yield
        finally:
            _RESERVED.reset(token)


def reserves(parameter: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it runs inside [`reserve_output`][].

    Args:
        parameter: The parameter that names the output; nothing is reserved where it is None.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            output = signature.bind(*args, **kwargs).arguments.get(parameter)
            if output is None:
                return function(*args, **kwargs)
            with reserve_output(output):
                return function(*args, **kwargs)

        return run

    return decorate


def _write_note(note: Path) -> None:
    """Say beside the lock which command holds it."""
    about = {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "command": _command_line()}
    with suppress(SaveError):  # the lock holds without it; the message of the other run is then shorter
        write_file(note, json.dumps(about))


def _describe_holder(note: Path) -> str:
    """Return what the note beside a lock says; nothing if the other run could not write one."""
    try:
        with open_regular(note, follow_links=False) as file:
            about = json.loads(file.read(_MAX_NOTE_BYTES))
        return f" (process {int(about['pid'])} since {about['since']!s}: {about['command']!s})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _command_line() -> str:
    """Return the command of this process, without values that are or may be secret."""
    program, *arguments = sys.argv or ["python"]
    path = Path(program)
    shown, hide_next = ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide_next and not argument.startswith("-"):
            argument = "..."
        elif equals and _SECRET_NAME.search(name):
            argument = f"{name}=..."
        hide_next = not equals and argument.startswith("-") and bool(_SECRET_NAME.search(argument))
        shown.append(_CREDENTIALS_IN_URL.sub("...", hide_tokens(argument)))
    text = "".join(letter if letter.isprintable() else "?" for letter in shlex.join(shown))
    return text if len(text) <= _LONGEST_COMMAND else f"{text[:_LONGEST_COMMAND]} ..."
