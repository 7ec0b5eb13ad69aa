"""Measure what `balance_sources` costs on a domain as a whole, and what it saves on its worst source.

python -m benchmarks.balance --data PATH/TO/data            # three domains; resumes
python -m benchmarks.balance --data PATH/TO/data --quick    # one domain, little text
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

from benchmarks.by_source import RESAMPLES, changes_by_source, mean_change, worst_change
from benchmarks.common import Rows, corpus, describe_runs, given, parser, table, write_section
from benchmarks.frontier import FrontierDomain
from benchmarks.methods import DEFAULT, documents_of, rounded
from benchmarks.models import smollm2
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.balance import group_by_source
from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource
from hf_context_prune.evaluation.bootstrap import MIN_DOCUMENTS, bootstrap_estimate, ratio
from hf_context_prune.evaluation.passages import Passages
from hf_context_prune.evaluation.reports.formatting import format_change

BY_SIZE, BALANCED = "by size", "balanced"
TEXTS = ("domain", "sources")
"""The two test texts: passages as the domain's documents come, and passages of equal parts of its sources."""

Found = Mapping[tuple[str, str], Mapping[str, Any]]
"""Rows by (domain, way); the base model's way is empty."""


class BalancedDomain(FrontierDomain):
    """A domain whose sources count by their size, or equally."""

    def __init__(self, load: Callable[[], Any], args: argparse.Namespace, name: str, way: str) -> None:
        super().__init__(load, args, name, targets=("mlp",))
        self.way, self.label = way, f"balance-{way.replace(' ', '-')}"

    def own_config(self, method: str, share: float) -> PrunerConfig:
        return replace(super().own_config(method, share), balance_sources=self.way == BALANCED)

    @cached_property
    def test_text(self) -> tuple[TextSource, int]:
        """The whole validation split, of which both test texts are cut, and how many documents overlap with the train text."""
        return drop_overlapping(corpus(self.args, "validation", self.name), self.train)

    @cached_property
    def passages(self) -> dict[str, TextSource]:
        """The two test texts, each of at most ``--eval-tokens``."""
        text, tokenizer, args = self.test_text[0], self.load().tokenizer, self.args
        return {
            name: Passages.of(
                text, tokenizer, max_tokens=args.eval_tokens, seed=args.seed, balance_sources=name == "sources"
            ).text
            for name in TEXTS
        }

    def score(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Score a model on both texts."""
        row: dict[str, Any] = {"parameters": model.num_parameters(), "tokens": model.config.vocab_size}
        for name, text in self.passages.items():
            losses = self.losses(model, tokenizer, source=text, docs=[document.doc for document in text.documents])
            row[name] = {
                "documents": documents_of(losses),
                "sources": [loss.source for loss in losses],
                "nll": rounded(losses),
            }
        return row

    def measure_way(self) -> dict[str, Any]:
        """Prune by the default, and score the model."""
        model, tokenizer, _ = self.pruned(DEFAULT, self.args.removed)
        row = self.score(model, tokenizer)
        self.forget()
        return row


def measure_all(rows: Rows, args: argparse.Namespace) -> dict[tuple[str, str], dict[str, Any]]:
    """Return all rows; each is measured or found on disk."""
    load: Callable[[], Any] = cache(smollm2)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    sizes = {"blocks": args.num_samples, "length": args.length, "eval_tokens": args.eval_tokens, "seed": args.seed}

    def get(domain: BalancedDomain, way: str) -> None:
        def measure() -> dict[str, Any]:
            begin = time.perf_counter()
            row = domain.measure_way() if way else domain.score(domain.model, domain.load().tokenizer)
            return {**row, "seconds": round(time.perf_counter() - begin, 1)}

        key = {"domain": domain.name, "removed": args.removed, "way": way, **sizes}
        found[domain.name, way] = rows.get_or_measure(key, measure)

    for name in args.domains:
        for way in (BY_SIZE, BALANCED):
            domain = BalancedDomain(load, args, name, way)
            if len(group_by_source(domain.train.documents)) < 2:
                raise SystemExit(f"{name} has a single source, so nothing can be balanced; leave it out of --domains.")
            get(domain, "")
            get(domain, way)
    return found


def _losses(found: Found, domain: str, text: str) -> tuple[list[float], list[float], list[float], list[str]]:
    """Return the losses of the base model and of both ways, and the sources, on the documents of a test text."""
    base, by_size, balanced = (found[domain, way][text] for way in ("", BY_SIZE, BALANCED))
    return base["nll"], by_size["nll"], balanced["nll"], base["sources"]


def mean_table(found: Found, args: argparse.Namespace) -> str:
    """Return the table of the mean and the worst source, both ways, and the paired differences."""
    body = []
    for domain in args.domains:
        base, by_size, balanced, sources = _losses(found, domain, "domain")
        means = [mean_change(base, after, sources, args.seed) for after in (by_size, balanced)]
        gap = bootstrap_estimate(
            lambda low, high, dense, axis: ratio(high, dense, axis) - ratio(low, dense, axis),
            (by_size, balanced, base),
            sources,
            seed=args.seed,
            n_resamples=RESAMPLES,
        )
        body.append([domain, "all documents", *map(format_change, (*means, gap))])
        base, by_size, balanced, sources = _losses(found, domain, "sources")
        worst = worst_change(base, (by_size, balanced), sources, args.seed, fewest=args.fewest)
        body.append([domain, "worst source", *map(format_change, worst)])
    return table(["domain", "text", BY_SIZE, BALANCED, "difference"], body)


def source_table(found: Found, args: argparse.Namespace) -> str:
    """Return the table of every source."""
    body = []
    for domain in args.domains:
        base, by_size, balanced, sources = _losses(found, domain, "sources")
        ways = [
            {one.source: one for one in changes_by_source(base, after, sources, args.seed)}
            for after in (by_size, balanced)
        ]
        for name, one in ways[0].items():
            cells = [format_change(way[name].change) for way in ways]
            body.append([domain, name, f"{one.documents:,}", *cells])
    return table(["domain", "source", "documents", BY_SIZE, BALANCED], body)


def verdict(found: Found, args: argparse.Namespace) -> str:
    """Return, for each domain, whether the worst source gains, and at what price."""
    lines = []
    for domain in args.domains:
        base, by_size, balanced, sources = _losses(found, domain, "sources")
        gap = worst_change(base, (by_size, balanced), sources, args.seed, fewest=args.fewest)[-1]
        assert gap.interval is not None
        clear = "clear of zero" if gap.interval[1] < 0 or gap.interval[0] > 0 else "not clear of zero"
        base, by_size, balanced, sources = _losses(found, domain, "domain")
        price = sum(balanced) / sum(base) - sum(by_size) / sum(base)
        lines.append(
            f"- {domain}: the worst source {'gains' if gap.value < 0 else 'loses'} {100 * abs(gap.value):.1f} points "
            f"({clear}), and all documents together {'lose' if price > 0 else 'gain'} {100 * abs(price):.1f}."
        )
    return "\n".join(lines)


def results_text(found: Found, args: argparse.Namespace) -> str:
    """Return the section of RESULTS.md."""
    gone = min(
        1 - found[domain, way]["parameters"] / found[domain, ""]["parameters"]
        for domain in args.domains
        for way in (BY_SIZE, BALANCED)
    )
    fewest = min(len(found[domain, ""]["domain"]["nll"]) for domain in args.domains)
    return f"""## Sources that count equally

SmolLM2-135M-Instruct (float32, dequantised) with {args.removed:.0%} of all parameters removed by the default (at least {gone:.2%}),
calibrated on {args.num_samples} x {args.length} tokens, without and with `balance_sources`. Change of bits per byte against the base model on
the validation split. *All documents*: passages of {fewest} and more documents, as they come, at most {args.eval_tokens:,} tokens;
intervals draw sources, then documents, and with fewer than five sources the range over them stands in their place. *Worst
source*: of as many tokens of equal parts of the sources; intervals draw documents within each source, and take the worst of each
draw, of sources with at least {args.fewest} documents. Differences are paired.

{mean_table(found, args)}

{verdict(found, args)}

### Every source

{source_table(found, args)}

`python -m benchmarks.balance --data DATA{args.given}` at {describe_runs(found.values())}, seed {args.seed}.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of a run."""
    options = parser(__doc__ or "", several=True)
    options.add_argument("--quick", action="store_true", help="one domain, little text")
    options.add_argument("--removed", type=float, default=0.3, help="share of all parameters to remove")
    options.add_argument(
        "--fewest", type=int, default=MIN_DOCUMENTS, help="documents of a source that may be the worst"
    )
    options.add_argument("--num-samples", type=int, default=64, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=48_000, help="at most this many test tokens per text")
    if "--quick" in arguments:
        options.set_defaults(domains=["medicine"], num_samples=8, length=128, eval_tokens=3_000, fewest=1)
    args = options.parse_args(arguments)
    args.shares = [args.removed]  # as a FrontierDomain reads it
    args.given = given(options, args)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    rows = Rows(args, "balance", seed=args.seed)
    write_section("balance_quick" if args.quick else "balance", results_text(measure_all(rows, args), args))


if __name__ == "__main__":
    main()
