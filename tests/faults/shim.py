"""Builds tests/support/fault_shim.c, and steers it from a process that it is preloaded into."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "support" / "fault_shim.c"
STATE = "FAULT_SHIM_STATE"


def build(folder: Path) -> Path:
    """Compile the shim into a folder."""
    library = folder / "fault_shim.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", str(SOURCE), "-o", str(library)]
    subprocess.run([*command, "-ldl"], check=True)
    return library


def environment(library: Path, state: Path) -> dict[str, str]:
    """Variables for a process, and all that it starts, to have the shim, which counts nothing yet."""
    size = ctypes.CDLL(str(library)).shim_size
    size.restype = ctypes.c_long
    state.write_bytes(b"\0" * size())
    return {"LD_PRELOAD": str(library), STATE: str(state)}


class Shim:
    """The shim of this process, whose count its forks and the programs that it starts share."""

    def __init__(self) -> None:
        assert STATE in os.environ, "the shim is not preloaded"
        self._library = ctypes.CDLL(None)
        self._library.shim_count.restype = ctypes.c_long
        self._library.shim_log.restype = ctypes.c_char_p

    def arm(self, prefixes: Sequence[Path | str], number: int = 0, error: int = 0, *, persists: bool = False) -> None:
        """Count from now on the calls that write below `prefixes`, and strike one.

        Args:
            prefixes: Absolute paths of folders, without links.
            number: The call to strike, from 1; 0 strikes none.
            error: Its errno; 0 kills the process that calls by SIGKILL.
            persists: Later calls that take room on the disk fail, too.
        """
        names = b"".join(os.fsencode(prefix) + b"\0" for prefix in prefixes)
        self._library.shim_arm(names, ctypes.c_long(len(names)), ctypes.c_long(number), error, int(persists))

    def disarm(self) -> None:
        """Count no more."""
        self._library.shim_disarm()

    @property
    def count(self) -> int:
        """Calls that were counted."""
        return int(self._library.shim_count())

    @property
    def struck(self) -> bool:
        """Whether the numbered call was reached."""
        return bool(self._library.shim_struck())

    @property
    def calls(self) -> list[str]:
        """Name and path of every call that was counted."""
        return os.fsdecode(self._library.shim_log()).splitlines()
