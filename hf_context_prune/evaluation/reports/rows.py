"""The rows of a report's table, formatted for people."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.speed import Spread

if TYPE_CHECKING:
    from hf_context_prune.evaluation.perplexity import LossComparison, LossSummary

    from .report import EvalReport, LossFacts, MemoryFacts, MultipleChoiceFacts, SizeFacts, SpeedFacts

Row = tuple[str, str, str, str]


def grouped_rows(report: "EvalReport") -> dict[str, list[Row]]:
    """Return (measure, base, pruned, change) for every measure, by group; a cell without a figure is empty."""
    groups = {"size": _size_rows(report.size), "loss": _loss_rows(report.loss)}
    if report.general is not None:
        groups["general"] = _loss_rows(report.general.loss, " on general text")
    if report.budget is not None:
        change = f"{_percent(report.budget.measured)} (allowed {_percent(report.budget.allowed)})"
        groups["budget"] = [("bits per byte on the text of the search", "", "", change)]
    if report.multiple_choice is not None:
        groups["multiple_choice"] = _choice_rows(report.multiple_choice)
    if report.speed is not None:
        groups["speed"] = _speed_rows(report.speed)
    if report.memory is not None:
        groups["memory"] = [_memory_row(report.memory)]
    return groups


def text_rows(report: "EvalReport") -> list[tuple[str, ...]]:
    """Return the bits per byte of base, pruned and recovered model on each text, with a first row of headings.

    The change is of the last model against the base. A column that no model of the report has is left out.
    """
    texts = [("domain", report.dataset.name, report.loss)]
    if report.general is not None:
        texts.append(("general", report.general.dataset.name, report.general.loss))
    table: list[tuple[str, ...]] = [("text", "documents", "base", "pruned", "recovered", "change")]
    for kind, name, loss in texts:
        last = loss.comparison if loss.recovered is None else loss.recovered_comparison
        models = (loss.base, loss.pruned, loss.recovered)
        table.append(
            (
                f"{kind}: {name}",
                f"{loss.base.num_documents:,} ({loss.base.num_tokens:,} tokens of the base)",
                *("" if model is None else _estimate(model.bits_per_byte, "{:.4f}") for model in models),
                "" if last is None else _estimate(last.bits_per_byte_ratio, "{:+.1f} %", lambda x: 100 * (x - 1)),
            )
        )
    kept = [index for index in range(len(table[0])) if any(line[index] for line in table[1:])]
    return [tuple(line[index] for index in kept) for line in table]


def _size_rows(size: "SizeFacts") -> list[Row]:
    change = "" if size.achieved_ratio is None else _percent(-size.achieved_ratio)
    if change and size.asked_ratio is not None:
        change += f" (asked {_percent(-size.asked_ratio)})"
    pruned = "" if size.pruned_parameters is None else f"{size.pruned_parameters:,}"
    return [
        ("parameters", f"{size.base_parameters:,}", pruned, change),
        _bytes_row("weights on disk", size.base_weight_bytes, size.pruned_weight_bytes),
    ]


def _loss_rows(loss: "LossFacts", where: str = "") -> list[Row]:
    rows = _losses(where, loss.base, loss.pruned, loss.comparison, loss.predicted_excess)
    if loss.recovered is not None:
        rows += _losses(f"{where} after recovery", loss.base, loss.recovered, loss.recovered_comparison, None)
    return rows


def _losses(
    when: str,
    base: "LossSummary",
    pruned: "LossSummary | None",
    comparison: "LossComparison | None",
    predicted: float | None,
) -> list[Row]:
    difference = excess = factor = ""
    if comparison is not None:
        difference = _estimate(comparison.bits_per_byte_difference, "{:+.4f}")
        if comparison.excess_nats_per_token is None:
            factor = "not comparable: other tokens"
        else:
            excess = _estimate(comparison.excess_nats_per_token, "{:+.4f}")
            factor = _estimate(comparison.excess_nats_per_token, "x{:.3f}", math.exp)
            if predicted is not None:
                excess += f" (predicted {predicted:+.4f})"
    return [
        (
            f"bits per byte{when}",
            _estimate(base.bits_per_byte, "{:.4f}"),
            "" if pruned is None else _estimate(pruned.bits_per_byte, "{:.4f}"),
            difference,
        ),
        (
            f"perplexity per token{when}",
            _estimate(base.perplexity, "{:.2f}"),
            "" if pruned is None else _estimate(pruned.perplexity, "{:.2f}"),
            factor,
        ),
        (f"excess loss{when} (nats/token)", "", "", excess),
    ]


def _choice_rows(facts: "MultipleChoiceFacts") -> list[Row]:
    rows = []
    for index, base in enumerate(facts.base):
        change = ""
        if facts.paired is not None:
            paired = facts.paired[index]
            change = f"{_points(paired.difference, '{:+.1f}')} points (McNemar p {paired.p_value:.2g})"
        shots = "-".join(str(count) for count in sorted(set(base.shots)))
        measure = f"accuracy, {base.source} ({base.num_questions:,} questions, {shots}-shot, chance {base.chance:.0%})"
        pruned = "" if facts.pruned is None else f"{_points(facts.pruned[index].accuracy, '{:.1f}')} %"
        rows.append((measure, f"{_points(base.accuracy, '{:.1f}')} %", pruned, change))
    return rows


def _points(estimate: Estimate, pattern: str) -> str:
    return _estimate(estimate, pattern, lambda value: 100 * value)


def _speed_rows(speed: "SpeedFacts") -> list[Row]:
    base, pruned, ratio = speed.base, speed.pruned, speed.ratio()
    if pruned is None or ratio is None:
        return [
            ("prefill (tokens/s)", _rate(base.prefill), "", ""),
            ("decode (tokens/s)", _rate(base.decode), "", ""),
        ]
    return [
        ("prefill (tokens/s)", _rate(base.prefill), _rate(pruned.prefill), _factor(ratio.prefill)),
        ("decode (tokens/s)", _rate(base.decode), _rate(pruned.decode), _factor(ratio.decode)),
    ]


def _memory_row(memory: "MemoryFacts") -> Row:
    base = None if memory.base is None else memory.base.peak_rss
    pruned = None if memory.pruned is None else memory.pruned.peak_rss
    return _bytes_row("peak RSS", base, pruned)


def _bytes_row(measure: str, base: int | None, pruned: int | None) -> Row:
    before, after = ("" if size is None else f"{size / 1e6:,.1f} MB" for size in (base, pruned))
    return measure, before, after, _percent(pruned / base - 1) if base and pruned is not None else ""


def _percent(change: float) -> str:
    return f"{100 * change:+z.1f} %"


def _rate(spread: Spread) -> str:
    return f"{spread.median:,.1f} ({spread.q1:,.1f} to {spread.q3:,.1f})"


def _factor(spread: Spread) -> str:
    return f"x{spread.median:.2f} ({spread.q1:.2f} to {spread.q3:.2f})"


def _estimate(estimate: Estimate, pattern: str, transform: Callable[[float], float] = float) -> str:
    text = pattern.format(transform(estimate.value))
    if estimate.interval is None:
        return text
    low, high = (pattern.format(transform(bound)) for bound in estimate.interval)
    return f"{text} [{low}, {high}]"
