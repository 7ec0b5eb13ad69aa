"""Runs commands in forks of a process that has imported all they need, and strikes their calls that write.

Usage: python -m tests.faults.server PLACE, with the shim preloaded. Reads a job a line, and answers each with a line;
both are JSON. It imports, but computes nothing: threads of torch would not survive the fork.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.faults.commands import COMMANDS, INPUTS
from tests.faults.shim import Shim

TRACEBACK, LIMIT = 70, 120
"""Exit code of a command that ended in an error of no type of this package; seconds for a command."""


def serve(place: Path) -> None:
    """Answer jobs until the input ends."""
    shim = Shim()
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(answer(shim, place, job)), flush=True)


def answer(shim: Shim, place: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run the command of a job in a fork, and say how it ended."""
    begin = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        become(shim, place, job, write)
    os.close(write)
    with os.fdopen(read) as file:
        imported = file.read().split()
    status = wait(child)
    shim.disarm()
    warm(imported)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    calls = shim.calls
    return {
        "code": code,
        "signal": killed,
        "struck": shim.struck,
        "count": shim.count,
        "calls": calls if job.get("list") else [],
        "call": calls[job["number"] - 1] if shim.struck else None,
        "seconds": time.monotonic() - begin,
    }


def wait(child: int) -> int:
    """Wait for a child and return its status; kill it after LIMIT seconds."""
    handle = os.pidfd_open(child)
    if not select.select([handle], [], [], LIMIT)[0]:
        os.kill(child, signal.SIGKILL)
    os.close(handle)
    return os.waitpid(child, 0)[1]


def warm(names: list[str]) -> None:
    """Import what a child had imported, so that the next need not."""
    for name in set(names) - set(sys.modules):
        if not name.startswith("transformers_modules"):
            try:
                importlib.import_module(name)
            except Exception:
                continue


def become(shim: Shim, place: Path, job: dict[str, Any], pipe: int) -> None:
    """Run the command of a job in this fork, write the names of all imported modules, and exit with its code."""
    with open(job["log"], "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - until the process ends
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    tempfile.tempdir = None
    code = TRACEBACK
    try:
        shim.arm(job["prefixes"], job["number"], job["error"], persists=job["persists"])
        (COMMANDS | INPUTS)[job["command"]].run(place, Path(job["folder"]))
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    shim.disarm()
    with os.fdopen(pipe, "w") as file:
        file.write("\n".join(sys.modules))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
