"""The options of a pruning config that remove whole experts, and neurons inside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_context_prune.errors import ConfigError

from .options import BUDGET, METHOD, at_least, below_one, option

_RATIO = below_one("0 removes nothing, 0.25 a quarter, and 1 would leave nothing")
EXPERT_SIZES = ("num_experts", "experts_ratio", "expert_neurons_ratio", "shared_expert_ratio")
"""The options that fix how much of a mixture of experts goes."""
ExpertCriterionName = Literal["energy", "reap", "frequency"]


@dataclass(kw_only=True)
class ExpertOptions:
    """How many experts of every layer are removed, and how those that stay are chosen.

    Raises:
        ConfigError: Options that contradict each other.
    """

    num_experts: int | None = option(
        None,
        "Number of experts to keep in every layer of a mixture of experts; the others are removed as a whole.",
        panel=BUDGET,
        allowed=at_least(1),
    )
    experts_ratio: float | None = option(
        None,
        "Share of the experts of every layer to remove, in [0, 1), instead of a number.",
        panel=BUDGET,
        allowed=_RATIO,
    )
    expert_neurons_ratio: float | None = option(
        None,
        "Share of the neurons to remove from inside every expert, in [0, 1). Where a shared expert is as wide as a "
        "number of experts, it loses the same share.",
        panel=BUDGET,
        allowed=_RATIO,
    )
    shared_expert_ratio: float | None = option(
        None,
        "Share of the neurons to remove from the shared expert, in [0, 1), in families where its width is its own "
        "(Qwen).",
        panel=BUDGET,
        allowed=_RATIO,
    )
    expert_criterion: ExpertCriterionName = option(
        "energy",
        "How the importance of an expert is measured on the text. energy: the mean over all tokens of the squared norm "
        "of what it adds; reap: the mean norm over the tokens that are routed to it; frequency: how many tokens are.",
        panel=METHOD,
    )

    def check_experts(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            ConfigError: Names them.
        """
        if self.num_experts is not None and self.experts_ratio is not None:
            raise ConfigError("num_experts and experts_ratio both say how many experts go; give one of them.")

    @property
    def removes_experts(self) -> bool:
        """Whether whole experts are removed."""
        return self.num_experts is not None or bool(self.experts_ratio)

    @property
    def narrows_experts(self) -> bool:
        """Whether neurons inside experts are removed."""
        return bool(self.expert_neurons_ratio or self.shared_expert_ratio)

    @property
    def prunes_experts(self) -> bool:
        """Whether anything is removed from a mixture of experts."""
        return self.removes_experts or self.narrows_experts
