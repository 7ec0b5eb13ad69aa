"""`RecoveryConfig`: every choice of a recovery run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hf_context_prune.utils.options import (
    BUDGET,
    METHOD,
    TEXT,
    Allowed,
    at_least,
    check_options,
    describe_options,
    from_options,
    is_number,
    option,
)
from hf_context_prune.utils.unused import warn_of_unused

MethodName = Literal["full", "lora"]

LEARNING_RATES = {"full": 1.5e-4, "lora": 2e-3}
"""Peak learning rates by default, up to a hidden size of `MEASURED_HIDDEN_SIZE`, where they were chosen."""
MEASURED_HIDDEN_SIZE = 576

_POSITIVE = Allowed(lambda value: is_number(value) and value > 0, "a number above 0")
_BITS = 31
"""Integers are below 2^31: a Trainer takes no larger seed."""


@describe_options
@dataclass(kw_only=True)
class RecoveryConfig:
    """How a pruned model is trained on text of its domain, and when the training ends.

    The loss is the cross-entropy per token. Training ends with `num_epochs`, `max_steps` or `max_minutes`, whichever
    comes first; the learning rate falls as a cosine to that end.

    Raises:
        ConfigError: A value out of range, or an unknown name.
    """

    method: MethodName = option(
        "full", "full: train all weights; lora: train low-rank adapters and merge them.", panel=METHOD
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate. Default: 1.5e-4, for lora 2e-3; of a hidden size above 576 less, in inverse proportion.",
        panel=METHOD,
        allowed=_POSITIVE,
    )
    lora_rank: int = option(32, "Rank of the adapters of lora.", panel=METHOD, allowed=at_least(1, _BITS))
    batch_size: int = option(4, "Samples per step.", panel=METHOD, allowed=at_least(1, _BITS))
    max_minutes: float | None = option(
        None,
        "Train for this time at most, the measurements of the validation text included. Measuring the models on test "
        "text comes on top; how long that takes is told before.",
        panel=BUDGET,
        allowed=_POSITIVE,
    )
    max_steps: int | None = option(None, "Stop after this many steps.", panel=BUDGET, allowed=at_least(1, _BITS))
    num_epochs: float = option(1.0, "Passes over the text, at most.", panel=BUDGET, allowed=_POSITIVE)
    num_evals: int = option(
        8,
        "How many times the validation text is measured during training; the best weights are kept. Fewer times where "
        "measuring would take more than a tenth of max_minutes.",
        panel=BUDGET,
        allowed=at_least(1, _BITS),
    )
    early_stopping_patience: int = option(
        3,
        "Stop after this many measurements in a row that are not below the one before.",
        panel=BUDGET,
        allowed=at_least(1, _BITS),
    )
    max_seq_length: int = option(512, "Tokens per sample.", panel=TEXT, allowed=at_least(8, _BITS))
    # Not `seed`: HfArgumentParser would refuse this class beside TrainingArguments, which has that one.
    recovery_seed: int = option(
        0,
        "Seed of the order of the text, of the choice of validation documents, and of new adapters.",
        panel=TEXT,
        allowed=at_least(0, _BITS),
        flag="seed",
    )

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)

    def peak_learning_rate(self, hidden_size: int) -> float:
        """Return the given learning rate, or the method's default for a model of a hidden size.

        AdamW moves each weight by about the learning rate, so a product of twice as many inputs moves twice as far:
        rates that suit a narrow model let a wide one diverge (Yang et al., arXiv 2203.03466, table 8).
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATES[self.method] * min(1.0, MEASURED_HIDDEN_SIZE / hidden_size)

    def warn_of_unused_options(self) -> None:
        """Warn about options that were given and change nothing.

        Warns:
            PruningWarning: Names every such option, and why it changes nothing.
        """
        if self.method == "full":
            warn_of_unused(self, {"lora_rank": "method='full' trains all weights, without adapters"})

    def to_dict(self) -> dict[str, Any]:
        """Return all options as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecoveryConfig:
        """Build a config from a mapping of options.

        Raises:
            ConfigError: An unknown key; names the nearest known one.
        """
        return from_options(cls, values)
