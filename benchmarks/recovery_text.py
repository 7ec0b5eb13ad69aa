"""Rows and sections of RESULTS.md for the benchmark of recovery."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common import describe_runs, table
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.reports.formatting import format_change
from hf_context_prune.training.recovery.config import LEARNING_RATES

GOALS = {("dense", 0.3): 0.0, ("dense-tuned", 0.3): 0.03}
"""(row of the base model, share removed) -> largest change of bits per byte against that row after `GOAL_MINUTES`."""
GOAL_MINUTES = 30.0
SHORT_MINUTES = 8.0
"""Minutes of training for the ablations and for ``--sizes``."""

LEARNING_RATE = LEARNING_RATES["full"]


def relative(dense: Mapping[str, Any], row: Mapping[str, Any], seed: int) -> Estimate:
    """Return the relative change of bits per byte, with a 95 % bootstrap interval over documents, paired."""
    before, after = np.asarray(dense["nll"]), np.asarray(row["nll"])
    picks = np.random.default_rng(seed).integers(0, len(before), (2000, len(before)))
    resampled = after[picks].sum(axis=1) / before[picks].sum(axis=1) - 1
    span = tuple(np.percentile(resampled, [2.5, 97.5]).tolist()) if len(before) > 1 else None
    return Estimate(float(after.sum() / before.sum() - 1), span)


@dataclass(frozen=True)
class Run:
    """A row of the tables: the model and its training.

    Attributes:
        label: Name in the table.
        options: Options of `RecoveryConfig`; None: no training.
        dense: Train the base model instead of the pruned model.
    """

    label: str
    options: Mapping[str, Any] | None = None
    dense: bool = False


HEADLINE = {
    "dense": Run("base model", dense=True),
    "dense-tuned": Run("base model, tuned", {}, dense=True),
    "one-shot": Run("pruned, without recovery"),
    "ours": Run("pruned and recovered (default)", {}),
}
ABLATIONS = {
    "dense-short": Run("base model, tuned", {}, dense=True),
    "ours-short": Run("default", {}),
    "rate": Run("at twice the learning rate", {"learning_rate": 2 * LEARNING_RATE}),
    "lora": Run("LoRA", {"method": "lora"}),
}
REMOVED = {
    "half-teacher": "distillation: half of the loss from the base model as teacher",
    "teacher-alone": "distillation: the whole loss from the teacher",
    "ticket": "kept weights rewound to the pretrained ones",
}
"""Ways of training that no longer exist. The ablations show their rows if a file has them."""
REMOVED_NOTE = (
    "Distillation from the base model and rewinding (`rewind`) were measured with the version that still had them, at two "
    "of the commits below. They did worse than the default in the same time, so these options were removed."
)
EQUAL_TOKENS = {
    "gradual": "pruned during training (`ContextPruneCallback`, three prunings)",
    "then": "pruned, then trained on as many tokens",
}


Found = Mapping[tuple[Any, ...], dict[str, Any]]


def _line(label: str, row: Mapping[str, Any], dense: Mapping[str, Any], seed: int) -> list[str]:
    """Return one row of a table."""
    history = row.get("history")
    return [
        label,
        f"{1 - row['parameters'] / dense['parameters']:.1%}",
        *("" if row is dense else format_change(relative(dense[text], row[text], seed)) for text in ("own", "general")),
        f"{history['tokens']:,}" if history else "",
        f"{history['tokens'] / history['seconds']:,.0f}" if history else "",
    ]


_HEADER = [
    *("", "parameters removed", "bits per byte, own domain", "bits per byte, general"),
    *("tokens trained on", "tokens/s"),
]


def section(heading: str, rows: Iterable[Mapping[str, Any]], args: argparse.Namespace, *parts: str) -> str:
    """Return a section of RESULTS.md, with the commits and machines of its rows."""
    how = f"`python -m benchmarks.recovery --data DATA{args.given}` at {describe_runs(rows)}"
    return "\n\n".join((f"## Recovery: {heading}", *parts, f"{how}, seed {args.seed}."))


def domain_text(domain: str, rows: Found, args: argparse.Namespace) -> str:
    """Return the table of a domain, and whether the goal was met."""
    used = {place: row for place, row in rows.items() if place[0] == domain and place[1] in HEADLINE}
    dense = used[domain, "dense", 0]
    body = [_line(HEADLINE[name].label, used[domain, name, 0], dense, args.seed) for name in ("dense", "dense-tuned")]
    verdicts = []
    for share in args.shares:
        for name in ("one-shot", "ours"):
            body.append(_line(f"{share:.0%}: {HEADLINE[name].label}", used[domain, name, share], dense, args.seed))
        ours = used[domain, "ours", share]
        parts = []
        for name, what in (("dense", ""), ("dense-tuned", " tuned for the same time")):
            gap = relative(used[domain, name, 0]["own"], ours["own"], args.seed)
            parts.append(f"{format_change(gap)} against the base model{what}")
            if args.minutes >= GOAL_MINUTES and (goal := GOALS.get((name, share))) is not None:
                parts[-1] += f" (goal: at most {goal:+.0%}, {'met' if gap.value <= goal else 'missed'})"
        verdicts.append(f"- {share:.0%} removed: {', '.join(parts)}.")
    tokens = ", ".join(f"{share:.0%}: {args.tokens[str(share)]:,} entries" for share in args.shares)
    return section(
        f"{domain}, by size" if args.sizes else domain,
        used.values(),
        args,
        f"SmolLM2-135M-Instruct (float32 weights, bfloat16 products where the CPU has them). Pruned in one shot "
        f"(vocabulary, then neurons and KV groups by adaptive widths; {tokens}) on {args.num_samples} x {args.length} tokens of "
        f"the domain's train text, then trained on that text for {args.minutes:g} minutes, including evaluation. Change of "
        f"bits per byte against the base model, on test text (validation split) of the domain and on general test text (at "
        f"most {args.eval_tokens:,} tokens each), 95 % bootstrap intervals over documents. *Tokens/s*: of training, including "
        f"evaluation.",
        table(_HEADER, body),
        "\n".join(verdicts),
    )


def ablations_text(rows: Found, args: argparse.Namespace) -> str:
    """Return the table of ways to train for the same short time; ways that no longer exist come last, if they have rows."""
    domain, share = args.domains[0], args.shares[0]
    dense = rows[domain, "dense", 0]
    runs = {"one-shot": HEADLINE["one-shot"], **ABLATIONS}
    labels = {name: run.label for name, run in runs.items()}
    removed = {name: label for name, label in REMOVED.items() if (domain, name, share) in rows}
    used = {name: rows[domain, name, share] for name in (*labels, *removed)}
    return section(
        f"ablations ({domain}, {share:.0%} gone)",
        used.values(),
        args,
        f"The base model, and the pruned model in several ways, each trained for {args.short_minutes:g} minutes. The weights "
        f"with the least loss on documents set aside from the train text are kept: the weights before training, if no step was "
        f"better.",
        table(_HEADER, [_line(label, used[name], dense, args.seed) for name, label in {**labels, **removed}.items()]),
        *([REMOVED_NOTE] if removed else []),
    )


def callback_text(rows: Found, args: argparse.Namespace) -> str:
    """Return the table of pruning during and before training on the same tokens, and the time that listening takes."""
    domain, share = args.domains[0], args.shares[0]
    dense, used = rows[domain, "dense", 0], {name: rows[domain, name, share] for name in EQUAL_TOKENS}
    gradual, then = (row["history"] for row in used.values())
    learning = gradual["seconds"] - gradual["listening"] - gradual["pruning"]
    return section(
        f"the callback ({domain}, {share:.0%} of all parameters, neurons alone)",
        used.values(),
        args,
        f"{args.steps} steps of the Trainer either way, on the same text with the same learning rate. *Tokens/s* of the first way "
        f"include its prunings; the second model was pruned before training.",
        table(_HEADER, [_line(label, used[name], dense, args.seed) for name, label in EQUAL_TOKENS.items()]),
        f"Listening took {gradual['listening'] / learning:.2%} of the training time without prunings (goal: at most 10 %). The "
        f"three prunings took {gradual['pruning']:.0f} s, {gradual['pruning'] / learning:.1%} of that time, and the pruning before "
        f"training {then['pruning']:.0f} s.",
    )
