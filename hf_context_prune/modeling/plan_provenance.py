"""The entries of a plan's provenance that commands read, and their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_context_prune.errors import PlanError

_RECORDED: dict[str, tuple[type[Any] | tuple[type[Any], ...], str]] = {
    **dict.fromkeys(("base_model", "base_revision", "base_dtype", "test_data"), (str, "a string")),
    **dict.fromkeys(("base_card", "config", "data", "general_data", "zeroed"), (dict, "a mapping")),
    **dict.fromkeys(("loss_budget", "refit", "versions", "vocabulary"), (dict, "a mapping")),
    **dict.fromkeys(("prunings", "recoveries"), (list, "a list")),
    "num_calibration_tokens": (int, "an integer"),
    "config.pruning_seed": (int, "an integer"),
    "config.pruning_ratio": ((int, float), "a number"),
    **dict.fromkeys(("removed_layers", "experts"), (dict, "a mapping")),
    "removed_layers.parameters": (int, "an integer"),
}
"""Entries of the provenance that commands read, with their types where they are not null."""


def check_recorded(provenance: Mapping[str, Any]) -> None:
    """Refuse a provenance in which an entry that commands read has another type.

    Raises:
        PlanError: Names the entry, its value and the type that it must have.
    """
    for name, (kind, what) in _RECORDED.items():
        value: Any = provenance
        for part in name.split("."):
            value = (value or {}).get(part)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise PlanError(f"The plan's provenance gives {name} = {value!r:.80}; it must be {what} or null.")
