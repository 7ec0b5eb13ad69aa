"""A Gradio Space: base and pruned model side by side, from one YAML file. The folder's ``app.py`` calls `main`."""

from __future__ import annotations

import sys
from pathlib import Path

from hf_context_prune.errors import ContextPruneError

from .settings import Entry, Limits, Settings, Source, read_settings

__all__ = ["Entry", "Limits", "Settings", "Source", "main", "read_settings"]


def main(beside: Path) -> None:
    """Serve a Space until it is stopped.

    Args:
        beside: Folder of the ``app.py`` that is run.
    """
    from .page import build, picked, serve

    try:
        settings = picked(sys.argv[1:], beside)
        blocks = build(settings)
    except ContextPruneError as error:
        sys.exit(f"Error: {error}")
    serve(blocks, settings)
