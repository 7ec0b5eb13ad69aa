"""Presets: the settings that most people want, by a name each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_context_prune.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Preset:
    """Options under a name.

    Attributes:
        about: What it is for, in a few words.
        options: Options of `PrunerConfig` or `ThresholdConfig`.
        recovery: Options of `RecoveryConfig`; empty where nothing is trained.
    """

    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, Any] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    "safe": Preset("only tokens: those that make up 99.9 % of the text stay", {"vocab_coverage": 0.999}),
    "compatible": Preset("20 % smaller, opens in plain transformers", {"native_architecture": True}),
    "balanced": Preset("the default: 20 % smaller, the least loss"),
    "small": Preset("30 % smaller, trained back for 10 minutes", {"pruning_ratio": 0.3}, {"max_minutes": 10}),
    "paper": Preset(
        "the thresholds of the paper",
        {"linear_threshold": 1e-3, "activation_threshold": 1e-3, "embedding_threshold": 0.0},
    ),
}


def preset_options(name: str | None) -> dict[str, Any]:
    """Return the options of a preset as a config file holds them, those of the recovery under ``recovery``.

    Args:
        name: Name of the preset; None gives no options.

    Raises:
        ConfigError: There is no such preset.
    """
    if name is None:
        return {}
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, PRESETS))
    preset = PRESETS[name]
    return {**preset.options, **({"recovery": dict(preset.recovery)} if preset.recovery else {})}


def describe_options(name: str) -> str:
    """Return the options of a preset as words, for errors."""
    return ", ".join(f"{option}={value!r}" for option, value in preset_options(name).items()) or "no options"


def describe_presets() -> str:
    """Return names and meanings, for help texts."""
    return "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
