"""The figures of a report as rows of tables for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.losses import LossComparison, LossSummary, SourceLoss

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

NOT_MEASURED = "not measured"
Row = tuple[str, ...]
_MODELS = ("base", "pruned", "recovered")
MOST_SOURCES = 20
"""Rows of a table of sources."""


def table_header(report: EvalReport) -> Row:
    """Return the names of the columns of [`table_rows`][]: base and pruned model, where there is one also recovered."""
    if report.size.pruned_parameters is None:
        return ("measure", "value")
    models = _MODELS if report.loss.recovered is not None else _MODELS[:2]
    return ("measure", *models, "change")


def table_rows(report: EvalReport, *groups: str, intervals: bool = False) -> list[Row]:
    """Return the figures of a report under the columns of [`table_header`][].

    The change is that of the last model against the base. Measures that were not taken are left out; a dash stands for
    the side that was not measured.

    Args:
        report: The report.
        groups: Some of "size", "loss", "general", "budget", "multiple_choice", "speed", "memory"; none: all.
        intervals: Show intervals, quartiles, the predicted loss and all losses per token too.
    """
    found = _grouped_rows(report, intervals=intervals)
    rows = [row for name in groups or found for row in found.get(name, []) if any(row[1:])]
    if report.size.pruned_parameters is None:
        return [row[:2] for row in rows if row[1]]
    kept = [0, 1, 2, *([3] if report.loss.recovered is not None else []), 4]
    return [(row[0], *(row[index] or "-" for index in kept[1:])) for row in rows]


def _grouped_rows(report: EvalReport, *, intervals: bool) -> dict[str, list[Row]]:
    """Return (measure, base, pruned, recovered, change) by group; a cell without a figure is empty."""
    show = _Cells(intervals)
    recovered = report.loss.recovered is not None
    groups = {
        "size": _size_rows(report.size, recovered=recovered),
        "loss": [*_loss_rows(report.loss, "", show)],
    }
    if report.general is not None:
        groups["general"] = [*_loss_rows(report.general.loss, ", general text", show)]
    if report.budget is not None:
        change = f"{format_percent(report.budget.measured)} (allowed {format_percent(report.budget.allowed)})"
        groups["budget"] = [("bits per byte, text of the search", "", "", "", change)]
    if report.multiple_choice is not None:
        choices = _choice_rows(report.multiple_choice, show)
        groups["multiple_choice"] = [_last(row, recovered=recovered) for row in choices]
    if report.speed is not None:
        groups["speed"] = [_last(row, recovered=recovered) for row in _speed_rows(report.speed, show)]
    if report.memory is not None:
        groups["memory"] = [_last(_memory_row(report.memory), recovered=recovered)]
    return groups


def _last(row: Row, *, recovered: bool) -> Row:
    """Return (measure, base, last model, change) as a row of all models."""
    measure, base, last, change = row
    return (measure, base, "", last, change) if recovered else (measure, base, last, "", change)


class _Cells:
    """Figures as cells, with or without their intervals."""

    def __init__(self, intervals: bool) -> None:
        self.intervals = intervals

    def estimate(self, value: Estimate, pattern: str) -> str:
        return format_estimate(value if self.intervals else Estimate(value.value, None), pattern)

    def ratio(self, value: Estimate) -> str:
        return format_ratio(value if self.intervals else Estimate(value.value, None))

    def share(self, value: Estimate) -> str:
        return format_share(value if self.intervals else Estimate(value.value, None))

    def points(self, value: Estimate) -> str:
        return format_points(value if self.intervals else Estimate(value.value, None))

    def spread(self, value: Any, show: Callable[[Any], str], pattern: str) -> str:  # noqa: ANN401 - a Spread
        return show(value) if self.intervals else pattern.format(value.median)


def source_tables(report: EvalReport) -> list[tuple[str, list[Row]]]:
    """Return the bits per byte of each model on each source of the domain's text and of the general text.

    Returns:
        (title, rows) of each text that has several sources. The first row has the headings; then the largest loss comes
        first. The change is that of the last model against the base. Of more than [`MOST_SOURCES`][] sources, those
        that lose most are shown.
    """
    losses = [("Loss by source of the text", report.loss)]
    if report.general is not None:
        losses.append(("Loss by source of the general text", report.general.loss))
    return [(title, _source_rows(loss)) for title, loss in losses if loss.by_source]


def _source_rows(loss: LossFacts) -> list[Row]:
    found = order_sources(loss)
    names = [name for name in _MODELS if name in found[0][0].models]
    compared = found[0][1] is not None
    rows: list[Row] = [("source", "documents", *names, *(("change",) if compared else ()))]
    for one, change in found[:MOST_SOURCES]:
        figures = [f"{one.models[name]:.4f}" for name in names]
        shown = () if change is None else (format_percent(change),)
        rows.append((f"source {one.number}", f"{one.num_documents:,}", *figures, *shown))
    return rows


def order_sources(loss: LossFacts) -> list[tuple[SourceLoss, float | None]]:
    """Return the losses on each source with their change against the base, the largest first.

    Without a base, or without another model, there is no change, and the largest loss comes first.
    """

    def change(one: SourceLoss) -> float | None:
        *_, last = (name for name in _MODELS if name in one.models)
        return one.models[last] / one.models["base"] - 1 if "base" in one.models and last != "base" else None

    found = [(one, change(one)) for one in loss.by_source]
    return sorted(found, key=lambda pair: max(pair[0].models.values()) if pair[1] is None else pair[1], reverse=True)


def text_rows(report: EvalReport) -> list[Row]:
    """Return the bits per byte of base, pruned and recovered model on each text, with a first row of headings.

    The change is of the last model against the base. A column of models that the report does not have is left out; what
    it has but could not measure is named so.
    """
    texts = [("domain", report.dataset.name, report.loss)]
    if report.general is not None:
        texts.append(("general", report.general.dataset.name, report.general.loss))
    single = report.size.pruned_parameters is None
    shown = [0] if single else [index for index, name in enumerate(_MODELS) if name in table_header(report)]
    table: list[Row] = [("text", "documents", *(_MODELS[index] for index in shown), *(() if single else ("change",)))]
    for kind, name, loss in texts:
        models, last = _summaries(loss), loss.last
        cells = [
            NOT_MEASURED if (model := models[index]) is None else format_estimate(model.bits_per_byte, "{:.4f}")
            for index in shown
        ]
        change = loss.last_comparison
        if not single:
            cells.append(NOT_MEASURED if change is None else format_ratio(change.bits_per_byte_ratio))
        table.append((f"{kind}: {name}", f"{last.num_documents:,} ({last.num_tokens:,} tokens)", *cells))
    return table


def _summaries(loss: LossFacts) -> tuple[LossSummary | None, LossSummary | None, LossSummary | None]:
    return loss.base, loss.pruned, loss.recovered


def _size_rows(size: SizeFacts, *, recovered: bool) -> list[Row]:
    change = "" if size.achieved_ratio is None else format_percent(-size.achieved_ratio)
    if change and size.asked_ratio is not None and format_percent(-size.asked_ratio) != change:
        change += f" (asked {format_percent(-size.asked_ratio)})"
    pruned = "" if size.pruned_parameters is None else f"{size.pruned_parameters:,}"
    rows = [
        ("parameters", f"{size.base_parameters:,}", pruned, change),
        _bytes_row("weights on disk", size.base_weight_bytes, size.pruned_weight_bytes),
    ]
    return [(name, base, last, last if recovered else "", change) for name, base, last, change in rows]


def _loss_rows(loss: LossFacts, where: str, show: _Cells) -> Iterator[Row]:
    """Yield bits per byte and perplexity on a text; with intervals also the excess loss per token."""
    models, change = _summaries(loss), loss.last_comparison
    missing = NOT_MEASURED if loss.pruned is not None or loss.recovered is not None else ""
    absent = (missing, NOT_MEASURED if loss.recovered is not None else "", "")

    def cells(name: str, pattern: str) -> list[str]:
        return [
            gone if model is None else show.estimate(getattr(model, name), pattern)
            for model, gone in zip(models, absent, strict=True)
        ]

    difference = NOT_MEASURED if change is None and missing else ""
    if change is not None:
        difference = show.ratio(change.bits_per_byte_ratio)
    yield (f"bits per byte{where}", *cells("bits_per_byte", "{:.4f}"), difference)
    same_tokens = change is None or change.excess_nats_per_token is not None
    if (same_tokens and not where) or show.intervals:
        yield (f"perplexity per token{where}", *cells("perplexity", "{:.2f}"), _perplexity_change(change, show))
    if show.intervals and change is not None and change.excess_nats_per_token is not None:
        excess = show.estimate(change.excess_nats_per_token, "{:+.4f}")
        if loss.predicted_excess is not None:
            excess += f" (predicted for pruned: {loss.predicted_excess:+.4f})"
        yield (f"excess loss{where} (nats per token)", "", "", "", excess)


def _perplexity_change(change: LossComparison | None, show: _Cells) -> str:
    if change is None:
        return ""
    if change.perplexity_ratio is None:
        return "not comparable: other tokens"
    return show.estimate(change.perplexity_ratio, "x{:.3f}")


def _choice_rows(facts: MultipleChoiceFacts, show: _Cells) -> Iterator[Row]:
    for index, base in enumerate(facts.base):
        change = ""
        if facts.paired is not None:
            paired = facts.paired[index]
            change = show.points(paired.difference)
            if show.intervals:
                change += f" (McNemar p {paired.p_value:.2g})"
        shots = "-".join(str(count) for count in sorted(set(base.shots)))
        measure = f"accuracy, {base.source} ({base.num_questions:,} questions"
        measure += f"{f', {shots}-shot' if show.intervals else ''}, chance {100 * base.chance:.0f} %)"
        pruned = "" if facts.pruned is None else show.share(facts.pruned[index].accuracy)
        yield measure, show.share(base.accuracy), pruned, change


def _speed_rows(speed: SpeedFacts, show: _Cells) -> Iterator[Row]:
    ratio = speed.ratio()
    quartiles = partial(format_spread, pattern="{:,.1f}")
    for name in ("prefill", "decode"):
        cells = (
            "" if one is None else show.spread(getattr(one, name), quartiles, "{:,.1f}")
            for one in (speed.base, speed.pruned)
        )
        change = "" if ratio is None else show.spread(getattr(ratio, name), format_speedup, "x{:.2f}")
        yield (f"{name} (tokens/s)", *cells, change)


def _memory_row(memory: MemoryFacts) -> Row:
    base = None if memory.base is None else memory.base.peak_rss
    pruned = None if memory.pruned is None else memory.pruned.peak_rss
    return _bytes_row("peak memory (RSS)", base, pruned)


def _bytes_row(measure: str, base: int | None, pruned: int | None) -> tuple[str, str, str, str]:
    before, after = ("" if size is None else f"{size / 1e6:,.1f} MB" for size in (base, pruned))
    return measure, before, after, format_percent(pruned / base - 1) if base and pruned is not None else ""


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of plain text, with the columns aligned."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
