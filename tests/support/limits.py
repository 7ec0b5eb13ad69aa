"""A bound on time and memory for tests of hostile inputs: an answer within 2 seconds and 500 MB."""

from __future__ import annotations

import faulthandler
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest


@contextmanager
def within(seconds: float = 2, megabytes: float = 500) -> Iterator[None]:
    """Fail if the block takes longer, or if the process's peak of resident memory grows by more; Linux only.

    A block that hangs in Python is interrupted; one that hangs in native code ends the process after ten times as long.
    """
    if sys.platform != "linux":
        pytest.skip("reads the peak of memory as Linux shows it")

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at the present size
    held, begin = _peak_mb(), time.monotonic()
    faulthandler.dump_traceback_later(10 * seconds, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
    grown, taken = _peak_mb() - held, time.monotonic() - begin
    assert taken <= seconds, f"the answer took {taken:.1f} s"
    assert grown <= megabytes, f"the answer took {grown:.0f} MB"


def _peak_mb() -> float:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) / 1000
