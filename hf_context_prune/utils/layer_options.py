"""The options of a pruning config that remove whole decoder layers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_context_prune.errors import ConfigError

from .options import BUDGET, Allowed, at_least, below_one, option

KEPT_AT_ENDS = 2
"""Layers at either end of a model that stay unless `removable_layers` names them: they do what no other does."""
_LIST = re.compile(r"\s*\d{1,4}\s*(-\s*\d{1,4}\s*)?(,\s*\d{1,4}\s*(-\s*\d{1,4}\s*)?)*")


def layer_numbers(value: object) -> tuple[int, ...] | None:
    """Return the numbers in a list such as ``"2-5,9"``, ascending; None where a value is no such list."""
    if not isinstance(value, str) or not _LIST.fullmatch(value):
        return None
    found: set[int] = set()
    for part in value.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            return None
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


@dataclass(kw_only=True)
class LayerOptions:
    """How many decoder layers are removed as a whole, and which ones may be.

    Raises:
        ConfigError: Options that contradict each other.
    """

    num_layers: int | None = option(
        None,
        "Number of decoder layers to keep; the others are removed as a whole, those first whose loss costs least.",
        panel=BUDGET,
        allowed=at_least(1),
    )
    layer_ratio: float | None = option(
        None,
        "Share of the decoder layers to remove as a whole, in [0, 1), instead of a number.",
        panel=BUDGET,
        allowed=below_one("0 removes nothing, 0.1 three of 30 layers, and 1 would leave nothing"),
    )
    removable_layers: str | None = option(
        None,
        f"Numbers (from 0) of the layers that may be removed as a whole, such as 2-20,25. By default all but the first "
        f"{KEPT_AT_ENDS} and the last {KEPT_AT_ENDS}.",
        panel=BUDGET,
        allowed=Allowed(
            lambda value: layer_numbers(value) is not None,
            "a string of numbers and ascending ranges of layers, as '2-20,25'",
        ),
        metavar="LAYERS",
    )

    def check_layers(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            ConfigError: Names them.
        """
        if self.num_layers is not None and self.layer_ratio is not None:
            raise ConfigError("num_layers and layer_ratio both say how many layers go; give one of them.")

    @property
    def fixes_layers(self) -> bool:
        """Whether the number of decoder layers that are removed as a whole is given."""
        return self.num_layers is not None or bool(self.layer_ratio)
