"""The folder for downloads, conversions and unfinished work."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "HF_CONTEXT_PRUNE_CACHE"


def cache_dir() -> Path:
    """Return $HF_CONTEXT_PRUNE_CACHE, else hf_context_prune in the user's cache folder; it need not exist."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(folder))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "hf_context_prune"
