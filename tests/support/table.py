"""The table of architectures, for tests that change it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hf_context_prune.modeling.specs import SPECS


@contextmanager
def table_kept() -> Iterator[None]:
    """Leave the table as it was, and in its order, which tests read: an entry that is put back would come last."""
    before = dict(SPECS)
    try:
        yield
    finally:
        SPECS.clear()
        SPECS.update(before)
