"""Where downloads and conversions are kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_VARIABLE = "HF_CONTEXT_PRUNE_CACHE"


def cache_dir() -> Path:
    """$HF_CONTEXT_PRUNE_CACHE, else hf_context_prune in the user's cache folder; it need not exist."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(folder))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "hf_context_prune"


_FORGOTTEN_AFTER_DAYS = 7


@contextmanager
def unfinished_work(*identity: object) -> Iterator[Path]:
    """A folder of the cache for what a run has finished so far; it goes once the work is done, and not if it fails.

    Folders of runs that nobody took up for a week go as well.

    Args:
        identity: What the same run, started again, has in common with this one.
    """
    root = cache_dir() / "unfinished"
    folder = root / hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    for other in root.glob("*") if root.is_dir() else ():
        if other != folder and time.time() - other.stat().st_mtime > _FORGOTTEN_AFTER_DAYS * 86_400:
            shutil.rmtree(other, ignore_errors=True)  # another run may be doing the same
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
