"""Compare a pruned model with the smaller model of its vendor: is it below the line between the vendor's two sizes?

python -m benchmarks.vendor_line --data PATH/TO/data            # Qwen2.5-Coder 0.5B and 1.5B: about five hours; resumes
python -m benchmarks.vendor_line --data PATH/TO/data --domains medicine --targets 1.0e9 --questions 0 --minutes 0
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from benchmarks.by_source import mean_change, read_sources, sources_of
from benchmarks.common import Rows, cell, describe_runs, given, parser, table, write_section
from benchmarks.frontier import FrontierDomain
from benchmarks.methods import DEFAULT, documents_of, rounded
from benchmarks.models import MODELS
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.questions import load_questions
from hf_context_prune.evaluation.accuracy import wilson_interval
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.multiple_choice import answer_questions
from hf_context_prune.evaluation.reports.formatting import format_change
from hf_context_prune.training.recovery.config import LEARNING_RATES, RecoveryConfig

SMALL, LARGE = "small", "large"
Result = dict[str, Any]


class SizedDomain(FrontierDomain):
    """A domain whose model is pruned to a number of parameters."""

    label = "vendor"
    keeps_models = False

    def own_config(self, method: str, share: float) -> PrunerConfig:
        args = self.args
        return PrunerConfig(
            target_params=int(share),
            num_calibration_samples=args.num_samples,
            max_seq_length=args.length,
            pruning_seed=args.seed,
        )

    def own_recovery(self) -> RecoveryConfig:
        return replace(super().own_recovery(), method=self.args.method)


class VendorLine:
    """The rows of a run: both models of the vendor, and the larger one pruned and trained.

    Args:
        args: Options of the run.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, Rows(args, "vendor_line", seed=args.seed)
        self.load: dict[str, Callable[[], Any]] = {
            SMALL: cache(partial(MODELS[args.small][1], args.dtype)),
            LARGE: cache(partial(MODELS[args.large][1], args.dtype)),
        }
        self.domains = {name: SizedDomain(self.load[LARGE], args, name, targets=("mlp",)) for name in args.domains}
        self.found: dict[tuple[str, str], Result] = {}
        self.sources = read_sources(args, args.domains)

    def get(self, name: str, kind: str, measure: Callable[[], Result]) -> Result:
        """Return a row of a domain, measured or found on disk."""
        args = self.args
        key = {"domain": name, "kind": kind, "small": args.small, "large": args.large, "blocks": args.num_samples}
        key |= {"length": args.length, "eval_tokens": args.eval_tokens, "questions": args.questions, "seed": args.seed}
        key["dtype"] = args.dtype
        if kind.startswith("healed"):
            key |= {"minutes": args.minutes, "method": args.method}

        def timed() -> Result:
            begin = time.perf_counter()
            return {**measure(), "seconds": round(time.perf_counter() - begin, 1)}

        self.found[name, kind] = self.rows.get_or_measure(key, timed)
        return self.found[name, kind]

    def score(self, name: str, model: Any, tokenizer: Any, docs: Sequence[str] | None = None) -> Result:
        """Return parameters, those of embedding and head among them, and losses on the test text."""
        losses = self.domains[name].losses(model, tokenizer, docs)
        tables = {id(one.weight): one.weight for one in (model.get_input_embeddings(), model.get_output_embeddings())}
        return {
            "parameters": model.num_parameters(),
            "embeddings": sum(table.numel() for table in tables.values()),
            "documents": documents_of(losses),
            "nll": rounded(losses),
        }

    def ask(self, model: Any, tokenizer: Any) -> dict[str, list[int]]:
        """Return which questions of each set are answered rightly."""
        right = {}
        for asked in self.args.asked if self.args.questions else ():
            questions = load_questions(str(self.args.data / asked / "mcq.jsonl"), max_questions=self.args.questions)
            right[asked] = [int(answer.correct) for answer in answer_questions(model, tokenizer, questions)]
        return right

    def measure(
        self, name: str, make: Callable[[], Any], docs: Sequence[str] | None = None, right: Any = None
    ) -> Result:
        """Return the row of a model on a domain; the questions are asked unless the answers are known."""
        model, tokenizer, *_ = make()
        row = self.score(name, model, tokenizer, docs)
        return {**row, "right": self.ask(model, tokenizer) if right is None else right}

    def dense(self, kind: str) -> tuple[Any, Any]:
        """Return a model of the vendor and its tokenizer."""
        loaded = self.load[kind]()
        return loaded.model, loaded.tokenizer

    def run(self) -> None:
        """Measure all rows, domain by domain."""
        args = self.args
        for name, domain in self.domains.items():
            docs: list[str] | None = None
            for kind in (LARGE, SMALL):
                right = self.found.get((args.domains[0], kind), {}).get("right")  # the same in all domains
                row = self.get(name, kind, partial(self.measure, name, partial(self.dense, kind), docs, right))
                docs = [doc for doc, _, _ in row["documents"]]
            for target in args.targets:
                pruned = partial(domain.pruned, DEFAULT, target)
                self.get(name, f"pruned {target:g}", partial(self.measure, name, pruned, docs))
                if args.minutes and name == args.trained and target == min(args.targets):
                    healed = partial(domain.healed, target)
                    self.get(name, f"healed {target:g}", partial(self.measure, name, healed, docs))
                domain.forget()


def bits_per_byte(row: Result) -> float:
    """Return the loss of a row over all its documents."""
    return sum(row["nll"]) / math.log(2) / sum(size for _, _, size in row["documents"])


def against_the_line(small: Result, large: Result, row: Result, size_of: Callable[[Result], int]) -> float:
    """Return the relative change from the line between two models, in bits per byte against the logarithm of the size."""
    low, high, own = (math.log(size_of(one)) for one in (small, large, row))
    share = (own - low) / (high - low)
    return bits_per_byte(row) / ((1 - share) * bits_per_byte(small) + share * bits_per_byte(large)) - 1


def all_parameters(row: Result) -> int:
    """Return the parameters of a model."""
    return int(row["parameters"])


def layer_parameters(row: Result) -> int:
    """Return the parameters of a model without embedding and head."""
    return int(row["parameters"] - row["embeddings"])


def accuracy(right: Sequence[int]) -> str:
    """Return the share of right answers with its 95 % interval (Wilson)."""
    low, high = wilson_interval(sum(right), len(right))
    return cell(Estimate(100 * sum(right) / len(right), (100 * low, 100 * high)), 1)


def results_text(run: VendorLine) -> str:
    """Return the section of RESULTS.md."""
    args, body, verdicts = run.args, [], []
    for (name, kind), row in run.found.items():
        small, large = run.found[name, SMALL], run.found[name, LARGE]
        change, inside = (against_the_line(small, large, row, size) for size in (all_parameters, layer_parameters))
        cells = [f"{name}: {kind}", *(f"{size(row) / 1e9:.2f}" for size in (all_parameters, layer_parameters))]
        cells.append(f"{bits_per_byte(row):.3f}")
        sources = sources_of(large, run.sources[name])
        against = format_change(mean_change(large["nll"], row["nll"], sources, args.seed))
        cells += (
            ["", "", ""] if kind in (SMALL, LARGE) else [against, f"{100 * change:+.1f} %", f"{100 * inside:+.1f} %"]
        )
        body.append(cells + [accuracy(row["right"][asked]) for asked in args.asked if args.questions])
        if kind not in (SMALL, LARGE):
            verdicts.append(f"{name}, {kind}: {100 * abs(change):.1f} % {'below' if change < 0 else 'above'} the line")
    header = ["model", "parameters (1e9)", "of layers (1e9)", "bits per byte", "against the larger model"]
    header += ["against the line", "by those of layers"]
    header += [f"{asked}: right (%)" for asked in args.asked if args.questions]
    return f"""## The smaller model of the vendor, or the larger one pruned

{MODELS[args.small][0]} and {MODELS[args.large][0]} (dequantised to {args.dtype}; the LM head is stored apart from the embedding and
counts), and the larger one pruned by the default on {args.num_samples} x {args.length} tokens of the domain's train text, and trained on it for
{args.minutes:g} minutes (*healed*, method `{args.method}`: all weights of a billion take 22 GB and more). Test text: validation split, at
most {args.eval_tokens:,} tokens in windows of many documents; 95 % intervals draw sources, then documents, and where there are fewer than five sources the range over them stands. The
line joins the vendor's two models, in bits per byte against the logarithm of the parameters (goal: below it), of all and of those
without embedding and head (*of layers*): the default removes rows of both, which are a quarter of the larger model. Questions:
{args.questions} of each set, 95 % Wilson intervals.

{table(header, body)}

{"; ".join(verdicts)}.

`python -m benchmarks.vendor_line --data DATA{args.given}` at {describe_runs(run.found.values())}, seed {args.seed}.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of a run."""
    options = parser(__doc__ or "", several=True)
    options.set_defaults(domains=["medicine", "law"])
    options.add_argument("--small", choices=MODELS, default="qwen-coder-0.5b", help="the vendor's smaller model")
    options.add_argument("--large", choices=MODELS, default="qwen-coder-1.5b", help="the vendor's larger model")
    options.add_argument("--targets", nargs="+", type=float, default=[1.2e9, 1.0e9], help="parameters after pruning")
    options.add_argument("--trained", default="medicine", help="domain whose smallest model is trained")
    options.add_argument("--minutes", type=float, default=30.0, help="minutes of training; 0: none")
    options.add_argument("--method", choices=LEARNING_RATES, default="lora", help="method of the training")
    options.add_argument("--num-samples", type=int, default=32, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=10_000, help="at most this many test tokens per domain")
    options.add_argument("--questions", type=int, default=170, help="multiple-choice questions per set; 0: none")
    options.add_argument(
        "--dtype", default="bfloat16", help="of all models; bfloat16 is what `prune` takes for such a file"
    )
    options.add_argument("--asked", nargs="+", default=["medicine", "law", "general"], help="sets of questions")
    args = options.parse_args(arguments)
    args.shares, args.given = args.targets, given(options, args)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    run = VendorLine(parse(sys.argv[1:] if arguments is None else arguments))
    run.run()
    write_section("vendor_line", results_text(run))


if __name__ == "__main__":
    main()
