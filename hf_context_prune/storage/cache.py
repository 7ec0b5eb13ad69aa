"""The folder for downloads, conversions and unfinished work."""

from __future__ import annotations

import os
from pathlib import Path

from hf_context_prune.utils.files import expand_home

CACHE_VARIABLE = "HF_CONTEXT_PRUNE_CACHE"


def cache_dir() -> Path:
    """Return $HF_CONTEXT_PRUNE_CACHE, else hf_context_prune in the user's cache folder; it need not exist.

    Raises:
        ConfigError: The path names the home folder of an unknown user.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return expand_home(folder)
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hf_context_prune"
