"""The runner of faults and kills; on CI its compiler must be there."""

import os
import shutil
import sys

import pytest

from tests.faults.harness import Runner


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    reason = None
    if sys.platform != "linux":
        reason = "calls of libc are replaced as on Linux"
    elif shutil.which("cc") is None:
        reason = "there is no C compiler (Debian: apt-get install gcc libc6-dev)"
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    running = Runner(tmp_path_factory.mktemp("faults"))
    yield running
    running.close()
