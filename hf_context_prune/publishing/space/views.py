"""Views and facts as parts of the page: HTML and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_context_prune.modeling.geometry import units_of, widths_vary
from hf_context_prune.modeling.plan import PruningPlan

from .compare import Side, View
from .facts import Facts, describe_removal, report_rows
from .generation import Turn
from .headline import describe_parts, headline
from .html import render
from .settings import Entry
from .surprise import Span, bits_per_byte, join_words

_STEPS = (1.0, 2.0, 4.0, 8.0)
"""Bits from which a piece has the next stronger colour."""
_WORST = 10


def headline_html(entry: Entry, facts: Facts) -> str:
    """Return the four figures of a model, and what it was made without."""
    return render("headline", name=entry.name, figures=headline(facts, entry.domain), parts=describe_parts(facts.plan))


def status_html(view: View) -> str:
    """Return the line of the status."""
    return render("status", text=view.status, bad=view.refused)


def side_html(side: Side) -> str:
    """Return the figures of one model: speed, first token, weights, tokens written."""
    progress = side.progress
    speed, first = progress.tokens_per_second, progress.first_seconds
    return render(
        "side",
        kind=side.kind,
        name=side.name,
        speed="–" if speed is None else f"{speed:.1f}",
        first="–" if first is None else f"{first:.2f} s",
        megabytes="–" if side.megabytes is None else f"{side.megabytes:,.0f} MB",
        tokens=f"{progress.tokens:,}" if progress.tokens else "–",
    )


def side_text(side: Side, turns: Sequence[Turn] = (), question: str = "") -> str:
    """Return the text of one model, or the reason why it can't write.

    Args:
        side: The model.
        turns: The conversation so far.
        question: What the model answers; "" where there is no conversation.
    """
    text = f"This model can't write: {side.problem}" if side.problem else side.progress.text.lstrip()
    told = [(turn.question, getattr(turn, side.kind)) for turn in turns]
    told += [(question, text)] if question else []
    return "\n\n".join(f"You: {asked}\n\nModel: {answer}" for asked, answer in told) or text


def side_values(side: Side) -> dict[str, Any]:
    """Return one model's progress as JSON values, for programs."""
    progress = side.progress
    return {
        "model": side.name,
        "text": progress.text,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens_per_second,
        "first_token_seconds": progress.first_seconds,
        "megabytes": side.megabytes,
        "stopped": progress.stopped,
        "problem": side.problem,
    }


def span_values(spans: tuple[Span, ...]) -> list[dict[str, Any]]:
    """Return the pieces of a text as JSON values, for programs."""
    return [{"text": span.text, "dense_bits": span.base, "pruned_bits": span.pruned} for span in spans]


def surprise_html(spans: tuple[Span, ...]) -> str:
    """Return the text with every piece coloured by how much more it surprises the pruned model, and a table of words.

    The colours, the tooltips and the table tell the same: a table needs neither sight of colours nor a mouse.
    """
    pieces = []
    for span in spans:
        shown = span.text.lstrip() or span.text
        pieces.append((span.text.removesuffix(shown), shown, _colour(span), _explain(span)))
    words = sorted(join_words(spans), key=lambda span: -span.lost)[:_WORST]
    rows = [
        (word.text.strip() or "(white space)", f"{word.base:.1f}", f"{word.pruned:.1f}", _likelihood(word))
        for word in words
        if word.lost >= _STEPS[0]
    ]
    dense, pruned = bits_per_byte(spans)
    change = f" ({pruned / dense - 1:+.0%})" if dense > 0 else ""
    total = f"On this text: dense {dense:.2f}, pruned {pruned:.2f} bits per byte{change}."
    return render("surprise", pieces=pieces, rows=rows, total=total)


def removed_html(facts: Facts) -> str:
    """Return the tab on the removed parts."""
    return render(
        "removed",
        problems=facts.problems,
        sentences=describe_removal(facts),
        header=("measure", "dense", "pruned", "change"),
        rows=report_rows(facts.report),
        notes=facts.report.notes if facts.report else (),
    )


def table_html(content: tuple[list[str], list[list[str]]], caption: str) -> str:
    """Return a table with its caption."""
    header, rows = content
    return render("table", header=header, rows=rows, caption=caption)


def has_widths(facts: Facts) -> bool:
    """Return whether the widths differ from layer to layer, so that a chart of them says something."""
    return facts.plan is not None and widths_vary(facts.plan.widths)


def widths_html(facts: Facts) -> str:
    """Return the charts of the kept and removed units of every layer; "" where all layers are alike."""
    if facts.plan is None or not has_widths(facts):
        return ""
    names = {"neurons": "MLP neurons", "kv_groups": "KV groups (groups of attention heads)", "experts": "experts"}
    return render("widths", charts=[_chart(facts.plan, unit, names[unit]) for unit in units_of(facts.plan.dense)])


def _chart(plan: PruningPlan, unit: str, name: str) -> dict[str, Any]:
    dense, kept = ([getattr(widths, unit) for widths in which] for which in (plan.dense, plan.widths))
    layers = [
        (_kept_in(layer, left, before), 100 * left / max(dense), 100 * (before - left) / max(dense))
        for layer, (before, left) in enumerate(zip(dense, kept, strict=True))
    ]
    share = 1 - sum(kept) / sum(dense)
    title = f"{share:.0%} of the {name} are gone" if share else f"All {name} remain"
    return {"title": title, "name": name, "layers": layers, "most": f"{max(dense):,}", "last": len(dense) - 1}


def _kept_in(layer: int, left: int, before: int) -> str:
    return f"layer {layer}: {left:,} of {before:,} kept" if before else f"layer {layer} has none"


def _colour(span: Span) -> str:
    """Return the style class of a piece; "" where both models find it about as likely."""
    level = sum(abs(span.lost) >= step for step in _STEPS)
    if not level:
        return ""
    return f"lost-{level}" if span.lost > 0 else f"gained-{min(level, 2)}"


def _explain(span: Span) -> str:
    return f"dense {span.base:.1f} bits, pruned {span.pruned:.1f} bits: {_likelihood(span)}"


def _likelihood(span: Span) -> str:
    """Return how much less (or more) likely the pruned model finds a piece."""
    bits = abs(span.lost)
    if bits < _STEPS[0]:
        return "about as likely"
    times = f"{2**bits:.1f}" if bits < 4 else f"{2**bits:,.0f}" if bits < 14 else "over 10,000"
    return f"{times} times {'less' if span.lost > 0 else 'more'} likely"
