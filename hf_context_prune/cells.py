"""Figures as the cells of tables."""

from __future__ import annotations

from .evaluation import Estimate


def percent(estimate: Estimate) -> str:
    """A share with its interval, in per cent with a sign."""
    text = f"{estimate.value:+.1%}"
    if estimate.interval is None:
        return text
    return f"{text} [{estimate.interval[0]:+.1%}, {estimate.interval[1]:+.1%}]"


def less_one(ratio: Estimate) -> Estimate:
    """A ratio as a change."""
    interval = None if ratio.interval is None else (ratio.interval[0] - 1, ratio.interval[1] - 1)
    return Estimate(ratio.value - 1, interval)
