"""Tables, verdict and picture of the benchmark of loss by bytes."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.by_source import mean_change
from benchmarks.common import describe_runs, highest_load, table
from benchmarks.frontier_text import BASE, HEALED
from benchmarks.methods import DEFAULT
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.reports.formatting import format_change
from hf_context_prune.evaluation.reports.plots import new_figure

Key = tuple[str, str, float, str]
"""(domain, what was done, share of the parameters removed, data type)."""
Found = Mapping[Key, Mapping[str, Any]]
REFERENCE = "f16"
"""Data type of the base model against which all losses are shown."""
SMALL = "q4_k_m"
"""Below the base model's size in this type, every point of the front should be a pruned model."""
STYLES = {BASE: ("base model, quantised", "0.35", "s"), DEFAULT: ("pruned", "#0072B2", "o")}
STYLES |= {HEALED: ("pruned and trained", "#D55E00", "D")}


def label_of(key: Key) -> str:
    """Return a file's name in tables."""
    _, form, share, dtype = key
    return f"base, {dtype}" if form == BASE else f"{share:.0%} gone{', trained' if form == HEALED else ''}, {dtype}"


def front(found: Found, keys: Iterable[Key], cost: str, text: str = "domain") -> list[Key]:
    """Return the files that none beats: with at most that cost (bytes, or seconds per token), none has less loss."""
    best: list[Key] = []
    for key in sorted(keys, key=lambda key: (_cost(found[key], cost), sum(found[key][text]["nll"]))):
        if not best or sum(found[key][text]["nll"]) < sum(found[best[-1]][text]["nll"]):
            best.append(key)
    return best


def _cost(row: Mapping[str, Any], cost: str) -> float:
    return row["bytes"] if cost == "bytes" else 1 / gain_of(row)


def gain_of(row: Mapping[str, Any]) -> float:
    """Return the decode speed against the base model's reference file, the median of the turns."""
    return statistics.median(own / base for base, own in row["turns"])


def change_of(found: Found, key: Key, text: str, seed: int) -> Estimate:
    """Return the relative change of bits per byte against the reference file; sources are drawn, then documents."""
    base = found[key[0], BASE, 0.0, REFERENCE][text]
    return mean_change(base["nll"], found[key][text]["nll"], base["sources"], seed)


def keys_of(found: Found, domain: str) -> list[Key]:
    """Return the keys of a domain."""
    return [key for key in found if key[0] == domain]


def verdict(found: Found, domain: str) -> str:
    """Return in words whether pruned models make the front below the base model's small file, in bytes and in time."""
    small = (domain, BASE, 0.0, SMALL)
    if small not in found:
        return ""
    sentences = []
    for cost, what in (("bytes", "smaller"), ("time", "faster")):
        limit = _cost(found[small], cost)
        below = [key for key in front(found, keys_of(found, domain), cost) if _cost(found[key], cost) < limit]
        own = [key for key in below if key[1] != BASE]
        sentences.append(
            f"Of the {len(below)} files of the front that are {what} than the base model in {SMALL}, {len(own)} are pruned"
        )
    return f"{'. '.join(sentences)} (goal: all)."


def file_table(found: Found, args: argparse.Namespace, domain: str) -> str:
    """Return the table of all files of a domain, by bytes."""
    fronts = {cost: front(found, keys_of(found, domain), cost) for cost in ("bytes", "time")}
    texts = [text for text in ("domain", "general") if text in found[domain, BASE, 0.0, REFERENCE]]
    body = []
    for key in sorted(keys_of(found, domain), key=lambda key: found[key]["bytes"]):
        row = found[key]
        losses = (format_change(change_of(found, key, text, args.seed)) for text in texts)
        marks = " ".join(cost for cost, best in fronts.items() if key in best)
        gains = [own / base for base, own in row["turns"]]
        speed = f"{gain_of(row):.2f} ({min(gains):.2f} to {max(gains):.2f})"
        body.append([label_of(key), f"{row['bytes'] / 1e6:,.1f}", *losses, speed, marks])
    names = [domain if text == "domain" else "general text" for text in texts]
    return table(["file", "MB", *names, "decode speed", "on the front of"], body)


def draw(found: Found, args: argparse.Namespace, target: Path) -> None:
    """Write the picture as PNG: loss by bytes on the domain and on general text; the broad grey line is the front."""
    domain = args.compared
    figure = new_figure(figsize=(8, 4.2))
    figure.subplots_adjust(left=0.09, right=0.98, top=0.81, bottom=0.13, wspace=0.22)
    figure.suptitle("SmolLM2-135M-Instruct: bits per byte by size of the GGUF file", fontsize=11)
    for axis, text in zip(figure.subplots(1, 2), ("domain", "general"), strict=True):
        for form, (label, color, marker) in STYLES.items():
            keys = [key for key in keys_of(found, domain) if key[1] == form]
            changes = [change_of(found, key, text, args.seed) for key in keys]
            values = [1 + change.value for change in changes]
            spans = [change.interval or (change.value, change.value) for change in changes]
            bars = [
                [max(value - 1 - low, 0) for value, (low, _) in zip(values, spans, strict=True)],
                [max(high + 1 - value, 0) for value, (_, high) in zip(values, spans, strict=True)],
            ]
            sizes = [found[key]["bytes"] / 1e6 for key in keys]
            axis.errorbar(
                sizes, values, yerr=bars, ls="", marker=marker, color=color, ms=4.5, elinewidth=0.6, label=label
            )
            for share in sorted({key[2] for key in keys}):  # one model in all data types
                points = sorted(
                    (size, value) for key, size, value in zip(keys, sizes, values, strict=True) if key[2] == share
                )
                axis.plot(*zip(*points, strict=True), color=color, lw=0.8, alpha=0.6)
                if share:
                    offset = {"textcoords": "offset points", "xytext": (5, -3)}
                    axis.annotate(f"-{100 * share:.0f} %", points[-1], color=color, fontsize=7.5, **offset)
        line = front(found, keys_of(found, domain), "bytes", text)
        points = [(found[key]["bytes"] / 1e6, 1 + change_of(found, key, text, args.seed).value) for key in line]
        axis.step(*zip(*points, strict=True), where="post", color="0.75", lw=3, zorder=0, label="best at its size")
        axis.set_xscale("log")
        axis.set_yscale("log")
        _set_ticks(axis, [found[key]["bytes"] / 1e6 for key in keys_of(found, domain)])
        axis.set_title(domain if text == "domain" else "general text", fontsize=9.5, loc="left")
        axis.set_xlabel("MB (log scale)", fontsize=9)
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.axes[0].set_ylabel("bits per byte, times the base model's", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.945), ncols=4)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=200, metadata={"Software": None})


def _set_ticks(axis: Any, sizes: Sequence[float]) -> None:
    ticks = [size for size in (40, 60, 80, 100, 150, 200, 300, 400) if min(sizes) * 0.8 <= size <= max(sizes) * 1.2]
    axis.set_xticks(ticks, [str(size) for size in ticks])
    axis.set_xticks([], minor=True)
    low, high = axis.get_ylim()
    marks = [mark for mark in (0.9, 0.95, 1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0) if low <= mark <= high]
    axis.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axis.set_yticks([], minor=True)
    axis.tick_params(labelsize=8.5)


def results_text(found: Found, args: argparse.Namespace, picture: Path) -> str:
    """Return the section of RESULTS.md."""
    rows = list(found.values())
    base_speed = statistics.median(base for base, _ in found[args.compared, BASE, 0.0, REFERENCE]["turns"])
    parts = [
        f"""## Loss by bytes{", quick" if args.quick else ""}

![Bits per byte by size of the file]({picture.name})

SmolLM2-135M-Instruct in GGUF, as it is and pruned by the default ({args.num_samples} x {args.length} tokens; "trained": {args.minutes:g} minutes of
`recover`), all from the same weights (dequantised from a Q4_1 file of 98.4 MB), without an importance matrix. The weights of every file are read
back and scored by PyTorch; llama.cpp rounds activations, too. Change of bits per byte against the base model in {REFERENCE}, on passages of validation text,
at most {args.eval_tokens:,} tokens of the domain and {args.general_tokens:,} of general text; 95 % bootstrap intervals draw sources, then documents.
Decode speed: times that of the base model in {REFERENCE} ({base_speed:.0f} tokens/s), by llama.cpp's own clock on {args.threads} threads, in turns: median
and range. A file is on a front where no file of as few bytes, or as fast, has less loss on the domain."""
    ]
    for domain in args.domains:
        parts += [f"### {domain}", file_table(found, args, domain), verdict(found, domain)]
    runs = describe_runs({"setting": setting} for row in rows for setting in row["settings"])
    parts.append(
        f"`python -m benchmarks.bytes --data DATA{args.given}` at {runs}, load of the speeds up to {highest_load(rows)}, "
        f"seed {args.seed}."
    )
    return "\n\n".join(part for part in parts if part)
