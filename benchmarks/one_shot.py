"""Compare one-shot pruning at equal sizes: all criteria of this package, its best methods, and the code of peers.

python -m benchmarks.one_shot --data PATH/TO/data            # three domains, neurons; resumes
python -m benchmarks.one_shot --data PATH/TO/data --sizes all20 all30 --num-samples 64    # neurons and KV groups
python -m benchmarks.one_shot --data PATH/TO/data --sizes all20 --peers PATH/TO/checkouts    # GRASPrune, 2SSP, SliceGPT too
python -m benchmarks.one_shot --data PATH/TO/data --domains medicine --sizes all20 --peers PATH/TO/checkouts \
    --methods layers default grasprune grasprune-own    # GRASPrune on as many tokens as it asks for: hours
python -m benchmarks.one_shot --data PATH/TO/data --quick    # one domain, one size
python -m benchmarks.one_shot --data PATH/TO/data --model gemma3-270m --sizes mlp25 --methods flap+bias ours ...
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.by_source import RESAMPLES, mean_and_worst, read_sources, sources_of
from benchmarks.common import ROOT, Rows, cell, given, highest_load, parser, plot_path, table, write_section
from benchmarks.frontier import OPTIONS, PASSAGES, FrontierDomain
from benchmarks.methods import (
    HIGH,
    LAYERS,
    METHODS,
    OWN_RECIPE,
    REFERENCE,
    SIZES,
    Size,
    add_checkouts,
    budgets,
    rounded,
)
from benchmarks.models import MODELS
from hf_context_prune.config import PrunerConfig
from hf_context_prune.evaluation.bootstrap import Estimate, bootstrap_estimate, ratio
from hf_context_prune.evaluation.losses import DocumentLoss, compare_losses
from hf_context_prune.evaluation.reports.formatting import format_change
from hf_context_prune.modeling.architectures import TARGETS
from hf_context_prune.pruning.allocation.probing import SEARCH_TOKENS
from hf_context_prune.pruning.allocation.sensitivity import PROBE_TOKENS


def losses_of(row: Mapping[str, Any], dense: Mapping[str, Any]) -> list[DocumentLoss]:
    """Return the losses of a row. Only the row of the base model holds the sizes and sources of the documents."""
    return [
        DocumentLoss(doc, source, nll, tokens, size)
        for (doc, tokens, size), source, nll in zip(dense["documents"], dense["sources"], row["nll"], strict=True)
    ]


def excess(base: Mapping[str, Any], row: Mapping[str, Any], dense: Mapping[str, Any], seed: int) -> Estimate:
    """Return the loss of a row minus the loss of `base`, in nats per token, paired by document."""
    found = compare_losses(losses_of(base, dense), losses_of(row, dense), seed=seed).excess_nats_per_token
    assert found is not None  # one tokenizer
    return found


def shares(
    triples: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]], seed: int
) -> list[Estimate]:
    """Return the excess loss divided by that of the reference, for each domain, then the mean with the range of the domains.

    Args:
        triples: (row of the base model, row of the reference, row) of each domain.
        seed: Seed of the draws: of sources, then of documents, the same for both methods.
    """
    found = []
    for dense, *pair in triples:
        reference, above = (np.subtract(row["nll"], dense["nll"]).tolist() for row in pair)
        found.append(bootstrap_estimate(ratio, (above, reference), dense["sources"], seed=seed, n_resamples=RESAMPLES))
    values = [estimate.value for estimate in found]
    return [*found, Estimate(float(np.mean(values)), None, (min(values), max(values)) if len(values) > 1 else None)]


DEFAULT_MODEL = "smollm2-135m"
Found = Mapping[tuple[str, str, str], dict[str, Any]]
"""Rows by (domain, size, method); base models by (domain, "", "dense"), refitted base models by (domain, "", "refit")."""


class OneShotDomain(FrontierDomain):
    """A domain whose test text is windows of many documents, and whose sizes are those of the peers."""

    label = "one-shot"
    keeps_models = False

    def own_config(self, method: str, share: float) -> PrunerConfig:
        return PrunerConfig(
            target_params=round(self.model.num_parameters() * (1 - share)),
            **OPTIONS[method],
            num_calibration_samples=self.args.num_samples,
            max_seq_length=self.args.length,
            pruning_seed=self.args.seed,
        )

    def row(self, name: str, size: Size, base: dict[str, Any]) -> dict[str, Any]:
        """Return the row of a method at a size."""
        method = METHODS[name]
        if not method.whole:
            return self.measure(method, size, base)
        share = budgets(self.model, size)[2] / self.model.num_parameters()
        shutil.rmtree(self.folder)  # curves of another size would count as no time
        self.folder.mkdir()
        vars(self).pop("probe", None)  # each whole method pays for its own
        begin = time.perf_counter()
        model, tokenizer, _ = self.pruned(name, share)
        seconds = time.perf_counter() - begin
        losses = self.losses(model, tokenizer, [doc for doc, _, _ in base["documents"]])
        self.forget()
        forwards = round(seconds / self.forward_seconds, 1)
        return {"parameters": model.num_parameters(), "nll": rounded(losses), "forwards": forwards}


def common_methods() -> list[str]:
    """Return the methods that have the same calibration samples."""
    return [name for name, method in METHODS.items() if method.num_samples is None]


def methods_of(args: argparse.Namespace, size: str) -> list[str]:
    """Return the methods that are measured at a size, in order."""

    def fits(name: str) -> bool:
        return (name != HIGH or SIZES[size].high) and (not METHODS[name].whole or SIZES[size].attention)

    return [name for name in args.methods if fits(name)]


def best_of_ours(args: argparse.Namespace, name: str) -> str | None:
    """Return the best of our methods that has the units of the peers, of those that were measured at a size."""
    return next((method for method in (LAYERS, "ours-adaptive", "ours") if method in methods_of(args, name)), None)


def worst_line(rows: Found, args: argparse.Namespace, name: str) -> str:
    """Return what the best of our methods loses on each domain, and on its worst source; empty where none was measured."""
    method = best_of_ours(args, name)
    if method is None:
        return ""
    parts = []
    for domain in args.domains:
        dense, row = rows[domain, "", "dense"], rows[domain, name, method]
        mean, worst = mean_and_worst(dense["nll"], row["nll"], dense["sources"], args.seed)
        parts.append(f"{domain} {format_change(mean)}, " + ("one source" if worst is None else f"at worst {worst}"))
    return f"{METHODS[method].label}, change of the loss by source of the text: {'; '.join(parts)}."


def peer_lines(rows: Found, args: argparse.Namespace, name: str, peer: str) -> list[str]:
    """Return how much more a peer loses than the best of our methods that has its units, and than adaptive widths."""
    lines = []
    for own in dict.fromkeys((best_of_ours(args, name), "ours-adaptive")):
        if own is None or own not in methods_of(args, name):
            continue
        gaps = [
            f"{d} {cell(excess(rows[d, name, own], rows[d, name, peer], rows[d, '', 'dense'], args.seed))}"
            for d in args.domains
        ]
        lines.append(f"{METHODS[peer].label} minus {METHODS[own].label}, nats per token, paired: {'; '.join(gaps)}.")
    return lines


def size_section(rows: Found, args: argparse.Namespace, name: str) -> str:
    """Return the table of one size, with verdicts on goals, paired differences and notes."""
    dense = {domain: rows[domain, "", "dense"] for domain in args.domains}
    body, lines, notes = [], [], []
    for method in methods_of(args, name):
        own = [rows[domain, name, method] for domain in args.domains]
        found = [excess(dense[d], row, dense[d], args.seed) for d, row in zip(args.domains, own, strict=True)]
        share: list[Estimate] = []
        if REFERENCE in args.methods:
            share = shares(
                [(dense[d], rows[d, name, REFERENCE], rows[d, name, method]) for d in args.domains], args.seed
            )
        sizes = sorted({row["parameters"] for row in own})
        body.append(
            [
                METHODS[method].label,
                *(cell(estimate) for estimate in found),
                *(cell(estimate, 2) for estimate in share or [None] * (len(args.domains) + 1)),
                " to ".join(f"{size:,}" for size in sorted({sizes[0], sizes[-1]})),
                ", ".join(f"{row['forwards']:.1f}" for row in own),
            ]
        )
        goal = SIZES[name].goal
        if method.startswith("ours") and goal is not None and share:
            off = share[-1].value - goal
            verdict = "met" if off <= 0 else f"missed by {off:.3f}"
            lines.append(
                f"Goal of a mean share of at most {goal}: {METHODS[method].label}: {cell(share[-1])}, {verdict}."
            )
        if own[0].get("note"):
            notes.append(f"- {METHODS[method].label}: {own[0]['note']}.")
        if METHODS[method].peer:
            lines += peer_lines(rows, args, name, method)
        predicted = [
            f"{d} {row['predicted']:.3f} and {estimate.value:.3f}"
            for d, row, estimate in zip(args.domains, own, found, strict=True)
            if row.get("predicted") is not None and method != HIGH
        ]
        if predicted:
            lines.append(f"{METHODS[method].label}, predicted and measured excess: {'; '.join(predicted)}.")
    if {"ours", "ours-adaptive"} <= set(args.methods):
        gaps = [
            f"{d} {cell(excess(rows[d, name, 'ours'], rows[d, name, 'ours-adaptive'], dense[d], args.seed), 4)}"
            for d in args.domains
        ]
        lines.append(f"Ours, adaptive minus uniform widths, nats per token, paired: {'; '.join(gaps)}.")
    if HIGH in methods_of(args, name):
        alone = [f"{d} {cell(excess(dense[d], rows[d, '', 'refit'], dense[d], args.seed))}" for d in args.domains]
        lines.append(
            f"The refit of `refit_lm_head=True` on the base model, with nothing removed: {'; '.join(alone)}. This much of the "
            f"gain of `refit_lm_head=True` may be adaptation to the domain, not reconstruction."
        )
    lines += [line for line in [worst_line(rows, args, name)] if line]
    header = ["method", *(f"excess, {d}" for d in args.domains), *(f"share, {d}" for d in args.domains)]
    body_text = table([*header, "mean share", "parameters", "forward passes"], body)
    return "\n\n".join(
        part for part in (f"### {SIZES[name].label}", body_text, "\n\n".join(lines), "\n".join(notes)) if part
    )


def plot(rows: Found, args: argparse.Namespace, name: str) -> None:
    """Plot the excess loss by method with intervals, one panel per size; a log scale has no place for losses below zero."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(args.sizes),
        figsize=(3 + 3.2 * len(args.sizes), 1 + 0.35 * len(args.methods)),
        sharey=True,
        squeeze=False,
    )
    places = dict(zip(args.methods, np.arange(len(args.methods))[::-1].tolist(), strict=True))
    for axis, size in zip(axes[0], args.sizes, strict=True):
        for turn, domain in enumerate(args.domains):
            dense = rows[domain, "", "dense"]
            methods = methods_of(args, size)
            found = [excess(dense, rows[domain, size, method], dense, args.seed) for method in methods]
            above = 0.18 * ((len(args.domains) - 1) / 2 - turn)
            ordinates = [places[method] + above for method in methods]
            errorbars(axis, ordinates, found, domain, horizontal=True, log=not has_default(args))
        axis.set(
            xscale="linear" if has_default(args) else "log",
            xlabel="excess, nats per token",
            title="\n".join(SIZES[size].label.split(", ")),
        )
        axis.title.set_fontsize("small")
        axis.grid(axis="x", which="both", alpha=0.3)
    axes[0][0].set_yticks(list(places.values()), [METHODS[method].label.replace("`", "") for method in args.methods])
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(plot_path(name), dpi=120)
    plt.close(figure)


def has_default(args: argparse.Namespace) -> bool:
    """Return whether the default itself is among the methods, which may lose less than nothing."""
    return any(METHODS[method].whole for method in args.methods)


def errorbars(
    axis: Any, places: Any, found: Sequence[Estimate], label: str, *, horizontal: bool, log: bool = True
) -> None:
    """Draw values with intervals; on a log scale without values that are not above zero."""
    keep = [i for i, estimate in enumerate(found) if estimate.value > 0 or not log]
    values = [found[i].value for i in keep]
    spans = [found[i].interval or (found[i].value, found[i].value) for i in keep]
    bars = np.array(
        [[v - (max(low, v / 1e3) if log else low), high - v] for v, (low, high) in zip(values, spans, strict=True)]
    ).T
    at = [places[i] for i in keep]
    x, y, error = (values, at, "xerr") if horizontal else (at, values, "yerr")
    axis.errorbar(x, y, **{error: bars if len(keep) else None}, fmt="o" if horizontal else "o-", ms=4, label=label)


_WHOLE = """The default removes tokens too, so that its layers keep more; it counts the tokens of the whole train text, and both defaults
refit the rows of the LM head on up to four times the samples. """
_CHECKOUTS = """SliceGPT can't tie the LM head to the embedding any more: it pays for a second one out of its
layers. All random numbers begin with seed 0, GRASPrune's too (its own: 42). Times are less exact than losses: the forward pass is timed
once in a run, in float32, as the peers' code computes on this CPU, while ours rounds factors to bfloat16 where the CPU has AMX; and the
machine was shared, so that the time of one method differs between domains."""


def results_text(rows: Found, args: argparse.Namespace, name: str, machine: str) -> str:
    """Return the section of RESULTS.md."""
    dense = {domain: rows[domain, "", "dense"] for domain in args.domains}
    text = "; ".join(
        f"{d}: {sum(tokens for _, tokens, _ in row['documents']):,} tokens, a window of each of {len(row['documents'])} documents, "
        f"perplexity {math.exp(sum(row['nll']) / sum(tokens for _, tokens, _ in row['documents'])):.2f}, "
        f"{row['dropped']} documents dropped as overlapping, calibrated on {row['calibration_tokens']:,} tokens"
        for d, row in dense.items()
    )
    calls = [
        f"- {METHODS[method].label}, {size}: {row['version']}, `{row['call']}`"
        for method in args.methods
        if METHODS[method].peer
        for size in args.sizes
        for row in [rows[args.domains[0], size, method]]
    ]
    commits = sorted({row["setting"]["commit"] for row in rows.values()})
    title = "" if args.model == DEFAULT_MODEL else f", {MODELS[args.model][0]}"
    if args.targets == TARGETS:
        title += ", neurons and KV groups"
    if args.peers is not None:
        title += ", newest peers, " + " and ".join(f"{SIZES[size].share:.0%}" for size in args.sizes)
        title += ", one by its own recipe" if OWN_RECIPE in args.methods else ""
    exceptions = f"\n\n{(_WHOLE if has_default(args) else '')}{_CHECKOUTS}" if args.peers is not None else ""
    return f"""## One-shot pruning side by side{title}

{MODELS[args.model][0]} (float32, dequantised, {dense[args.domains[0]]["parameters"]:,} parameters). *Excess*: loss over the
base model in nats per token of its tokenizer; *share*: excess divided by the excess of `flap` + `bias`; 95 % bootstrap
intervals, which draw sources and then documents, paired; in brackets without an interval, where there are fewer than five sources: the
range of the sources, and of the domains for the mean. *Forward passes*: the time, with what methods share, as a multiple of a forward pass of the base
model over the calibration text, by domain. All methods have the same calibration text and the same test text, from the validation split ({text}).
`obs` + `least_squares` is the recipe of SlimGPT (arXiv 2412.18110) for the choice and of GRAIL (arXiv 2602.23795) for the refit.
All widths are uniform, except for adaptive widths, the default and GRASPrune's, which have the same total. `bias` adds biases that this architecture
can't save, so `bias` is measured in memory.{"" if has_default(args) else " The plot leaves out values that are not above zero."} All models, the base model
included, are scored with matrix products of factors rounded to bfloat16 if the CPU has AMX.{exceptions}

![Excess loss by method]({plot_path(name).name})

{chr(10).join(f"{size_section(rows, args, size)}{chr(10)}" for size in args.sizes)}
Calls of the peers:

{chr(10).join(calls) or "- none in this run"}

`python -m benchmarks.one_shot --data DATA{args.given}` at {", ".join(f"`{c}`" for c in commits)}, {machine}, seed {args.seed}. Highest load average: {highest_load(rows.values())}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--peers", type=Path)
    first.add_argument("--work", type=Path, default=ROOT / "rows")
    known, _ = first.parse_known_args(arguments)
    if known.peers is not None:
        add_checkouts(known.peers, known.work / "models")
    options = parser(__doc__ or "", several=True)
    options.add_argument("--peers", type=Path, help="folder of checkouts of GRASPrune and 2SSP, which adds methods")
    options.add_argument("--quick", action="store_true", help="one domain, one size, little text")
    options.add_argument("--model", choices=MODELS, default=DEFAULT_MODEL, help="base model")
    options.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=["mlp25", "mlp50"], help="sizes, either all mlp… or all all…"
    )
    options.add_argument("--methods", nargs="+", choices=METHODS, default=common_methods(), help="rows of the tables")
    options.add_argument("--num-samples", type=int, default=128, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument(
        "--eval-tokens",
        type=int,
        default=24_000,
        help="at most this many test tokens per domain: a window per document",
    )
    if "--quick" in arguments:
        options.set_defaults(domains=["medicine"], sizes=["mlp25"], num_samples=48, eval_tokens=12_000)
    args = options.parse_args(arguments)
    if len({SIZES[size].attention for size in args.sizes}) > 1:
        options.error("--sizes: mlp… and all… are in separate tables; give one kind.")
    args.targets = TARGETS if SIZES[args.sizes[0]].attention else ("mlp",)
    args.given = given(options, args)
    section = "one_shot_quick" if args.quick else "one_shot"
    if args.targets == TARGETS:
        section += "_all"
    if args.model != DEFAULT_MODEL:
        section += f"_{args.model}"
    if args.peers is not None:
        section += f"_peers_{'_'.join(args.sizes)}" + ("_own" if OWN_RECIPE in args.methods else "")
    store, load = Rows(args, "one_shot", seed=args.seed), cache(MODELS[args.model][1])
    common = {"blocks": args.num_samples, "length": args.length, "eval_tokens": args.eval_tokens, "seed": args.seed}
    common |= {"text": PASSAGES}
    if args.model != DEFAULT_MODEL:
        common["model"] = args.model
    args.shares = [0.2]  # the calibration text is the same for all
    domains = {domain: OneShotDomain(load, args, domain, targets=args.targets) for domain in args.domains}
    sources = read_sources(args, args.domains)
    keys = {domain: {**common, "domain": domain} for domain in domains}
    rows: dict[tuple[str, str, str], dict[str, Any]] = {
        (name, "", "dense"): store.get_or_measure({**keys[name], "method": "dense"}, domain.measure_dense)
        for name, domain in domains.items()
    }
    for name in domains:
        row = rows[name, "", "dense"]
        rows[name, "", "dense"] = {**row, "sources": sources_of(row, sources[name])}
    for name, domain in domains.items() if any(HIGH in methods_of(args, size) for size in args.sizes) else ():
        dense = rows[name, "", "dense"]
        rows[name, "", "refit"] = store.get_or_measure(
            {**keys[name], "method": "refit"}, lambda d=domain, row=dense: d.measure_refit(row)
        )
    for turn, size in enumerate(args.sizes, start=1):
        for domain_name, domain in domains.items():
            for method in methods_of(args, size):
                searched = {"search": [SEARCH_TOKENS, PROBE_TOKENS]} if METHODS[method].adaptive else {}
                rows[domain_name, size, method] = store.get_or_measure(
                    {**keys[domain_name], "size": size, "method": method, **searched},
                    lambda d=domain, m=method, s=size, row=rows[domain_name, "", "dense"]: d.row(m, SIZES[s], row),
                )
        finished = argparse.Namespace(**{**vars(args), "sizes": args.sizes[:turn]})
        plot(rows, finished, section)
        write_section(section, results_text(rows, finished, section, store.setting["machine"]))


if __name__ == "__main__":
    main()
