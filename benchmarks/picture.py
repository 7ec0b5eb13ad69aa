"""Draw README's picture from the finished rows: loss against size, this project and its peers.

python -m benchmarks.picture    # reads benchmarks/rows, writes docs/loss-against-size.png

Every point is the mean over law and medicine, the domains that all rows have; its bar joins the two. Both axes are
relative to the base model. The rows and their intervals stand in RESULTS.md: "One-shot pruning side by side, neurons
and KV groups", "Vocabulary" and "Recovery".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

DOMAINS = ("law", "medicine")
PICTURE = ROOT.parent / "docs" / "loss-against-size.png"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of the picture: a method at several sizes.

    Attributes:
        label: In the legend.
        points: For each size the rows of the domains, each with its base row first.
        style: Options of matplotlib's `errorbar`.
    """

    label: str
    points: Sequence[Sequence[tuple[Row, Row]]]
    style: Mapping[str, Any]


def read_rows(folder: Path, name: str) -> list[Row]:
    """Return the finished rows of one benchmark."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def row_of(rows: Iterable[Row], **key: Any) -> Row:
    """Return the one row whose key has these values.

    Raises:
        SystemExit: No row has them, or several have.
    """
    found = [row for row in rows if all(row["key"].get(name) == value for name, value in key.items())]
    if len(found) != 1:
        raise SystemExit(f"{len(found)} rows have {key}; the picture needs exactly one.")
    return found[0]


def loss_of(row: Row) -> float:
    """Return the loss of a row on its domain's held-out text, in nats."""
    return float(sum(row["own"]["nll"] if "own" in row else row["nll"]))


def change(base: Row, row: Row) -> tuple[float, float]:
    """Return (share of the parameters removed, change of bits per byte), both in per cent of the base.

    Both rows are losses on the same documents, so their bytes cancel.
    """
    return 100 * (1 - row["parameters"] / base["parameters"]), 100 * (loss_of(row) / loss_of(base) - 1)


def one_shot(rows: Iterable[Row], method: str) -> list[list[tuple[Row, Row]]]:
    """Return the points of a method that removes neurons and KV groups, at 20 and 30 % of all layer parameters."""
    rows = [row for row in rows if row["key"]["blocks"] == 64 and "model" not in row["key"]]
    return [
        [
            (row_of(rows, domain=domain, method="dense"), row_of(rows, domain=domain, method=method, size=size))
            for domain in DOMAINS
        ]
        for size in ("all20", "all30")
    ]


def placed(rows: Iterable[Row], *places: tuple[str, Any], **key: Any) -> list[list[tuple[Row, Row]]]:
    """Return the points at (way, size) of the benchmarks whose keys name a place."""
    rows = list(rows)
    return [
        [
            (
                next(row for row in rows if row["key"]["place"][:2] == [domain, "dense"]),
                row_of(rows, place=[domain, *place], **key),
            )
            for domain in DOMAINS
        ]
        for place in places
    ]


def lines(folder: Path) -> list[Line]:
    """Return all lines, the peers first."""
    pruned, vocabulary, recovery = (read_rows(folder, name) for name in ("one_shot", "vocabulary", "recovery"))
    peer = {"ls": "--", "marker": "s", "ms": 4}
    ours = {"ls": "-", "marker": "o", "ms": 6, "lw": 2}
    tokens = placed(vocabulary, ("ours", 32768), ("ours", 16384))
    return [
        Line("L1, the criterion of Mini-GPTs", one_shot(pruned, "l1"), {**peer, "color": "0.7"}),
        Line("FLAP with bias", one_shot(pruned, "flap+bias"), {**peer, "color": "0.5"}),
        Line("OptiPFair 0.4.2, MAW", one_shot(pruned, "optipfair-maw"), {**peer, "color": "0.3"}),
        Line("this project: neurons and heads", one_shot(pruned, "ours-adaptive"), {**ours, "color": "#0f766e"}),
        Line(
            "this project: vocabulary, then neurons and heads",
            [*tokens, *placed(recovery, ("one-shot", 0.3), ("one-shot", 0.5))],
            {**ours, "color": "#14b8a6"},
        ),
        Line(
            "this project: the same, and 30 minutes of training",
            placed(recovery, ("ours", 0.3), ("ours", 0.5), minutes=30.0),
            {**ours, "color": "#ea580c"},
        ),
    ]


def draw(found: Iterable[Line], target: Path) -> None:
    """Write the picture as PNG."""
    from hf_context_prune.evaluation.reports.plots import new_figure

    figure = new_figure(figsize=(7.6, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="0.6", lw=1)
    axis.annotate("as good as the base model", (17, -0.8), va="top", fontsize=8, color="0.4")
    for line in found:
        changes = [[change(*pair) for pair in point] for point in line.points]
        x = [sum(size for size, _ in point) / len(point) for point in changes]
        y = [sum(loss for _, loss in point) / len(point) for point in changes]
        spans = [
            [middle - min(loss for _, loss in point) for middle, point in zip(y, changes, strict=True)],
            [max(loss for _, loss in point) - middle for middle, point in zip(y, changes, strict=True)],
        ]
        axis.errorbar(x, y, yerr=spans, label=line.label, elinewidth=1, capsize=2, **line.style)
    axis.set(xlabel="parameters removed (%)", ylabel="bits per byte, change (%)", xlim=(0, 52))
    axis.set_title("SmolLM2-135M-Instruct on law and medicine: lower is better", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper right", frameon=False)
    figure.savefig(target, dpi=110, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=ROOT / "rows", help="folder of the finished rows (JSONL)")
    options.add_argument("--output", type=Path, default=PICTURE)
    args = options.parse_args(arguments)
    draw(lines(args.work), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
