"""README's picture: bits per byte against the base model, by share of the parameters removed."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frontier_text import (
    BASE,
    HEALED,
    LARGEST_OF_FORMS,
    Found,
    change,
    changes_of,
    general_change,
    gone,
)
from benchmarks.methods import DEFAULT, LAYERS
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.reports.plots import new_figure

BLUE, LIGHT_BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#2F8FC6", "#D55E00", "#009E73", "#AA4499"
"""Colours that colour-blind people tell apart (Okabe and Ito; purple by Tol), dark enough for text."""
PEERS = {"flap+bias": "FLAP + bias", "optipfair-maw": "OptiPFair MAW"}
TICKS = (-0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 9.0)
LABEL_GAP = 0.058
"""Least distance of two labels, as a share of the panel's height."""


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        label: Beside its last point.
        points: (share removed in per cent, change of bits per byte).
        style: Options of matplotlib's `errorbar`.
    """

    label: str
    points: Sequence[tuple[float, Estimate]]
    style: dict[str, Any]


def domain_lines(rows: Found, args: argparse.Namespace) -> list[Line]:
    """Return the default and the default without tokens, as means of all domains, with the domains behind them."""
    ways = {DEFAULT: ("default", BLUE, "-", "o"), LAYERS: ("without tokens", PURPLE, "--", "s")}
    result = []
    for method, (label, color, dashes, marker) in ways.items():
        found = {share: changes_of(rows, args.domains, method, share, args.seed) for share in args.shares}
        for place, domain in enumerate(args.domains if len(args.domains) > 1 else ()):
            points = [(100 * gone(rows, domain, method, share), found[share][place]) for share in args.shares]
            alone = [(x, Estimate(one.value, None)) for x, one in points]
            result.append(Line("", alone, {"color": color, "ls": dashes, "lw": 0.8, "alpha": 0.55}))
        style = {"color": color, "ls": dashes, "marker": marker, "lw": 2.2, "ms": 5}
        mean = [(_mean_gone(rows, args, method, share), found[share][-1]) for share in args.shares]
        result.append(Line(label, mean, style))
    native = [
        (_mean_gone(rows, args, "native", share), changes_of(rows, args.domains, "native", share, args.seed)[-1])
        for share in args.shares
        if share <= LARGEST_OF_FORMS and all((domain, "native", share) in rows for domain in args.domains)
    ]
    if native:
        style = {"color": LIGHT_BLUE, "ls": ":", "marker": "D", "mfc": "white", "lw": 1.4, "ms": 5}
        result.append(Line("native architecture", native, style))
    return result


def _mean_gone(rows: Found, args: argparse.Namespace, method: str, share: float) -> float:
    return 100 * float(np.mean([gone(rows, domain, method, share) for domain in args.domains]))


def compared_lines(rows: Found, args: argparse.Namespace) -> list[Line]:
    """Return peers, training and general text in one domain."""
    domain, seed = args.compared, args.seed
    base = rows[domain, BASE, 0.0]

    def own(method: str) -> list[tuple[float, Estimate]]:
        return [
            (100 * gone(rows, domain, method, share), change(base, base, rows[domain, method, share], seed))
            for share in args.shares
        ]

    general = [
        (100 * gone(rows, domain, DEFAULT, share), general_change(rows, domain, DEFAULT, share, seed))
        for share in args.shares
    ]
    greys, markers = ("0.45", "0.2", "0.6"), ("^", "v", "x")
    peers = [
        Line(
            PEERS.get(method, method),
            own(method),
            {"color": greys[turn % 3], "ls": "--", "marker": markers[turn % 3], "lw": 1.5, "ms": 5},
        )
        for turn, method in enumerate(args.peers)
    ]
    line = {"lw": 2.2, "ms": 5}
    healed = f"default + {args.minutes:g} min\nof training"
    return [
        *peers,
        Line("default, on\ngeneral text", general, {"color": GREEN, "ls": "-.", "marker": "P", **line}),
        Line("without tokens", own(LAYERS), {"color": PURPLE, "ls": "--", "marker": "s", **line}),
        Line("default", own(DEFAULT), {"color": BLUE, "marker": "o", **line}),
        Line(healed, own(HEALED), {"color": ORANGE, "marker": "D", **line}),
    ]


def draw(rows: Found, args: argparse.Namespace, target: Path) -> None:
    """Write the picture as PNG: all domains on the left, one domain with everything else on the right."""
    figure = new_figure(figsize=(8, 4.3))
    figure.subplots_adjust(left=0.1, right=0.845, top=0.83, bottom=0.115, wspace=0.74)
    left, right = figure.subplots(1, 2)
    figure.suptitle("SmolLM2-135M-Instruct pruned for one domain: bits per byte on held-out text", fontsize=11, y=0.985)
    names = args.domains
    what, thin = names[0], ""
    if len(names) > 1:
        what, thin = f"mean of {', '.join(names[:-1])} and {names[-1]}", "(thin: each), "
    draw_panel(left, domain_lines(rows, args), f"{what}\n{thin}no training; lower is better")
    draw_panel(right, compared_lines(rows, args), f"{args.compared}\nbeside peers, and after training")
    left.set_ylabel("change against the base model (log scale)", fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=200, metadata={"Software": None})


def draw_panel(axis: Any, lines: Sequence[Line], title: str) -> None:
    """Draw lines on a log scale of the ratio to the base model, each with its label beside its last point."""
    axis.axhline(1, color="0.35", lw=1)
    bounds, ends = [1.0], []
    last = max(x for line in lines for x, _ in line.points)
    for line in lines:
        x, y = [x for x, _ in line.points], [1 + one.value for _, one in line.points]
        spans = [one.interval or (one.value, one.value) for _, one in line.points]
        bars = np.array([[value - 1 - low, high + 1 - value] for value, (low, high) in zip(y, spans, strict=True)]).T
        has_bars = any(one.interval for _, one in line.points)
        axis.errorbar(x, y, yerr=np.maximum(bars, 0) if has_bars else None, elinewidth=1, capsize=2, **line.style)
        bounds += [1 + bound for span in spans for bound in span]
        if line.label and x[-1] < 0.9 * last:  # it ends inside the panel, where there is room below
            box = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85}  # other lines pass there
            style = label_style(line) | {"bbox": box}
            axis.annotate(line.label, (x[-1], y[-1]), (8, -13), textcoords="offset points", zorder=5, **style)
        elif line.label:
            ends.append((line, y[-1]))
    low, high = np.log(min(bounds)), np.log(max(bounds))
    margin = 0.06 * max(high - low, 0.05)
    axis.set_yscale("log")
    axis.set_ylim(float(np.exp(low - margin)), float(np.exp(high + margin)))
    ticks = choose_ticks(low - margin, high + margin)
    axis.set_yticks([1 + tick for tick in ticks], [f"{100 * tick:+.0f} %" if tick else "base" for tick in ticks])
    axis.set_yticks([], minor=True)
    axis.set_xlim(0, 1.06 * last)
    axis.set_xticks(np.arange(0, last + 1, 10), [f"{share:.0f}" for share in np.arange(0, last + 1, 10)])
    axis.tick_params(labelsize=8.5, colors="0.25")
    axis.set_xlabel("parameters removed (%)", fontsize=9)
    axis.set_title(title, fontsize=9.5, color="0.2", loc="left")
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    heights = [(float(np.log(y)) - low + margin) / (high - low + 2 * margin) for _, y in ends]
    spread = spread_apart(heights, [line.label.count("\n") + 1 for line, _ in ends])
    for (line, _), height in zip(ends, spread, strict=True):
        axis.annotate(line.label, (1.02, height), xycoords="axes fraction", annotation_clip=False, **label_style(line))


def label_style(line: Line) -> dict[str, Any]:
    """Return the style of the label of a line."""
    return {"va": "center", "fontsize": 8.8, "color": line.style["color"]}


def choose_ticks(low: float, high: float) -> list[float]:
    """Return the ticks within a range of log ratios that leave room for their labels; the base is always one."""
    least, chosen = 0.055 * (high - low), [0.0]
    for tick in sorted(TICKS, key=lambda tick: (tick not in (-0.05, 0.1, 0.2, 0.5, 1.0, 2.0), abs(tick))):
        place = float(np.log(1 + tick))
        if low <= place <= high and all(abs(place - np.log(1 + other)) >= least for other in chosen):
            chosen.append(tick)
    return sorted(chosen)


def spread_apart(places: Sequence[float], lines: Sequence[int]) -> list[float]:
    """Return heights of labels, in the order given, moved apart until no two overlap.

    Args:
        places: Wanted heights of their middles, as shares of the panel.
        lines: Lines of text of each label.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    found = list(places)
    for _ in range(200):
        for below, above in itertools.pairwise(order):
            missing = LABEL_GAP * (lines[below] + lines[above]) / 2 - (found[above] - found[below])
            if missing > 0:
                found[below] -= missing / 2
                found[above] += missing / 2
    return found
