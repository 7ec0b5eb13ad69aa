"""Child processes that run this package's or its libraries' code."""

import os
import sys


def child_environment() -> dict[str, str]:
    """Return the environment of a Python child that is started with ``-P``.

    The child imports what this process would, and nothing from the current folder; it reads local files and must not
    ask the Hub.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
