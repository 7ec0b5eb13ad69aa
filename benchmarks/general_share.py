"""Measure what a share of general text in the calibration costs on the domain, and what it saves on general text.

python -m benchmarks.general_share --data PATH/TO/data
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from benchmarks.common import Rows, corpus, given, parser, table, write_section
from benchmarks.frontier import PASSAGES, FrontierDomain
from benchmarks.methods import DEFAULT
from benchmarks.models import smollm2
from benchmarks.recovery_text import relative
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource
from hf_context_prune.evaluation.reports.formatting import format_change, format_percent
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.utils.text_options import DEFAULT_GENERAL_DATA_RATIO

MOST_GENERAL = 0.25
"""Goal: largest mean change of bits per byte on general text."""
MOST_DOMAIN = 0.02
"""Goal: most that the share may cost on the domain, as a difference of the mean changes."""


class SharedDomain(FrontierDomain):
    """A domain that is calibrated on with a share of general text."""

    keeps_models = False

    def __init__(self, load: Callable[[], Any], args: argparse.Namespace, name: str, ratio: float) -> None:
        super().__init__(load, args, name, targets=("mlp",))
        self.ratio, self.label = ratio, f"general-{ratio:g}"

    @cached_property
    def general_train(self) -> TextSource:
        """General text to calibrate on, without documents that overlap with any test text."""
        text = corpus(self.args, "train", "general")
        return drop_overlapping(drop_overlapping(text, self.test_text[0])[0], self.general)[0]

    @cached_property
    def calibration(self) -> CalibrationSet:
        config = self.own_config(DEFAULT, self.args.removed)
        return CalibrationSet(self.train, config, self.general_train if self.ratio else None)

    def own_config(self, method: str, share: float) -> PrunerConfig:
        return replace(super().own_config(method, share), general_data_ratio=self.ratio or None)

    def measure_share(self, base: dict[str, Any]) -> dict[str, Any]:
        """Prune by the default and score the model on both texts."""
        model, tokenizer, _ = self.pruned(DEFAULT, self.args.removed)
        row = self.scored(model, tokenizer, base, general=True) | {"tokens": model.config.vocab_size}
        self.forget()
        return row


def measure_all(rows: Rows, args: argparse.Namespace) -> dict[tuple[str, float | None], dict[str, Any]]:
    """Return all rows by (domain, share); the base model's share is None. Each is measured or found on disk."""
    load: Callable[[], Any] = cache(smollm2)
    found: dict[tuple[str, float | None], dict[str, Any]] = {}
    sizes = {"blocks": args.num_samples, "length": args.length, "eval_tokens": args.eval_tokens, "seed": args.seed}

    def get(domain: SharedDomain, ratio: float | None) -> None:
        def measure() -> dict[str, Any]:
            begin = time.perf_counter()
            base = found.get((domain.name, None))
            row = domain.measure_base(general=True) if base is None else domain.measure_share(base)
            return {**row, "seconds": round(time.perf_counter() - begin, 1)}

        key = {"domain": domain.name, "removed": args.removed, "share": ratio, "text": PASSAGES, **sizes}
        found[domain.name, ratio] = rows.get_or_measure(key, measure)

    for ratio in args.shares:
        for name in args.domains:
            domain = SharedDomain(load, args, name, ratio)
            get(domain, None)
            get(domain, ratio)
    return found


def results_text(found: dict[tuple[str, float | None], dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the section of RESULTS.md."""
    body, means = [], {}
    for ratio in args.shares:
        cells, values = [], []
        for name in args.domains:
            base, row = found[name, None], found[name, ratio]
            both = relative(base, row, args.seed), relative(base["general"], row["general"], args.seed)
            cells += [*map(format_change, both), f"{row['tokens']:,}"]
            values.append([change.value for change in both])
        means[ratio] = np.mean(values, axis=0)
        body.append([f"{ratio:g}", *map(format_percent, means[ratio]), *cells])
    header = ["share", "mean, domain", "mean, general text"]
    header += [f"{name}{what}" for name in args.domains for what in ("", ", general text", ", tokens that stay")]
    first = next(iter(found.values()))["setting"]
    return f"""## Share of general text

SmolLM2-135M-Instruct (float32, dequantised) with {args.removed:.0%} of all parameters removed by the default, calibrated on
{args.num_samples} x {args.length} tokens, of which a share is general text (`general_data_ratio`; WikiText articles): it counts for the
tokens, the widths, the reconstruction and the refit. Change of bits per byte against the base model on validation text, at most
{args.eval_tokens:,} tokens each, with 95 % bootstrap intervals over documents.

{table(header, body)}

{verdict(means)}

`python -m benchmarks.general_share --data DATA{args.given}` at `{first["commit"]}`, {first["machine"]}, seed {args.seed}.
"""


def verdict(means: Mapping[float, np.ndarray]) -> str:
    """Return what the default costs and saves, from (domain, general text) by share; empty where it is not measured."""
    share = DEFAULT_GENERAL_DATA_RATIO
    if share not in means or 0.0 not in means:
        return ""
    cost = 100 * (means[share][0] - means[0.0][0])
    return (
        f"The default, {share:g}: {means[share][1]:+.1%} on general text (goal: at most {MOST_GENERAL:+.0%}), for {cost:+.1f} "
        f"points on\nthe domain (goal: at most {100 * MOST_DOMAIN:+.0f})."
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of a run."""
    options = parser(__doc__ or "", several=True)
    options.add_argument("--removed", type=float, default=0.3, help="share of all parameters to remove")
    options.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.125, 0.25, 0.5], help="shares to measure")
    options.add_argument("--num-samples", type=int, default=32, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=12_000, help="at most this many test tokens per text")
    args = options.parse_args(arguments)
    args.given = given(options, args)
    args.general_tokens = args.eval_tokens  # as a FrontierDomain reads it
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    rows = Rows(args, "general_share", seed=args.seed)
    write_section("general_share", results_text(measure_all(rows, args), args))


if __name__ == "__main__":
    main()
