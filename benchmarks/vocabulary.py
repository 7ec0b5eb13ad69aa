"""Measure pruned vocabularies: size, text tokens and bits per byte by number of entries; the worst source; speed.

python -m benchmarks.vocabulary --data PATH/TO/data            # three domains; resumes
python -m benchmarks.vocabulary --data PATH/TO/data --quick    # one domain, one size, little text
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

from benchmarks.by_source import mean_and_worst, mean_change, read_sources, sources_of
from benchmarks.common import Rows, describe_runs, given, parser, table, write_section
from benchmarks.frontier import PASSAGES, FrontierDomain
from benchmarks.methods import Domain, documents_of, rounded
from benchmarks.models import smollm2
from hf_context_prune.data.documents import TextSource
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.reports.formatting import format_change
from hf_context_prune.evaluation.speed import measure_speed, speed_ratio
from hf_context_prune.modeling.architectures import TARGETS
from hf_context_prune.pruning.vocabulary.prune import VocabularyPruner, prune_vocabulary
from hf_context_prune.pruning.vocabulary.refit import MORE_TEXT, refit_to_text
from hf_context_prune.pruning.vocabulary.row_regression import MAX_STEPS
from hf_context_prune.pruning.vocabulary.selection import VocabularySize

WAYS = {
    "frequency": ("by frequency", {"criterion": "frequency"}, False),
    "expected": ("`expected`", {"criterion": "expected"}, False),
    "ours": ("`expected` + refit (default)", {"criterion": "expected"}, True),
}
REFIT = {"refit": [MORE_TEXT, MAX_STEPS]}
"""Part of the keys of rows with a refit."""
GOALS: dict[int, tuple[float, dict[str, float | None]]] = {
    16_384: (0.14, {"law": 0.01, "medicine": 0.01, "finance": 0.01}),
    8_192: (0.17, {"law": None, "medicine": None, "finance": 0.03}),
}
"""By number of entries: the least share of all parameters to remove, and the largest increase of bits per byte by domain;
None: half of the increase with selection by frequency."""
SPEED_BYTES, SPEED_TOKENS = 10_000_000, 16_384


class VocabularyDomain(FrontierDomain):
    """A domain, whose test text is that of `frontier`, with the worth of its vocabulary entries, counted once per criterion."""

    @cached_property
    def _pruners(self) -> dict[str, VocabularyPruner]:
        return {}

    def trimmed(self, way: str, tokens: int) -> Any:
        """Return the model with the vocabulary pruned to `tokens` entries."""
        _, options, refit = WAYS[way]
        criterion = options["criterion"]
        if criterion not in self._pruners:
            loaded = self.load()
            self._pruners[criterion] = VocabularyPruner(
                loaded.model,
                loaded.tokenizer,
                self.train,
                criterion=criterion,
                num_samples=self.args.num_samples,
                max_seq_length=self.args.length,
                seed=self.args.seed,
            )
        return self._pruners[criterion].trim(VocabularySize(tokens), refit=refit)

    def score_model(self, model: Any, tokenizer: Any, dense: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Score a model on the documents of the base model's row."""
        losses = self.losses(model, tokenizer, [doc for doc, _, _ in dense["documents"]] if dense else None)
        return {
            "documents": documents_of(losses),
            "nll": rounded(losses),
            "parameters": model.num_parameters(),
        }

    def measure_vocabulary(self, way: str, tokens: int, dense: Mapping[str, Any]) -> dict[str, Any]:
        """Prune the vocabulary alone, and score the model."""
        trimmed = self.trimmed(way, tokens)
        return {**self.score_model(trimmed.model, trimmed.tokenizer, dense), **trimmed.plan.provenance["vocabulary"]}

    def measure_dense_refit(self, dense: Mapping[str, Any]) -> dict[str, Any]:
        """Score the base model after the refit alone, with all entries kept."""
        model = copy.deepcopy(self.model)
        tokenizer, args = self.load().tokenizer, self.args
        refit = refit_to_text(
            model, tokenizer, self.train, num_samples=args.num_samples, max_seq_length=args.length, seed=args.seed
        )
        return {**self.score_model(model, tokenizer, dense), "refit": refit}

    def measure_speed(self, tokens: int) -> dict[str, Any]:
        """Compare the speed of the base model and of the model with a pruned vocabulary."""
        trimmed = self.trimmed("expected", tokens)
        found = measure_speed({"base": self.model, "pruned": trimmed.model}, repeats=7)
        ratio = speed_ratio(found["base"], found["pruned"])
        return {
            "rates": {name: [speed.prefill.median, speed.decode.median] for name, speed in found.items()},
            "prefill": [ratio.prefill.median, ratio.prefill.q1, ratio.prefill.q3],
            "decode": [ratio.decode.median, ratio.decode.q1, ratio.decode.q3],
        }


def measure_tool_speed(domains: Iterable[Domain]) -> dict[str, Any]:
    """Measure the seconds to count 10 MB and prune the vocabulary, and to encode text with either tokenizer."""
    domains = list(domains)
    loaded = domains[0].load()
    records, size = [], 0
    for record in itertools.chain.from_iterable(domain.train.documents for domain in domains):
        records.append(record)
        size += len(record.text.encode())
        if size >= SPEED_BYTES:
            break
    source = TextSource.from_documents(records, name="10 MB")
    start = time.perf_counter()
    trimmed = prune_vocabulary(
        loaded.model, loaded.tokenizer, source, vocab_size=SPEED_TOKENS, criterion="frequency", refit=False
    )
    seconds = time.perf_counter() - start
    texts = [record.text for domain in domains for record in domain.test_text[0].documents]
    pairs = []
    for turn in range(7):
        order = (loaded.tokenizer, trimmed.tokenizer)[:: 1 if turn % 2 == 0 else -1]
        taken = {id(tokenizer): _seconds(lambda t=tokenizer: t(texts)) for tokenizer in order}
        pairs.append((taken[id(loaded.tokenizer)], taken[id(trimmed.tokenizer)]))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {"bytes": size, "seconds": seconds, "pairs": pairs, "megabytes": megabytes}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def change_of(dense: Mapping[str, Any], row: Mapping[str, Any], seed: int) -> Estimate:
    """Return the relative change of bits per byte, paired by document; sources are drawn, then documents."""
    return mean_change(dense["nll"], row["nll"], dense["sources"], seed)


def _tokens_per_byte(row: Mapping[str, Any]) -> float:
    return sum(n for _, n, _ in row["documents"]) / sum(size for _, _, size in row["documents"])


Found = Mapping[tuple[Any, ...], dict[str, Any]]


def loss_table(rows: Found, args: argparse.Namespace) -> str:
    """Return the table of bits per byte and tokens per byte, by number of entries and way of choosing."""
    body = []
    for tokens in args.sizes:
        for way, (label, _, _) in WAYS.items():
            own = {domain: rows[domain, way, tokens] for domain in args.domains}
            body.append(
                [
                    f"{tokens:,}",
                    label,
                    f"{1 - own[args.domains[0]]['parameters'] / rows[args.domains[0], 'dense']['parameters']:.2%}",
                    *(format_change(change_of(rows[d, "dense"], row, args.seed)) for d, row in own.items()),
                    *(f"{_tokens_per_byte(row) / _tokens_per_byte(rows[d, 'dense']):.3f}" for d, row in own.items()),
                ]
            )
    refit = [format_change(change_of(rows[d, "dense"], rows[d, "refit"], args.seed)) for d in args.domains]
    body.append(["all", "refit alone", "0.00%", *refit, *("1.000" for _ in args.domains)])
    header = ["entries", "chosen", "parameters removed", *(f"bits per byte, {d}" for d in args.domains)]
    return table([*header, *(f"tokens per byte, {d}" for d in args.domains)], body)


def verdicts(rows: Found, args: argparse.Namespace) -> str:
    """Return each goal with the measured value."""
    lines = []
    for tokens in (tokens for tokens in args.sizes if tokens in GOALS):
        share, limits = GOALS[tokens]
        for domain in (domain for domain in args.domains if domain in limits):
            dense, ours = rows[domain, "dense"], rows[domain, "ours", tokens]
            loss, limit, what = change_of(dense, ours, args.seed).value, limits[domain], ""
            if limit is None:
                limit = change_of(dense, rows[domain, "frequency", tokens], args.seed).value / 2
                what = ", half of the loss by frequency"
            gone = 1 - ours["parameters"] / dense["parameters"]
            met = loss <= limit and gone >= share
            lines.append(
                f"- {tokens:,} entries, {domain}: {gone:.2%} removed (goal {share:.0%}), {loss:+.1%} bits per byte "
                f"(goal: at most {limit:.1%}{what}): {'met' if met else 'missed'}."
            )
    return "\n".join(lines)


def worst_lines(rows: Found, args: argparse.Namespace) -> str:
    """Return what the source that loses most loses, by number of entries and domain."""
    lines = []
    for tokens in args.sizes:
        parts = []
        for domain in args.domains:
            dense, ours = rows[domain, "dense"], rows[domain, "ours", tokens]
            _, worst = mean_and_worst(dense["nll"], ours["nll"], dense["sources"], args.seed)
            parts.append(f"{domain} " + ("has one source" if worst is None else str(worst)))
        lines.append(f"- {tokens:,} entries by default, the worst source: {'; '.join(parts)}.")
    return "\n".join(lines)


def speed_table(rows: Found, args: argparse.Namespace) -> str:
    """Return the table of prefill and decode: tokens per second, and bytes of text per second."""
    body = []
    for tokens in args.sizes:
        row = rows["speed", tokens]
        stretch = [_tokens_per_byte(rows[d, "ours", tokens]) / _tokens_per_byte(rows[d, "dense"]) for d in args.domains]
        texts = [
            f"{row[what][0] / max(stretch):.2f} to {row[what][0] / min(stretch):.2f}" for what in ("prefill", "decode")
        ]
        rates = [f"{row['rates']['base'][i]:,.0f} -> {row['rates']['pruned'][i]:,.0f}" for i in range(2)]
        factors = [f"{row[what][0]:.2f} ({row[what][1]:.2f} to {row[what][2]:.2f})" for what in ("prefill", "decode")]
        body.append([f"{tokens:,}", rates[0], factors[0], texts[0], rates[1], factors[1], texts[1]])
    header = ["entries", "prefill, tokens/s", "ratio", "bytes/s, ratio"]
    return table([*header, "decode, tokens/s", "ratio", "bytes/s, ratio"], body)


def results_text(rows: Found, args: argparse.Namespace) -> str:
    """Return the section of RESULTS.md."""
    dense = {domain: rows[domain, "dense"] for domain in args.domains}
    text = "; ".join(
        f"{d}: {sum(n for _, n, _ in row['documents']):,} tokens of {len(row['documents'])} documents"
        for d, row in dense.items()
    )
    tool = rows["tool",]
    ratio = statistics.median(before / after for before, after in tool["pairs"])
    speed = tool["megabytes"] / statistics.median(after for _, after in tool["pairs"])
    return f"""## Vocabulary

SmolLM2-135M-Instruct (float32, dequantised), entries chosen on the train text of each domain, tested on the validation
split ({text}: the passages of "Loss by size"). Change of bits per byte against the base model on the same passages; 95 % bootstrap
intervals draw sources, then documents, and where there are fewer than five sources the range over them stands in parentheses; the
interval of a single source is over its documents; no training. *Tokens per byte*: ratio to the base model. The refit reads up to {MORE_TEXT} times {args.num_samples} x {args.length} tokens of the train
text, fewer if many entries are left. *Refit alone*: the base model with its rows refitted, to separate reconstruction from
adaptation to the domain.

{loss_table(rows, args)}

{worst_lines(rows, args)}
{verdicts(rows, args)}

The goals compare rows that were refitted with rows that were not. How tokens are chosen is the difference between the first two rows of
a size, and the refit between the last two.

### Speed

A prompt of 512 tokens and 32 decoded tokens, 7 interleaved rounds; ratios to the base model (median, quartiles). *Bytes/s*:
the ratio of tokens per second divided by the ratio of tokens per byte, lowest to highest of the domains.

{speed_table(rows, args)}

Counting {tool["bytes"] / 1e6:.1f} MB of text and pruning the vocabulary to {SPEED_TOKENS:,} tokens by frequency, without a refit, took
{tool["seconds"]:.1f} s (goal: 60). The pruned tokenizer encodes {speed:.1f} MB/s, {ratio:.2f} times as fast as the full one
(median of {len(tool["pairs"])} interleaved pairs).

`python -m benchmarks.vocabulary --data DATA{args.given}` at {describe_runs(rows.values())}, seed {args.seed}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser(__doc__ or "", several=True)
    options.add_argument("--quick", action="store_true", help="one domain, one size, little text")
    options.add_argument("--sizes", nargs="+", type=int, default=[16_384, 8_192], help="entries to keep")
    options.add_argument("--num-samples", type=int, default=128, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=48_000, help="at most this many test tokens per domain")
    if "--quick" in arguments:
        options.set_defaults(domains=["medicine"], sizes=[16_384], num_samples=48, eval_tokens=8_000)
    args = options.parse_args(arguments)
    args.given = given(options, args)
    store, load = Rows(args, "vocabulary", seed=args.seed), cache(smollm2)
    domains = {name: VocabularyDomain(load, args, name, targets=TARGETS) for name in args.domains}
    sources = read_sources(args, args.domains)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}

    def get(place: tuple[Any, ...], measure: Callable[[], dict[str, Any]], **more: Any) -> None:
        setting = {
            "blocks": args.num_samples,
            **{name: getattr(args, name) for name in ("length", "eval_tokens", "seed")},
            "text": PASSAGES,
        }
        rows[place] = store.get_or_measure({"place": list(place), **setting, **more}, measure)

    for name, domain in domains.items():
        get((name, "dense"), lambda d=domain: d.score_model(d.model, None))
        dense = rows[name, "dense"] = {
            **rows[name, "dense"],
            "sources": sources_of(rows[name, "dense"], sources[name]),
        }
        for tokens, way in itertools.product(args.sizes, WAYS):
            how = REFIT if WAYS[way][2] else {}
            get(
                (name, way, tokens), lambda d=domain, w=way, n=tokens, row=dense: d.measure_vocabulary(w, n, row), **how
            )
        get((name, "refit"), lambda d=domain, row=dense: d.measure_dense_refit(row), **REFIT)
    first = domains[args.domains[0]]
    for tokens in args.sizes:
        get(("speed", tokens), lambda n=tokens: first.measure_speed(n))
    get(("tool",), lambda: measure_tool_speed(domains.values()))
    section = "vocabulary_quick" if args.quick else "vocabulary"
    write_section(section, results_text(rows, args))


if __name__ == "__main__":
    main()
