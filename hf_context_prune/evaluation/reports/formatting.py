"""Figures with their intervals as the cells of tables."""

from __future__ import annotations

from collections.abc import Callable

from hf_context_prune.evaluation.accuracy import Accuracy, PairedAccuracy
from hf_context_prune.evaluation.bootstrap import MIN_DOCUMENTS, MIN_SOURCES, Estimate, ratio_to_change
from hf_context_prune.evaluation.speed import Spread

INTERVALS = (
    f"Square brackets behind a change hold its 95 % bootstrap interval over sources and documents; "
    f'"(a to b)" is the range over the sources, where there are fewer than {MIN_SOURCES} of them or than '
    f"{MIN_DOCUMENTS} documents; of a single source with fewer documents there is neither."
)
"""What stands behind a change that [`format_change`][] shows."""


def format_estimate(estimate: Estimate, pattern: str, transform: Callable[[float], float] = float) -> str:
    """Return a figure with its interval in brackets, or in parentheses the range over its sources, as it has them.

    Args:
        estimate: The figure.
        pattern: Format of each number, such as ``"{:.4f}"``.
        transform: Increasing function applied to each number first.
    """
    text = pattern.format(transform(estimate.value))
    if estimate.interval is not None:
        low, high = (pattern.format(transform(bound)) for bound in estimate.interval)
        return f"{text} [{low}, {high}]"
    if estimate.span is not None:
        low, high = (pattern.format(transform(bound)) for bound in estimate.span)
        return f"{text} ({low} to {high})"
    return text


def format_change(change: Estimate) -> str:
    """Return a relative change in per cent with a sign, such as "+1.2 % [+0.9, +1.5]"."""
    return _format_percents(change, "{:+z.1f}")


def format_ratio(ratio: Estimate) -> str:
    """Return a ratio as a relative change: 1.012 as "+1.2 %"."""
    return format_change(ratio_to_change(ratio))


def format_share(share: Estimate) -> str:
    """Return a share in per cent, such as "31.2 % [28.0, 34.6]"."""
    return _format_percents(share, "{:.1f}")


def _format_percents(share: Estimate, pattern: str) -> str:
    value, space, rest = format_estimate(share, pattern, lambda value: 100 * value).partition(" ")
    return f"{value} %{space}{rest}"


def format_points(difference: Estimate) -> str:
    """Return a difference of shares in percentage points, such as "-1.2 [-3.0, +0.6] points"."""
    return f"{format_estimate(difference, '{:+.1f}', lambda value: 100 * value)} points"


def format_accuracy(group: Accuracy, paired: PairedAccuracy | None = None) -> str:
    """Return an accuracy with its interval.

    Args:
        group: The accuracy.
        paired: Its comparison with another model, whose p-value then follows; without one the accuracy of guessing
            follows, with an asterisk where the interval does not lie above it.
    """
    cell = format_share(group.accuracy)
    if paired is not None:
        return f"{cell}, p {paired.p_value:.2g}"
    low = group.accuracy.value if group.accuracy.interval is None else group.accuracy.interval[0]
    return f"{cell}, guessing {100 * group.chance:.0f} %{'' if low > group.chance else '*'}"


def format_spread(spread: Spread, pattern: str) -> str:
    """Return a median with its quartiles, such as "100.0 (90.0 to 110.0)"; `pattern` formats each number."""
    return "{} ({} to {})".format(*(pattern.format(value) for value in (spread.median, spread.q1, spread.q3)))


def format_speedup(ratio: Spread) -> str:
    """Return a ratio of speeds, such as "x1.50 (1.45 to 1.52)"."""
    return f"x{format_spread(ratio, '{:.2f}')}"


def format_percent(change: float) -> str:
    """Return a relative change without an interval in per cent, with a sign and never "-0.0 %"."""
    return f"{100 * change:+z.1f} %"
