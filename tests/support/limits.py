"""A bound on time and memory for tests of hostile inputs: an answer within 2 seconds of work and 500 MB."""

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

    Seconds are those of the process's own work, whatever else the machine does; on the clock five times as many may
    pass, since a block may also wait for what never comes. One that hangs in Python is interrupted; one that hangs in
    native code ends the process after ten times as long.
    """
    if sys.platform != "linux":
        pytest.skip("reads the peak of memory as Linux shows it")

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail(f"no answer within {seconds} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 5 * seconds)}
    before = {number: signal.signal(number, interrupt) for number in timers}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at the present size
    held, begin = _peak_mb(), time.process_time()
    faulthandler.dump_traceback_later(10 * seconds, exit=True)
    for timer, most in timers.values():
        signal.setitimer(timer, most)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
        faulthandler.cancel_dump_traceback_later()
    grown, taken = _peak_mb() - held, time.process_time() - begin
    assert taken <= seconds, f"the answer took {taken:.1f} s"
    assert grown <= megabytes, f"the answer took {grown:.0f} MB"


def _peak_mb() -> float:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) / 1000
