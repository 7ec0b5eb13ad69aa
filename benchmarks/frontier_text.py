"""Rows, tables and verdicts of the benchmark of loss by size."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.by_source import mean_and_worst, mean_change, worst_table
from benchmarks.common import describe_runs, table
from benchmarks.methods import DEFAULT, LAYERS, METHODS
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.reports.formatting import format_change, format_percent

BASE, HEALED = "base", "healed"
FORMS = ("native", "variable")
"""The two forms that the default chooses from: one width for all layers, or a width for each."""
LARGEST_OF_FORMS = 0.3
"""Largest share of the parameters at which both forms are measured."""
GOALS = {0.2: 0.0, 0.3: 0.04, 0.5: 0.18}
"""Share removed -> largest mean change of bits per byte of the default."""
MOST_BEHIND = 0.01
"""Largest change of bits per byte of the default against the best other choice at the same size."""

Row = Mapping[str, Any]
Found = Mapping[tuple[str, str, float], Row]
"""Rows by (domain, method, share of the parameters removed)."""


def label_of(method: str, args: argparse.Namespace) -> str:
    """Return the name of a method in tables and picture."""
    own = {
        DEFAULT: "default",
        LAYERS: "default without tokens",
        HEALED: f"default, {args.minutes:g} minutes of training",
        "native": "`native_architecture=True`",
        "variable": "`native_architecture=False`",
    }
    return own[method] if method in own else METHODS[method].label


def change(base: Row, before: Row, after: Row, seed: int) -> Estimate:
    """Return the relative change of bits per byte from one row to another; sources are drawn, then documents of each.

    Args:
        base: The row of the base model, with the source of each document.
        before: A row on the same documents.
        after: Another.
        seed: Seed of the draws.
    """
    return mean_change(before["nll"], after["nll"], base["sources"], seed)


def changes_of(rows: Found, domains: Sequence[str], method: str, share: float, seed: int) -> list[Estimate]:
    """Return the relative change of bits per byte in each domain, then their mean with the range over the domains."""
    found = []
    for domain in domains:
        base = rows[domain, BASE, 0.0]
        found.append(change(base, base, rows[domain, method, share], seed))
    values = [one.value for one in found]
    return [*found, Estimate(float(np.mean(values)), None, (min(values), max(values)) if len(values) > 1 else None)]


def general_change(rows: Found, domain: str, method: str, share: float, seed: int) -> Estimate:
    """Return the relative change of bits per byte on general text."""
    base = rows[domain, BASE, 0.0]["general"]
    return change(base, base, rows[domain, method, share]["general"], seed)


def gone(rows: Found, domain: str, method: str, share: float) -> float:
    """Return the share of all parameters that a row really removed."""
    return 1 - rows[domain, method, share]["parameters"] / rows[domain, BASE, 0.0]["parameters"]


def _units(row: Row) -> str:
    return f"{row['gone']['tokens']:,} / {row['gone']['neurons']:,} / {row['gone']['kv_groups']:,}"


def domain_table(rows: Found, args: argparse.Namespace) -> str:
    """Return the table of the default, with and without tokens, in every domain."""
    body = []
    for share in args.shares:
        for method in (DEFAULT, LAYERS):
            found = changes_of(rows, args.domains, method, share, args.seed)
            units = [_units(rows[domain, method, share]) for domain in args.domains]
            least = min(gone(rows, domain, method, share) for domain in args.domains)
            body.append([f"{share:.0%}", label_of(method, args), *map(format_change, found), f"{least:.2%}", *units])
    header = ["asked", "method", *args.domains, "mean", "removed at least"]
    return table([*header, *(f"tokens / neurons / KV groups gone, {domain}" for domain in args.domains)], body)


def sources_table(rows: Found, args: argparse.Namespace) -> str:
    """Return the table of what the default's worst source loses beside the mean, at each size."""
    return worst_table(
        {
            share: {
                domain: mean_and_worst(base["nll"], rows[domain, DEFAULT, share]["nll"], base["sources"], args.seed)
                for domain in args.domains
                for base in [rows[domain, BASE, 0.0]]
            }
            for share in args.shares
        },
        args.domains,
    )


def forms_table(rows: Found, args: argparse.Namespace) -> str:
    """Return the table of the best native and the best variable model, and what the default takes."""
    body = []
    for share in (share for share in args.shares if share <= LARGEST_OF_FORMS):
        for domain in args.domains:
            base, default = rows[domain, BASE, 0.0], rows[domain, DEFAULT, share]
            forms = {form: rows.get((domain, form, share)) for form in FORMS}
            cells = [
                "can't be reached" if row is None else format_change(change(base, base, row, args.seed))
                for row in forms.values()
            ]
            native, variable = forms["native"], forms["variable"]
            gap = ""
            if native is not None and variable is not None:
                gap = format_change(change(base, variable, native, args.seed))
            taken = "both: they have the same sizes"
            if not all(default["forms"].values()):
                taken = "native" if default["forms"]["native"] else "variable"
            predicted, known = default["predicted_losses"], default["predicted_losses"].get("base")
            expected = ""
            if known and "native" in predicted:
                expected = format_percent((predicted["native"] - predicted["variable"]) / known)
            units = ["" if row is None else _units(row) for row in forms.values()]
            body.append([f"{share:.0%}", domain, *cells, gap, expected, taken, *units])
    header = ["asked", "domain", "native", "variable", "native against variable", "predicted", "the default takes"]
    return table([*header, *(f"tokens / neurons / KV groups gone, {form}" for form in FORMS)], body)


def compared_table(rows: Found, args: argparse.Namespace) -> str:
    """Return the table of one domain: peers, training and general text."""
    body, domain = [], args.compared
    base = rows[domain, BASE, 0.0]
    for share in args.shares:
        for method in (DEFAULT, LAYERS, *args.peers, HEALED):
            general = method in (DEFAULT, HEALED)
            body.append(
                [
                    f"{share:.0%}",
                    label_of(method, args),
                    format_change(change(base, base, rows[domain, method, share], args.seed)),
                    format_change(general_change(rows, domain, method, share, args.seed)) if general else "",
                    f"{gone(rows, domain, method, share):.2%}",
                ]
            )
    return table(["asked", "method", f"bits per byte, {domain}", "bits per byte, general text", "removed"], body)


def verdicts(rows: Found, args: argparse.Namespace) -> str:
    """Return each goal with the measured value."""
    lines = []
    for share in (share for share in args.shares if share in GOALS):
        mean, goal = changes_of(rows, args.domains, DEFAULT, share, args.seed)[-1], GOALS[share]
        verdict = "met" if mean.value <= goal else f"missed by {100 * (mean.value - goal):.1f} points"
        lines.append(
            f"- {share:.0%} gone, mean of {', '.join(args.domains)}: {format_change(mean)} bits per byte (goal: at most "
            f"{goal:+.0%}): {verdict}."
        )
    gap, domain, share, best = max(_behind(rows, args), key=lambda item: item[0].value)
    verdict = "met" if gap.value <= MOST_BEHIND else f"missed by {100 * (gap.value - MOST_BEHIND):.1f} points"
    lines.append(
        f"- The default is never more than {MOST_BEHIND:.0%} worse than the best choice that is tried at the same size: at "
        f"worst {format_change(gap)} against {label_of(best, args)} ({domain}, {share:.0%}): {verdict}."
    )
    return "\n".join(lines)


def _behind(rows: Found, args: argparse.Namespace) -> list[tuple[Estimate, str, float, str]]:
    """Return (change of the default against the best other choice, domain, share, that choice) for every size."""
    result = []
    for domain in args.domains:
        for share in args.shares:
            others = {
                method: row
                for (name, method, size), row in rows.items()
                if (name, size) == (domain, share) and method not in (DEFAULT, HEALED)
            }
            best = min(others, key=lambda method: sum(others[method]["nll"]))
            gap = change(rows[domain, BASE, 0.0], others[best], rows[domain, DEFAULT, share], args.seed)
            result.append((gap, domain, share, best))
    return result


def time_text(rows: Found, args: argparse.Namespace) -> str:
    """Return the time of all rows, by method."""
    own = {id(row): (method, row) for (_, method, _), row in rows.items() if method not in FORMS}
    own |= {id(row): (method, row) for (_, method, _), row in rows.items() if id(row) not in own}
    parts = []
    for method in dict.fromkeys(method for method, _ in own.values()):
        seconds = [row["seconds"] for name, row in own.values() if name == method]
        label = "base model" if method == BASE else label_of(method, args)
        parts.append(f"{label}: {len(seconds)} rows, {sum(seconds) / 60:.1f} minutes")
    curves = sum(row["stages"].get("curves", 0.0) for _, row in own.values() if "stages" in row)
    total = sum(row["seconds"] for _, row in own.values())
    return (
        f"Time of all rows, on cores that other work may have shared: {total / 3600:.2f} hours, including "
        f"{curves / 60:.1f} minutes for the curves, which all sizes of a domain share ({'; '.join(parts)})."
    )


def results_text(rows: Found, args: argparse.Namespace, picture: Path) -> str:
    """Return the section of RESULTS.md."""
    base = {domain: rows[domain, BASE, 0.0] for domain in args.domains}
    text = "; ".join(
        f"{domain}: {sum(tokens for _, tokens, _ in row['documents']):,} tokens of {len(row['documents'])} documents, "
        f"{row['dropped']} dropped as overlapping, calibrated on {row['calibration_tokens']:,} tokens"
        for domain, row in base.items()
    )
    peers = [
        f"- {METHODS[method].label}, {share:.0%}: {row['version']}, `{row['call']}`"
        + (f" ({row['note']})" if row["note"] else "")
        for method in args.peers
        if METHODS[method].peer
        for share in args.shares
        for row in [rows[args.compared, method, share]]
    ]
    link = os.path.relpath(picture, common.RESULTS.parent)
    return f"""## Loss by size

SmolLM2-135M-Instruct (float32, dequantised), pruned on the train text of each domain, tested on the validation split
({text}). Change of bits per byte against the base model on the same documents; no training unless it is named. Documents of
a source are alike, so 95 % bootstrap intervals draw sources, then documents; with fewer than five sources the range from the
best to the worst source stands in their place. Means have the range over the domains. *Default*: `PrunerConfig(pruning_ratio=share)`; *without tokens*:
`units="neurons,kv_groups"`. All rows have the same calibration text and the same test text; the curves that decide on the
sizes are measured once per domain.

![Change of bits per byte by share of the parameters removed]({link})

{domain_table(rows, args)}

{verdicts(rows, args)}

### The worst source

The default by source of the test text. A source of fewer than ten documents has no interval; one of one or two says how much
such a document may lose, and no more.

{sources_table(rows, args)}

### The native architecture

One width for all layers, which the model's own class holds, beside widths that differ by layer, at the same size.
*Predicted*: native minus variable, as a share of the base model's loss; up to 1 %, the default takes the native one.

{forms_table(rows, args)}

### Peers, training and general text: {args.compared}

Peers remove the same number of neurons from every layer: with a KV group of every layer as well, FLAP loses more at the same
size (see the section on neurons and KV groups). `bias` adds biases that this architecture can't save, so it is measured in
memory. Training: `RecoveryConfig(max_minutes={args.minutes:g})` on the same train text.
General text is not calibrated or trained on.

{compared_table(rows, args)}

{chr(10).join(peers)}

{time_text(rows, args)}

`python -m benchmarks.frontier --data DATA{args.given}` at {describe_runs(rows.values())}, seed {args.seed}.
"""
