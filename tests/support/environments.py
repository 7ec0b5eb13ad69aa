"""Virtual environments of other versions, for tests that start programs there: built once, kept in a cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_context_prune" / "test-environments"


def environment(*requirements, without=()):
    """Return the Python of an environment with these requirements, less packages that they bring but that fail."""
    name = hashlib.sha256("\n".join((sys.version, *requirements, *without)).encode()).hexdigest()[:16]
    folder = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    python, complete = folder / "bin" / "python", folder / "complete"
    with FileLock(CACHE / f"{name}.lock"):
        if not complete.is_file():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
            if without:
                subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *without], check=True)
            complete.write_text("\n".join(requirements))
    return python
