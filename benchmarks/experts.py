"""Remove experts from a small mixture of experts by the text of one domain, and measure what that costs on all domains.

python -m benchmarks.experts --data PATH/TO/data            # trains for 40 minutes on two cores, then prunes; resumes
python -m benchmarks.experts --data PATH/TO/data --quick    # tiny sizes, seconds of training: shows that it runs

The model is trained here (see `experts_model.py`), because no published mixture of experts is small enough.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch

from benchmarks.common import Rows, corpus, given, parser, write_section
from benchmarks.experts_model import QUICK, SHARES, Shape, get_or_train
from benchmarks.experts_text import CUT, HEAD, METHODS, NEURONS, RANDOM, REPAIRED, results_text
from benchmarks.methods import rounded
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.routing import measure_routing
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.experts import ExpertChoice, choose_experts, remove_experts
from hf_context_prune.pruning.sequential.experts import repair_experts
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.pruning.vocabulary.refit import refit_rows
from hf_context_prune.utils.precision import reduced_precision_matmul


class Bench:
    """The trained model with its texts.

    Args:
        args: Options.
        model: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        self.args, self.model, self.tokenizer = args, model, tokenizer

    @cached_property
    def samples(self) -> torch.Tensor:
        """Calibration samples of the domain that experts are chosen by, [samples, length]."""
        return self.cut(corpus(self.args, "train"), self.args.num_samples)

    @cached_property
    def tests(self) -> dict[str, TextSource]:
        """Validation text of every domain, without documents that overlap with its train text."""
        return {
            domain: drop_overlapping(corpus(self.args, "validation", domain), corpus(self.args, "train", domain))[0]
            for domain in SHARES
        }

    def cut(self, text: TextSource, count: int) -> torch.Tensor:
        """Cut a text into samples."""
        length = self.args.shape.length
        return tokenize_samples(
            text, self.tokenizer, num_samples=count, max_seq_length=length, seed=self.args.seed, warn_if_short=False
        )

    def measure_routing(self) -> dict[str, Any]:
        """Return how often every expert is chosen on text of each domain; of the own domain also for two halves."""
        samples = {name: self.cut(text, self.args.routing_samples) for name, text in self.tests.items()}
        own = samples[self.args.domain]
        samples |= {"first half": own[::2], "second half": own[1::2]}
        found = {name: measure_routing(self.model, batches_of(part)) for name, part in samples.items()}
        return {
            "routed": {name: [layer.routed.tolist() for layer in layers.values()] for name, layers in found.items()},
            "parameters": self.model.num_parameters(),
            "vocabulary": self.model.config.vocab_size,
            "expert_parameters": ModelView.of(self.model).costs["experts"],
        }

    def measure_base(self) -> dict[str, Any]:
        """Return the losses of the whole model, with sources and sizes of the documents, and with its head refitted."""
        documents = {}
        for domain in SHARES:
            losses = self.losses(self.model, domain)
            documents[domain] = [[one.doc, one.source, one.num_tokens, one.num_bytes] for one in losses]
        refitted = copy.deepcopy(self.model)
        refit = refit_rows(refitted, self.samples)
        return {"documents": documents, "refit": refit, CUT: self.scored(self.model), HEAD: self.scored(refitted)}

    def measure(self, method: str, share: float) -> dict[str, Any]:
        """Remove a share of the experts, and score the model as it is, repaired, and with its head refitted too."""
        if method == NEURONS:
            return self.measure_neurons(share)
        begin = time.perf_counter()
        choice = self.choose(method, share)
        row: dict[str, Any] = {"kept": [list(kept) for kept in choice.kept.values()]}
        fewer = apply_plan(self.model, choice.plan(self.model), share=True)
        row |= {"parameters": fewer.num_parameters(), "choice_seconds": round(time.perf_counter() - begin, 1)}
        row[CUT] = self.scored(fewer)
        begin = time.perf_counter()
        done = repair_experts(self.model, fewer, choice.kept, batches_of(self.samples))
        left = [layer.left for layer in done.values()]
        row |= {"error_left": left, "repair_seconds": round(time.perf_counter() - begin, 1)}
        return row | self.score_repaired(fewer)

    def measure_neurons(self, share: float) -> dict[str, Any]:
        """Remove a share of the neurons inside every expert, and score the model as it is cut, refitted, and so on."""
        row: dict[str, Any] = {}
        for way, reconstruction in ((CUT, "none"), (REPAIRED, "sequential")):
            begin = time.perf_counter()
            config = PrunerConfig(expert_neurons_ratio=share, reconstruction=reconstruction)
            choice, fewer, _ = remove_experts(self.model, self.samples, config, None)
            name = "choice_seconds" if way == CUT else "repair_seconds"
            row[name] = round(time.perf_counter() - begin, 1)
            if way == CUT:
                row[CUT] = self.scored(fewer)
        row |= {"kept": [list(kept) for kept in choice.kept.values()], "parameters": fewer.num_parameters()}
        return row | {"error_left": list(choice.facts["error_left"].values())} | self.score_repaired(fewer)

    def score_repaired(self, fewer: Any) -> dict[str, Any]:
        """Score a repaired model, and the same with its head refitted, which until then is that of the whole model."""
        row = {REPAIRED: self.scored(fewer)}
        fewer = copy.deepcopy(fewer)
        return {**row, "refit": refit_rows(fewer, self.samples), HEAD: self.scored(fewer)}

    def choose(self, method: str, share: float) -> ExpertChoice:
        """Return the experts that stay."""
        if method != RANDOM:
            config = PrunerConfig(experts_ratio=share, expert_criterion=method)
            return choose_experts(
                self.model, self.samples, config, state_dir=self.args.work / f"{self.args.section}-model"
            )
        generator, kept = torch.Generator().manual_seed(self.args.seed), {}
        for index, widths in enumerate(ModelView.of(self.model).widths):
            count = round(widths.experts * (1 - share))
            kept[index] = tuple(sorted(torch.randperm(widths.experts, generator=generator)[:count].tolist()))
        return ExpertChoice(kept, {})

    def scored(self, model: Any) -> dict[str, list[float]]:
        """Return the losses of a model by document, on the test text of every domain."""
        return {domain: rounded(self.losses(model, domain)) for domain in SHARES}

    def losses(self, model: Any, domain: str) -> Any:
        """Measure a model on the test text of a domain."""
        with reduced_precision_matmul():
            return document_losses(
                model,
                self.tokenizer,
                self.tests[domain],
                max_seq_length=self.args.shape.length,
                max_tokens=self.args.eval_tokens,
            )


def measure_all(rows: Rows, args: argparse.Namespace) -> dict[tuple[str, float], Mapping[str, Any]]:
    """Return all rows by (method, share); routing and base model have the share 0. Each is measured or found on disk."""
    model, tokenizer, training = get_or_train(args, args.shape)
    bench, found = Bench(args, model, tokenizer), {}
    common = {
        "domain": args.domain,
        "model": {**asdict(args.shape), **training},
        "blocks": args.num_samples,
        "eval_tokens": args.eval_tokens,
        "seed": args.seed,
    }

    def get(method: str, share: float, measure: Callable[[], dict[str, Any]], **more: Any) -> None:
        key = {**common, "method": method, "share": share, **more}
        found[method, share] = rows.get_or_measure(key, measure)

    get("routing", 0.0, bench.measure_routing, routing_samples=args.routing_samples)
    get("base", 0.0, bench.measure_base)
    for share in args.shares:
        for method in args.methods:
            get(method, share, lambda m=method, s=share: bench.measure(m, s))
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of a run."""
    options = parser(__doc__ or "")
    options.add_argument("--quick", action="store_true", help="tiny sizes, a few steps of training")
    options.add_argument("--minutes", type=float, default=40.0, help="minutes of training")
    options.add_argument("--steps", type=int, default=0, help="steps of training, instead of minutes")
    options.add_argument(
        "--save-minutes", type=float, default=4.0, help="minutes between two checkpoints of the training"
    )
    options.add_argument(
        "--balance", type=float, default=Shape.balance, help="weight of the loss that balances experts"
    )
    options.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.5], help="shares of the experts to remove")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="how experts are chosen")
    options.add_argument("--num-samples", type=int, default=256, help="calibration samples")
    options.add_argument("--routing-samples", type=int, default=64, help="samples per domain to count the routing on")
    options.add_argument("--eval-tokens", type=int, default=24_000, help="at most this many test tokens per domain")
    if "--quick" in arguments:
        options.set_defaults(steps=6, num_samples=16, routing_samples=8, eval_tokens=1_500, shares=[0.5])
    args = options.parse_args(arguments)
    args.given = given(options, args)
    args.shape = replace(QUICK if args.quick else Shape(), balance=args.balance)
    args.section = "experts_quick" if args.quick else "experts"
    if args.domain not in SHARES:
        options.error(f"--domain is {args.domain}; the model is trained on {', '.join(SHARES)}.")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    rows = Rows(args, args.section, seed=args.seed)
    write_section(args.section, results_text(measure_all(rows, args), args))


if __name__ == "__main__":
    main()
