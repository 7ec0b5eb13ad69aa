"""One warning about all options that were given and change nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields

from hf_context_prune.errors import PruningWarning


def warn_of_unused(config: object, reasons: Mapping[str, str]) -> None:
    """Warn, once for all of them, about options that are not at their default and change nothing.

    Args:
        config: The config.
        reasons: Why an option changes nothing, by name, as the end of a sentence.

    Warns:
        PruningWarning: Names every such option with its value.
    """
    values = {item.name: (getattr(config, item.name), item.default) for item in fields(config)}  # type: ignore[arg-type]
    unused = [
        f"{name}={values[name][0]!r} has no effect: {why}."
        for name, why in reasons.items()
        if name in values and values[name][0] != values[name][1]
    ]
    if unused:
        warnings.warn(" ".join(unused), PruningWarning, stacklevel=3)
