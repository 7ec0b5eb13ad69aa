"""How the words of an answer are chosen."""

from __future__ import annotations

from dataclasses import dataclass

from hf_context_prune.utils.options import (
    GENERATION,
    Allowed,
    OptionSet,
    above_zero,
    at_least,
    check_options,
    is_number,
    option,
)


def _between(low: float, high: float, meaning: str) -> Allowed:
    return Allowed(
        lambda value: is_number(value) and low <= value <= high, f"a number from {low:g} to {high:g}: {meaning}"
    )


@dataclass(frozen=True)
class Sampling(OptionSet):
    """Options of an answer.

    Attributes:
        max_new_tokens: Largest number of tokens to write.
        temperature: 0 takes the likeliest token; higher values vary more.
        top_p: Draw from the likeliest tokens that together have this probability.
        repetition_penalty: Above 1, tokens that occurred before become less likely.
        seed: Seed of the draws, the same for every answer.

    Raises:
        ConfigError: A value out of range.
    """

    max_new_tokens: int = option(
        256, "Largest number of tokens of an answer.", panel=GENERATION, allowed=at_least(1, bits=31)
    )
    temperature: float = option(
        0.7,
        "0: always the likeliest token; higher values vary more.",
        panel=GENERATION,
        allowed=_between(0, 2, "0 always takes the likeliest token"),
    )
    top_p: float = option(
        0.95,
        "Draw from the likeliest tokens that together have this probability.",
        panel=GENERATION,
        allowed=above_zero("1 draws from all tokens"),
    )
    repetition_penalty: float = option(
        1.1,
        "Above 1, tokens that occurred before become less likely. Small models repeat themselves without it.",
        panel=GENERATION,
        allowed=_between(1, 2, "1 changes nothing"),
    )
    seed: int = option(0, "Seed of the draws.", panel=GENERATION, allowed=at_least(0))

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
