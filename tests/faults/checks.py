"""What must hold after a command met a failing write or a kill."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_context_prune.errors import ContextPruneError
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.utils.file_names import MANIFEST_NAME
from tests.faults.commands import COMMANDS, Command
from tests.faults.harness import Content, Outcome, Runner

ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
HARMLESS = (
    (r"/run/tmp/[a-z0-9_]{8}$", "Python tries whether $TMPDIR can be written, and else takes another folder"),
    (r"/run/tmp/hf_context_prune-\d+/\.?[0-9a-f]{32}\.json", "the message of a second run is shorter"),
    (r"/run/tmp/hf_context_prune-\d+/memory-\d+\.json", "the run says that others don't know of its memory"),
    (r"/cache/unfinished(/[0-9a-f]{32}(/\.hf_context_prune-unfinished)?)?$", "the run says that it can't be resumed"),
    (
        r"^fsync .*/(work|models|gguf|unfinished/[0-9a-f]{32})$",
        "the folder is in place; a warning says that a power cut may undo that",
    ),
    (r"^link ", "the file is copied instead"),
    (r"^sendfile64 ", "Python copies the bytes in another way"),
    (r"^open64 .*\.whl$", "zipfile opens it in another way"),
    (
        r"^open64 .*/(tmp(/hf_context_prune-\d+(/scratch-[0-9a-f]{16})?)?|cache/(gguf|models))$",
        "unnamed files are tried",
    ),
)
"""Writes that may fail without failing the command."""


def strike(runner: Runner, name: str, number: int, error: int, *, older: bool) -> list[str]:
    """Run a command with a fault, and return what is wrong after it; `older`: over an older result."""
    done, before = _struck(runner, name, number, error, older=older)
    problems = problems_after_fault(runner, name, done, error, before)
    what = f"{name}, call {number} ({done.call}), {errno.errorcode[error]}, {'over an older' if older else 'no older'}"
    return [f"{what}: {problem}\n{done.log[-600:]}" for problem in problems]


def _struck(runner: Runner, name: str, number: int, error: int, *, older: bool) -> tuple[Outcome, Content]:
    """Strike a call, or the last one if there are fewer; return how the command ended, and what there was before."""
    runner.begin(COMMANDS[name], runner.older(name) if older else None)
    before = runner.content()
    done = runner(name, number, error)
    if done.code == 0 and 0 < done.count < number:
        return _struck(runner, name, done.count, error, older=older)
    return done, before


def distinct_points(calls: Sequence[str], draw: random.Random, *, each: int = 6) -> list[int]:
    """Numbers of calls: all, but of many equal ones (a thousand writes to one file) the first, the last and others."""
    places = defaultdict(list)
    for number, call in enumerate(calls, start=1):
        places[re.sub(r"[0-9a-f]{16,}|\.tmp\w+", "", call)].append(number)
    kept = (
        found if len(found) <= each else [*found[:2], found[-1], *draw.sample(found[2:-1], each - 3)]
        for found in places.values()
    )
    return sorted(number for found in kept for number in found)


def problems_after_fault(runner: Runner, name: str, done: Outcome, error: int, before: Content) -> list[str]:
    """What is wrong after a run in which a call failed."""
    if not done.struck:
        return ["the call was not reached"]
    command, found, after = COMMANDS[name], [], runner.content()
    if done.signal is not None:
        found.append(f"ended by signal {done.signal}")
    foreign = command.foreign is not None and re.search(command.foreign, done.call) is not None
    if not foreign:
        found += _problems_of_words(done, error)
    for target in command.targets:
        if _below(after, f"work/{target}") != _below(before, f"work/{target}"):
            if done.code != 0:
                found.append(f"{target} is another than before")
            else:
                found += problems_of_folder(runner.run / "work" / target)
    for folder in (runner.run / "cache" / "gguf").glob("[0-9a-f]*/"):
        found += problems_of_folder(folder)
    for part in command.parts:
        found += problems_of_part(runner.run / "work" / part, foreign=command.foreign)
    left = [path for path in after if path not in before and not _belongs(path, command)]
    found += [f"left: {path}" for path in left]
    if re.search(r"^fsync .*/(work|models|gguf)$", done.call):  # a power cut may bring the older folder back
        found = [problem for problem in found if not re.match(r"left: .*\.\w+\.staging-[0-9a-f]{16}", problem)]
    return found


def _problems_of_words(done: Outcome, error: int) -> list[str]:
    found = []
    if done.code not in (0, 1) or "Traceback" in done.log:
        found.append(f"exit code {done.code}, traceback: {'Traceback' in done.log}")
    if done.code == 1 and os.strerror(error) not in " ".join(done.log.split()):
        found.append("the message does not say why")
    if done.code == 0 and not any(re.search(pattern, done.call) for pattern, _ in HARMLESS):
        found.append("the failure was passed over")
    return found


def problems_of_folder(folder: Path) -> list[str]:
    """Why a folder with a manifest is not whole."""
    try:
        verify_folder(folder)
    except ContextPruneError as error:
        return [f"{folder.name} is not whole: {error}"]
    return []


def problems_of_part(folder: Path, *, foreign: str | None) -> list[str]:
    """Which files of a folder without a manifest are not whole, or are left over."""
    found, models = [], {path.parent for path in folder.rglob(MANIFEST_NAME)}
    for model in models:
        found += problems_of_folder(model)
    readers = {".json": json.loads, ".jsonl": _read_lines, ".yaml": yaml.safe_load}
    for path in folder.rglob("*"):
        if not path.is_file() or models.intersection(path.parents) or (foreign and re.search(foreign, str(path))):
            continue
        name = path.relative_to(folder).as_posix()
        if path.name.startswith("."):
            found.append(f"left: {name}")
        try:
            readers.get(path.suffix, str)(path.read_text(errors="replace"))
        except ValueError as error:
            found.append(f"{name} is not whole: {error}")
        if path.suffix == ".png" and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
            found.append(f"{name} is not whole")
    return found


def _read_lines(text: str) -> list[Any]:
    if text and not text.endswith("\n"):
        raise ValueError("the last line is not whole")
    return [json.loads(line) for line in text.splitlines()]


def _below(content: Content, folder: str) -> Content:
    return {name: value for name, value in content.items() if f"{name}/".startswith(f"{folder}/")}


def _belongs(path: str, command: Command, *, ended: bool = False) -> bool:
    """Whether a run may leave a path: its result, a lock, and if it failed, what the next run resumes from."""
    if ended and path.startswith("cache/unfinished/"):
        return False
    results = (f"work/{name}/" for name in (*command.targets, *command.parts))
    return f"{path}/".startswith(tuple(results)) or re.fullmatch(_LEFT, path) is not None


_LEFT = (
    r"tmp/hf_context_prune-\d+(/[0-9a-f]{32}\.lock)?"
    r"|cache/(unfinished(/.*)?|gguf|models|.*\.lock|gguf/[0-9a-f]{64}-[a-z]+[0-9]+(/.*)?|models/[^/]*\.gguf)"
)
"""Locks, what the next run resumes from, and finished conversions and downloads."""


def kill(runner: Runner, name: str, number: int, *, older: bool) -> list[str]:
    """Kill a command at a call, and run it again; return what is wrong after the kill, and after the second run."""
    command, result = COMMANDS[name], runner.older(name)
    done, before = _struck(runner, name, number, 0, older=older)
    problems = [] if done.signal == signal.SIGKILL and done.struck else ["it was not killed"]
    problems += _problems_after_kill(runner, command, before)
    again = runner(name)
    problems += [] if again.code == 0 else [f"the next run fails: {again.log[-600:]}"]
    for target in command.targets:
        problems += problems_of_folder(runner.run / "work" / target)
    for part in command.parts:
        # safetensors leaves its own unfinished file in a checkpoint, which the Trainer writes and never sweeps
        problems += problems_of_part(runner.run / "work" / part, foreign=r"/checkpoint-\d+/\.tmp\w{6}$")
    after = runner.content()
    problems += [f"left: {path}" for path in after if path not in before and not _belongs(path, command, ended=True)]
    problems += [f"{path} has other bits" for path in _weights(after) if after[path] != _weights_of(result).get(path)]
    what = f"{name}, killed at call {number} ({done.call}), {'over an older' if older else 'no older'}"
    return [f"{what}: {problem}" for problem in problems]


def _problems_after_kill(runner: Runner, command: Command, before: Content) -> list[str]:
    """A target is as it was, or whole; so is every model folder of a part."""
    found, after = [], runner.content()
    for target in command.targets:
        if _below(after, f"work/{target}") != _below(before, f"work/{target}"):
            found += problems_of_folder(runner.run / "work" / target)
    for manifest in (runner.run / "work").rglob(MANIFEST_NAME):
        if not any(".staging-" in part for part in manifest.parts):
            found += problems_of_folder(manifest.parent)
    for manifest in (runner.run / "cache" / "gguf").glob(f"[0-9a-f]*/{MANIFEST_NAME}"):
        found += problems_of_folder(manifest.parent)
    return found


_WEIGHTS = (".safetensors", ".gguf", ".onnx.data")


def _weights(content: Content) -> list[str]:
    return [path for path in content if path.startswith("work/") and path.endswith(_WEIGHTS)]


def _weights_of(work: Path) -> Content:
    found = (path for path in work.rglob("*") if path.name.endswith(_WEIGHTS))
    return {f"work/{path.relative_to(work).as_posix()}": path.read_bytes() for path in found}
