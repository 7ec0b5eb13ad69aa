"""The figures of a report as rows of tables for people."""

from __future__ import annotations

from hf_context_prune.evaluation.losses import LossComparison, LossSummary

from .formatting import (
    format_estimate,
    format_percent,
    format_points,
    format_ratio,
    format_share,
    format_speedup,
    format_spread,
)
from .report import EvalReport, LossFacts, MemoryFacts, MultipleChoiceFacts, SizeFacts, SpeedFacts

Row = tuple[str, ...]


def table_rows(report: EvalReport, *groups: str) -> list[tuple[str, ...]]:
    """Return the figures of a report: (measure, base, pruned, change), or (measure, value) for a single model.

    Measures that were not taken are left out; a dash stands for the side that was not measured.

    Args:
        report: The report.
        groups: Some of "size", "loss", "general", "budget", "multiple_choice", "speed", "memory"; none: all.
    """
    found = _grouped_rows(report)
    rows = [row for name in groups or found for row in found.get(name, []) if any(row[1:])]
    if report.size.pruned_parameters is None:
        return [row[:2] for row in rows if row[1]]
    return [(row[0], *(cell or "-" for cell in row[1:])) for row in rows]


def _grouped_rows(report: EvalReport) -> dict[str, list[Row]]:
    """Return (measure, base, pruned, change) for every measure, by group; a cell without a figure is empty."""
    groups = {"size": _size_rows(report.size), "loss": _loss_rows(report.loss)}
    if report.general is not None:
        groups["general"] = _loss_rows(report.general.loss, " on general text")
    if report.budget is not None:
        change = f"{format_percent(report.budget.measured)} (allowed {format_percent(report.budget.allowed)})"
        groups["budget"] = [("bits per byte on the text of the search", "", "", change)]
    if report.multiple_choice is not None:
        groups["multiple_choice"] = _choice_rows(report.multiple_choice)
    if report.speed is not None:
        groups["speed"] = _speed_rows(report.speed)
    if report.memory is not None:
        groups["memory"] = [_memory_row(report.memory)]
    return groups


def text_rows(report: EvalReport) -> list[tuple[str, ...]]:
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
                *("" if model is None else format_estimate(model.bits_per_byte, "{:.4f}") for model in models),
                "" if last is None else format_ratio(last.bits_per_byte_ratio),
            )
        )
    kept = [index for index in range(len(table[0])) if any(line[index] for line in table[1:])]
    return [tuple(line[index] for index in kept) for line in table]


def _size_rows(size: SizeFacts) -> list[Row]:
    change = "" if size.achieved_ratio is None else format_percent(-size.achieved_ratio)
    if change and size.asked_ratio is not None:
        change += f" (asked {format_percent(-size.asked_ratio)})"
    pruned = "" if size.pruned_parameters is None else f"{size.pruned_parameters:,}"
    return [
        ("parameters", f"{size.base_parameters:,}", pruned, change),
        _bytes_row("weights on disk", size.base_weight_bytes, size.pruned_weight_bytes),
    ]


def _loss_rows(loss: LossFacts, where: str = "") -> list[Row]:
    rows = _losses(where, loss.base, loss.pruned, loss.comparison, loss.predicted_excess)
    if loss.recovered is not None:
        rows += _losses(f"{where} after recovery", loss.base, loss.recovered, loss.recovered_comparison, None)
    return rows


def _losses(
    when: str, base: LossSummary, pruned: LossSummary | None, comparison: LossComparison | None, predicted: float | None
) -> list[Row]:
    bits, perplexities = (
        ["" if one is None else format_estimate(getattr(one, name), pattern) for one in (base, pruned)]
        for name, pattern in (("bits_per_byte", "{:.4f}"), ("perplexity", "{:.2f}"))
    )
    difference = excess = factor = ""
    if comparison is not None:
        difference = format_estimate(comparison.bits_per_byte_difference, "{:+.4f}")
        factor = "not comparable: other tokens"
        if comparison.excess_nats_per_token is not None and comparison.perplexity_ratio is not None:
            excess = format_estimate(comparison.excess_nats_per_token, "{:+.4f}")
            factor = format_estimate(comparison.perplexity_ratio, "x{:.3f}")
            if predicted is not None:
                excess += f" (predicted {predicted:+.4f})"
    return [
        (f"bits per byte{when}", *bits, difference),
        (f"perplexity per token{when}", *perplexities, factor),
        (f"excess loss{when} (nats/token)", "", "", excess),
    ]


def _choice_rows(facts: MultipleChoiceFacts) -> list[Row]:
    rows: list[Row] = []
    for index, base in enumerate(facts.base):
        change = ""
        if facts.paired is not None:
            paired = facts.paired[index]
            change = f"{format_points(paired.difference)} (McNemar p {paired.p_value:.2g})"
        shots = "-".join(str(count) for count in sorted(set(base.shots)))
        measure = f"accuracy, {base.source} ({base.num_questions:,} questions, {shots}-shot, chance {base.chance:.0%})"
        pruned = "" if facts.pruned is None else format_share(facts.pruned[index].accuracy)
        rows.append((measure, format_share(base.accuracy), pruned, change))
    return rows


def _speed_rows(speed: SpeedFacts) -> list[Row]:
    ratio = speed.ratio()
    return [
        (
            f"{name} (tokens/s)",
            *(
                "" if one is None else format_spread(getattr(one, name), "{:,.1f}")
                for one in (speed.base, speed.pruned)
            ),
            "" if ratio is None else format_speedup(getattr(ratio, name)),
        )
        for name in ("prefill", "decode")
    ]


def _memory_row(memory: MemoryFacts) -> Row:
    base = None if memory.base is None else memory.base.peak_rss
    pruned = None if memory.pruned is None else memory.pruned.peak_rss
    return _bytes_row("peak RSS", base, pruned)


def _bytes_row(measure: str, base: int | None, pruned: int | None) -> Row:
    before, after = ("" if size is None else f"{size / 1e6:,.1f} MB" for size in (base, pruned))
    return measure, before, after, format_percent(pruned / base - 1) if base and pruned is not None else ""
