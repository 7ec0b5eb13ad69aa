"""Marks that several test files share."""

from __future__ import annotations

import pytest

from hf_context_prune.errors import CalibrationWarning

TINY_TEXT = pytest.mark.filterwarnings(f"ignore::{CalibrationWarning.__module__}.{CalibrationWarning.__name__}")
"""For texts that give fewer samples than the package asks for."""


def nightly_beside(covering, names):
    """Parameters of a test: those of a covering set by day, the others by night."""
    assert set(covering) <= set(names), "the covering set has a name that there is not"
    return [pytest.param(name, marks=() if name in covering else pytest.mark.nightly) for name in names]
