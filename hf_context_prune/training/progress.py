"""Progress bars by name, as huggingface_hub keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@contextmanager
def without_bars(name: str) -> Iterator[None]:
    """No bars of that name, and of those below it, in this block."""
    shown = not are_progress_bars_disabled(name)
    try:
        if shown:
            disable_progress_bars(name)
        yield
    finally:
        if shown:
            enable_progress_bars(name)
