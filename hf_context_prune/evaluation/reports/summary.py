"""What a report says, in words: the four numbers that a reader wants first."""

from __future__ import annotations

from hf_context_prune.evaluation.bootstrap import MIN_DOCUMENTS, MIN_SOURCES
from hf_context_prune.evaluation.speed import Spread

from .formatting import format_percent
from .report import EvalReport, LossFacts
from .rows import order_sources, source_tables, table_header, table_rows, text_table

_NOISY = 1.25
_SIZE_SHOWN = 0.0005  # a smaller difference would be shown as "0.0 %"
_SAME_SHARE = 0.01  # of parameters and bytes gone: files also hold names and shapes


def headline(report: EvalReport) -> list[str]:
    """Return sentences on size, speed, loss on the domain and loss elsewhere, as far as they were measured.

    For a single model, its size and its loss.
    """
    if report.size.pruned_parameters is None:
        bits = f"{report.loss.last.bits_per_byte.value:.4f} bits per byte on {report.dataset.name}"
        return [f"{report.size.base_parameters:,} parameters, {bits}.", *_few(report)]
    domain = [f"{_loss(report.dataset.name, report.loss)}.", *_sources(report)]
    return [_size_and_speed(report), *domain, _elsewhere(report), *_few(report)]


def describe(report: EvalReport, *, intervals: bool = False) -> str:
    """Return the headline and the table of figures as plain text."""
    parts = [text_table(table_header(report), table_rows(report, intervals=intervals))]
    if intervals:
        parts += [f"{title}:\n{text_table(rows[0], rows[1:])}" for title, rows in source_tables(report)]
        parts += legend(report)
    return "\n".join([*headline(report), *(line for part in parts for line in ("", part))])


def legend(report: EvalReport) -> list[str]:
    """Return sentences on what stands in brackets and in parentheses behind the losses."""
    losses = [report.loss, *([] if report.general is None else [report.general.loss])]
    drawn = [loss for loss in losses if loss.last.bits_per_byte.interval is not None]
    found = []
    if drawn:
        over = "sources and documents" if any(loss.by_source for loss in drawn) else "documents"
        how = f"{report.loss.last.n_resamples:,} resamples, seed {report.loss.last.seed}"
        found.append(f"Brackets behind a loss hold 95 % bootstrap intervals over {over} ({how}).")
    if any(loss.last.bits_per_byte.span is not None for loss in losses):
        found.append(
            f"Parentheses behind a loss hold the lowest and the highest source of a text with too few sources "
            f"({MIN_SOURCES} are needed) or documents for an interval."
        )
    if report.multiple_choice is not None:
        found.append(
            "Brackets behind an accuracy hold 95 % intervals over questions: Wilson's, and Newcombe's for a change."
        )
    return found


def _size_and_speed(report: EvalReport) -> str:
    size = report.size
    gone = size.achieved_ratio or 0.0
    before, after = size.base_weight_bytes, size.pruned_weight_bytes
    fewer, more = "smaller", "larger"
    if before and after and abs(1 - after / before - gone) > _SAME_SHARE:  # a text part, or another dtype
        fewer, more = "fewer parameters", "more parameters"
    change = f"{100 * abs(gone):.1f} % {fewer if gone > 0 else more}"
    parts = [change if abs(gone) >= _SIZE_SHOWN else "As large as the base"]
    if before and after:
        parts[0] += f" ({_megabytes(before)} to {_megabytes(after)} MB)"
    ratio = report.speed.ratio() if report.speed else None
    parts.append("speed not measured" if ratio is None else _speed(ratio.decode))
    return f"{', '.join(parts)}."


def _speed(ratio: Spread) -> str:
    """Return a ratio of speeds, the median of rounds that ran in turns; with its quartiles where they lie far apart."""
    spread = f"; quartiles {ratio.q1:.2f} to {ratio.q3:.2f}" if ratio.q3 > _NOISY * ratio.q1 else ""
    return f"{ratio.median:.2f} times as fast (decode{spread})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e7 else 2}f}"


def _loss(where: str, loss: LossFacts) -> str:
    if loss.base is None:
        return f"On {where}: {loss.last.bits_per_byte.value:.4f} bits per byte; the base was not measured"
    if loss.recovered is None or loss.recovered_comparison is None:
        assert loss.comparison is not None
        return f"On {where}: {format_percent(loss.comparison.bits_per_byte_ratio.value - 1)} bits per byte"
    after = format_percent(loss.recovered_comparison.bits_per_byte_ratio.value - 1)
    pruned = ""
    if loss.comparison is not None:
        pruned = f" ({format_percent(loss.comparison.bits_per_byte_ratio.value - 1)} before the training)"
    return f"On {where}: {after} bits per byte{pruned}"


def _elsewhere(report: EvalReport) -> str:
    if report.general is None:
        return "Elsewhere: not measured."
    return f"{_loss(f'general text ({report.general.dataset.name})', report.general.loss)}."


def _few(report: EvalReport) -> list[str]:
    texts = [(report.dataset.name, report.loss)]
    if report.general is not None:
        texts.append((report.general.dataset.name, report.general.loss))
    return [
        f"{count} document{'' if count == 1 else 's'} of {name}: too few for an interval ({MIN_DOCUMENTS} are needed)."
        for name, loss in texts
        if (count := loss.last.num_documents) < MIN_DOCUMENTS
    ]


def _sources(report: EvalReport) -> list[str]:
    """Return a sentence on the sources that lose least and most."""
    changes = [change for _, change in order_sources(report.loss) if change is not None]
    if not changes:
        return []
    return [f"From {format_percent(changes[-1])} to {format_percent(changes[0])} on its {len(changes)} sources."]
