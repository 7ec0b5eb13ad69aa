"""The colours of the Space and of the pictures, defined once."""

from __future__ import annotations

PALETTE = {
    "pruned": "#0d9488",
    "dense": "#94a3b8",
    "removed": "#cbd5e1",
    "ink": "#1e293b",
    "muted": "#64748b",
    "grid": "#e2e8f0",
    "problem": "#b91c1c",
    "lost-1": "#fef3c7",
    "lost-2": "#fcd34d",
    "lost-3": "#fb923c",
    "lost-4": "#f87171",
    "gained-1": "#ccfbf1",
    "gained-2": "#5eead4",
}
"""Colours by their role: ``lost`` and ``gained`` go from little to much."""
SERIES = (PALETTE["pruned"], "#d97706", "#4f46e5", "#e11d48", "#0284c7", "#65a30d", "#9333ea", PALETTE["muted"])
"""Colours of several lines in one picture, in order."""


def css_variables() -> str:
    """Return the palette as a style rule: ``pruned`` becomes ``--hcp-pruned``."""
    return ":root { " + " ".join(f"--hcp-{name}: {colour};" for name, colour in PALETTE.items()) + " }"
