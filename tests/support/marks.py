"""Marks that several test files share."""

from __future__ import annotations

import pytest

from hf_context_prune.errors import CalibrationWarning

TINY_TEXT = pytest.mark.filterwarnings(f"ignore::{CalibrationWarning.__module__}.{CalibrationWarning.__name__}")
"""For texts that give fewer samples than the package asks for."""
