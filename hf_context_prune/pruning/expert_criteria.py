"""Criteria for experts: pure functions from what a text routes to them to one score per expert; higher is kept.

To add one, write a function here, decorate it with `@expert_criterion(name)`, and add the name to
`ExpertCriterionName`. Scores are compared within a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_context_prune.errors import ConfigError, unknown_name


@dataclass
class ExpertStatistics:
    """What a text routes to the experts of one layer.

    Attributes:
        num_tokens: Unpadded tokens of the text.
        routed: Tokens that are routed to each expert, [experts], float64.
        added: Sum over those tokens of gate x norm of the expert's output, [experts], float64.
        squared: Sum over those tokens of the square of the same, [experts], float64.
    """

    num_tokens: int
    routed: torch.Tensor
    added: torch.Tensor
    squared: torch.Tensor


ExpertCriterion = Callable[[ExpertStatistics], torch.Tensor]
EXPERT_CRITERIA: dict[str, ExpertCriterion] = {}


def expert_criterion(name: str) -> Callable[[ExpertCriterion], ExpertCriterion]:
    """Register a criterion for experts under a name."""

    def register(function: ExpertCriterion) -> ExpertCriterion:
        EXPERT_CRITERIA[name] = function
        return function

    return register


def get_expert_criterion(name: str) -> ExpertCriterion:
    """Look up a criterion for experts.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in EXPERT_CRITERIA:
        raise ConfigError(unknown_name("expert_criterion", name, EXPERT_CRITERIA))
    return EXPERT_CRITERIA[name]


@expert_criterion("frequency")
def frequency(statistics: ExpertStatistics) -> torch.Tensor:
    """Return the share of tokens that are routed to each expert."""
    return statistics.routed / statistics.num_tokens


@expert_criterion("reap")
def reap(statistics: ExpertStatistics) -> torch.Tensor:
    """Return the mean of gate x norm of the expert's output over the tokens routed to it: REAP (arXiv 2510.13999).

    An expert that no token is routed to has the score 0.
    """
    return statistics.added / statistics.routed.clamp_min(1)


@expert_criterion("energy")
def energy(statistics: ExpertStatistics) -> torch.Tensor:
    """Return the mean over all tokens of the squared norm of what each expert adds.

    This is the squared error of the block's output where the expert goes and no other takes its tokens. Unlike `reap`
    it counts how many tokens there are.
    """
    return statistics.squared / statistics.num_tokens
