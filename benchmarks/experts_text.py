"""Tables and verdict of the benchmark of removed experts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import cell, table
from benchmarks.experts_model import SHARES, divergence
from hf_context_prune.evaluation.bootstrap import Estimate, bootstrap_estimate, ratio
from hf_context_prune.evaluation.losses import DocumentLoss, compare_losses, summarize_losses

RANDOM, REFERENCE = "random", "reap"
NEURONS = "neurons"
METHODS = {
    RANDOM: "random",
    "frequency": "`frequency`",
    REFERENCE: "`reap`",
    "energy": "`energy`",
    NEURONS: "neurons inside all experts",
}
CUT, REPAIRED, HEAD = "cut", "repaired", "head"
WAYS = {CUT: "cut", REPAIRED: "refitted", HEAD: "refitted, head too"}
"""What a pruned model is: as it is cut, with its experts refitted, and with the rows of its head refitted too."""
GOAL = 1 / 3
"""Largest share of what `reap` alone loses at half of the experts."""
GOAL_SHARE = 0.5

Found = Mapping[tuple[str, float], Mapping[str, Any]]
"""Rows by (method, share of the experts removed)."""


def losses_of(rows: Found, place: tuple[str, float], way: str, domain: str) -> list[DocumentLoss]:
    """Return the losses of a model on a domain. Only the row of the base model holds the documents."""
    documents = rows["base", 0.0]["documents"][domain]
    return [
        DocumentLoss(doc, source, nll, tokens, size)
        for (doc, source, tokens, size), nll in zip(documents, rows[place][way][domain], strict=True)
    ]


def excess(rows: Found, place: tuple[str, float], way: str, domain: str, seed: int) -> Estimate:
    """Return the loss over the base model, in nats per token, paired by document."""
    base = losses_of(rows, ("base", 0.0), CUT, domain)
    found = compare_losses(base, losses_of(rows, place, way, domain), seed=seed).excess_nats_per_token
    assert found is not None  # one tokenizer
    return found


def share_of_reference(rows: Found, method: str, share: float, way: str, domain: str, seed: int) -> Estimate:
    """Return the excess loss divided by that of the reference as it is cut, paired by document."""
    base = losses_of(rows, ("base", 0.0), CUT, domain)
    above = [
        [after.nll - before.nll for before, after in zip(base, losses_of(rows, *place, domain), strict=True)]
        for place in (((method, share), way), ((REFERENCE, share), CUT))
    ]
    return bootstrap_estimate(ratio, above, [one.source for one in base], seed=seed, n_resamples=2000)


def results_text(rows: Found, args: argparse.Namespace) -> str:
    """Return the section of RESULTS.md."""
    row, shape, domain = rows["routing", 0.0], args.shape, args.domain
    model = row["key"]["model"]
    base = {name: summarize_losses(losses_of(rows, ("base", 0.0), CUT, name), seed=args.seed) for name in SHARES}
    texts = "; ".join(
        f"{name}: {one.num_tokens:,} tokens of {one.num_documents} documents, {one.nats_per_token.value:.3f} nats per "
        f"token, {one.bits_per_byte.value:.3f} bits per byte"
        for name, one in base.items()
    )
    sections = "\n\n".join(size_text(rows, args, share) for share in args.shares)
    return f"""## Experts removed by context

An OLMoE-shaped model that is trained here: {row["parameters"]:,} parameters, of which
{shape.layers * shape.experts * row["expert_parameters"]:,} in experts; {shape.layers} layers of {shape.experts} experts
with {shape.neurons} neurons each, {shape.per_token} of them per token; hidden size {shape.hidden_size}; {row["vocabulary"]:,} tokens. Trained on
{model["tokens"]:,} tokens of the train text of {", ".join(f"{name} ({share:.0%})" for name, share in SHARES.items())} in
{model["seconds"] / 60:.0f} minutes ({model["tokens"] / max(1e-9, model["seconds"]):,.0f} tokens/s), balancing loss {shape.balance:g}. Test text, from the
validation split: {texts}.

{routing_text(rows, domain)}

Experts, or the neurons inside all of them, are chosen, and those that stay are refitted, on {args.num_samples} x {shape.length} tokens of `{domain}` train. *Excess*: loss over the
whole model in nats per token; *share*: excess divided by that of `reap` as it is cut; 95 % bootstrap intervals over
sources and documents, paired.

{sections}

{head_text(rows, args)}

{verdict(rows, args)}

`python -m benchmarks.experts --data DATA{args.given}` at `{row["setting"]["commit"]}`, {row["setting"]["machine"]}, seed {args.seed}.
"""


def routing_text(rows: Found, domain: str) -> str:
    """Return how much the routing of two texts differs, layer by layer."""
    routed = rows["routing", 0.0]["routed"]
    others = [name for name in SHARES if name != domain]
    pairs = [("first half", "second half"), *((domain, name) for name in others), tuple(others)]
    body = []
    for first, second in pairs:
        found = [divergence(*both) for both in zip(routed[first], routed[second], strict=True)]
        name = f"{domain}, two halves of its samples" if first == "first half" else f"{first} and {second}"
        body.append([name, *(f"{one:.3f}" for one in found), f"{sum(found) / len(found):.3f}"])
    layers = [f"layer {index}" for index in range(len(routed[domain]))]
    return (
        f"Jensen-Shannon divergence, in bits, between how often each expert is chosen on two texts (0: alike; 1: no expert in "
        f"common):\n\n{table(['texts', *layers, 'mean'], body)}"
    )


def size_text(rows: Found, args: argparse.Namespace, share: float) -> str:
    """Return the table of one size."""
    body = []
    for method in args.methods:
        row = rows[method, share]
        left = [one for one in row["error_left"] if one is not None]  # of text that was not fitted, if there was any
        shown = f"{min(left):.0%} to {max(left):.0%}" if left else ""
        for way, label in WAYS.items():
            own = ""
            if (REFERENCE, share) in rows:
                own = cell(share_of_reference(rows, method, share, way, args.domain, args.seed), 2)
            cells = (cell(excess(rows, (method, share), way, name, args.seed)) for name in order(args.domain))
            body.append([METHODS[method], label, *cells, own, "" if way == CUT else shown])
    header = ["what goes", "what stays", *(f"excess, {name}" for name in order(args.domain))]
    first = rows[args.methods[0], share]
    seconds = max(rows[method, share]["repair_seconds"] for method in args.methods)
    return (
        f"### {share:.0%} of the experts removed, or of their neurons: {first['parameters']:,} parameters\n\n"
        + table([*header, f"share, {args.domain}", "squared error left"], body)
        + f"\n\nThe refit of the experts took at most {seconds:.0f} seconds."
    )


def head_text(rows: Found, args: argparse.Namespace) -> str:
    """Return what the refit of the head alone does to the whole model: adaptation to the domain, not repair."""
    alone = [f"{name} {cell(excess(rows, ('base', 0.0), HEAD, name, args.seed))}" for name in order(args.domain)]
    kept = [
        METHODS[method]
        for (method, _), row in rows.items()
        if method in METHODS and not (row["refit"] or {}).get("share")
    ]
    text = f"The refit of the head on the whole model, with nothing removed: {'; '.join(alone)}."
    if kept:
        text += f" It took no step (none lowered the loss on withheld samples) after {', '.join(dict.fromkeys(kept))}."
    return text


def verdict(rows: Found, args: argparse.Namespace) -> str:
    """Return whether the goal is met; empty where its size is not measured."""
    if (REFERENCE, GOAL_SHARE) not in rows:
        return ""
    lines = []
    for method in args.methods:
        for way in (REPAIRED, HEAD):
            found = share_of_reference(rows, method, GOAL_SHARE, way, args.domain, args.seed)
            state = "met" if found.value <= GOAL else f"missed by {found.value - GOAL:.2f}"
            lines.append(f"{METHODS[method]}, {WAYS[way]}: {cell(found, 2)}, {state}")
    return f"Goal of at most a third of what `reap` loses with half of the experts gone: {'; '.join(lines)}."


def order(domain: str) -> Sequence[str]:
    """Return all domains, that of the choice first."""
    return [domain, *(name for name in SHARES if name != domain)]
