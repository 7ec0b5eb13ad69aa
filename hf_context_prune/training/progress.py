"""Hide progress bars by name, as huggingface_hub groups them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@contextmanager
def hide_progress_bars(name: str) -> Iterator[None]:
    """Show no bar of this name, or of a name below it, inside the context."""
    shown = not are_progress_bars_disabled(name)
    try:
        if shown:
            disable_progress_bars(name)
        yield
    finally:
        if shown:
            enable_progress_bars(name)
