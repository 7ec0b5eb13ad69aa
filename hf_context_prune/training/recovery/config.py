"""`RecoveryConfig`: every choice of a recovery run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hf_context_prune.config import from_options, is_number, option
from hf_context_prune.errors import ConfigError, unknown_name

MethodName = Literal["full", "lora"]
RewindName = Literal["none", "pretrained"]

LEARNING_RATES = {"full": 1.5e-4, "lora": 2e-3}


@dataclass
class RecoveryConfig:
    """How a pruned model is trained back, and when to stop.

    The loss is ``(1 - distillation) * cross-entropy + distillation * T^2 * KL(teacher || student)`` a token, the KL at
    temperature T (Hinton et al., arXiv 1503.02531). Training ends with `num_epochs`, `max_steps` or `max_minutes`,
    whichever comes first; the learning rate falls as a cosine to that end.

    Raises:
        ConfigError: A value out of range, or an unknown name.
    """

    method: MethodName = option("full", "full: all weights; lora: low-rank adapters, merged before saving.")
    learning_rate: float | None = option(None, "Peak learning rate; by default 1.5e-4, for lora 2e-3.")
    max_minutes: float | None = option(None, "Stop in that time, measuring included.")
    max_steps: int | None = option(None, "Stop after that many steps.")
    num_epochs: float = option(1.0, "Passes over the text, at most.")
    batch_size: int = option(4, "Blocks of text a step.")
    max_seq_length: int = option(512, "Tokens a block.")
    distillation: float = option(
        0.0,
        "Weight of the teacher's distribution (KL), in [0, 1]; the rest is the text's own (cross-entropy). The text "
        "alone gives more in the same time.",
    )
    temperature: float = option(1.0, "Temperature of the distillation, above 0.")
    evaluations: int = option(
        8,
        "How often the withheld text is measured on the way; the best weights are kept. Less often where that would "
        "take over a tenth of max_minutes.",
    )
    patience: int = option(3, "Stop after that many measurements in a row that are not below the one before.")
    lora_rank: int = option(32, "Rank of the adapters.")
    rewind: RewindName = option(
        "none",
        "pretrained: put the kept weights back to the parent's values before training, as in a lottery ticket, instead "
        "of the repaired ones.",
    )
    recovery_seed: int = option(0, "Seed of the order of the text, of the withheld documents and of new adapters.")

    def __post_init__(self) -> None:
        """Check every value."""
        for name, lowest in (
            ("max_steps", 1),
            ("batch_size", 1),
            ("max_seq_length", 8),
            ("evaluations", 1),
            ("patience", 1),
            ("lora_rank", 1),
            ("recovery_seed", 0),
        ):
            value = getattr(self, name)
            if value is None and name == "max_steps":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 2**31:
                raise ConfigError(f"{name} is {value!r}; it must be an integer of at least {lowest}, below 2^31.")
        for name in ("learning_rate", "max_minutes", "num_epochs", "temperature"):
            value = getattr(self, name)
            if value is None and name in ("learning_rate", "max_minutes"):
                continue
            if not (is_number(value) and value > 0):
                raise ConfigError(f"{name} is {value!r}; it must be a number above 0.")
        if not (is_number(self.distillation) and 0 <= self.distillation <= 1):
            raise ConfigError(
                f"distillation is {self.distillation!r}; it must be a share in [0, 1]: 0 learns from the text alone, 1 "
                f"from the teacher alone."
            )
        for name, names in (("method", MethodName), ("rewind", RewindName)):
            if getattr(self, name) not in get_args(names):
                raise ConfigError(unknown_name(name, getattr(self, name), get_args(names)))

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that was given, or that of the method."""
        return self.learning_rate if self.learning_rate is not None else LEARNING_RATES[self.method]

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecoveryConfig:
        """Build from a mapping of options.

        Raises:
            ConfigError: An unknown key, with the nearest known one.
        """
        return from_options(cls, values)
