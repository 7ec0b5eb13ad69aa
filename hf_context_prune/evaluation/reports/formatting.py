"""Figures as the cells of tables."""

from __future__ import annotations

from collections.abc import Sequence

from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.multiple_choice import Accuracy, PairedAccuracy
from hf_context_prune.evaluation.perplexity import DocumentLoss, compare_losses


def percent(estimate: Estimate) -> str:
    """A share with its interval, in per cent with a sign."""
    text = f"{estimate.value:+.1%}"
    if estimate.interval is None:
        return text
    return f"{text} [{estimate.interval[0]:+.1%}, {estimate.interval[1]:+.1%}]"


def ratio_to_change(ratio: Estimate) -> Estimate:
    """A ratio as a change."""
    interval = None if ratio.interval is None else (ratio.interval[0] - 1, ratio.interval[1] - 1)
    return Estimate(ratio.value - 1, interval)


def relative_change(base: Sequence[DocumentLoss], own: Sequence[DocumentLoss], seed: int) -> Estimate:
    """Bits a byte over those of another model on the same documents, less 1; paired interval over documents."""
    return ratio_to_change(compare_losses(base, own, seed=seed).bits_per_byte_ratio)


def accuracy(group: Accuracy, paired: PairedAccuracy | None = None) -> str:
    """An accuracy with its interval: against another model's with p, else against guessing (*: not clear of it)."""
    low, high = group.accuracy.interval or (group.accuracy.value,) * 2
    cell = f"{group.accuracy.value:.1%} [{low:.1%}, {high:.1%}]"
    if paired is None:
        return f"{cell}, guessing {group.chance:.0%}{'' if low > group.chance else '*'}"
    return f"{cell}, p {paired.p_value:.2g}"
