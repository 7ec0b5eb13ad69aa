"""Measure the presets: what each removes, costs on the domain and elsewhere, takes in time, and where it opens.

python -m benchmarks.presets --data PATH/TO/data                    # an hour and a half on 2 idle cores; resumes
python -m benchmarks.presets --data PATH/TO/data --num-samples 16   # about 20 minutes
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import cache
from typing import Any

from benchmarks.common import Rows, corpus, describe_runs, given, highest_load, parser, table, write_section
from benchmarks.models import smollm2
from hf_context_prune import EvalOptions, RecoveryConfig
from hf_context_prune.config import build_config
from hf_context_prune.evaluation.bootstrap import Estimate, ratio_to_change
from hf_context_prune.evaluation.reports.formatting import format_change, format_percent
from hf_context_prune.evaluation.reports.report import LossFacts
from hf_context_prune.pipelines.presets import PRESETS, preset_options
from hf_context_prune.pipelines.prune import run_pruning
from hf_context_prune.storage.loading import LoadedModel


def measure(args: argparse.Namespace, name: str, base: LoadedModel) -> dict[str, Any]:
    """Prune by a preset, and return what the report says."""
    options = preset_options(name)
    recovery = options.pop("recovery", None)
    config = build_config({**options, "num_calibration_samples": args.num_samples, "pruning_seed": args.seed})
    begin = time.monotonic()
    result = run_pruning(
        base,
        corpus(args, "train"),
        config,
        eval_data=corpus(args, "validation"),
        eval_options=EvalOptions(
            max_tokens=args.eval_tokens, benchmark=False, general_data=corpus(args, "train", "general")
        ),
        recovery=None if recovery is None else RecoveryConfig.from_dict(recovery),
    )
    report = result.report
    assert report.general is not None
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "parameters": result.model.num_parameters(),
        "base_parameters": report.size.base_parameters,
        "domain": _change(report.loss),
        "general": _change(report.general.loss),
        "documents": [report.loss.last.num_documents, report.general.loss.last.num_documents],
        "native": result.native_fit.fits,
    }


def _change(loss: LossFacts) -> list[Any]:
    """Return the change of bits per byte against the base, with its interval and its range over sources."""
    comparison = loss.last_comparison
    assert comparison is not None
    return list(astuple(ratio_to_change(comparison.bits_per_byte_ratio)))


def _pair(ends: Sequence[float] | None) -> tuple[float, float] | None:
    return None if ends is None else (ends[0], ends[1])


def results_text(rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the section of RESULTS.md."""
    body = []
    for name, row in rows.items():
        losses = [Estimate(value, *map(_pair, ends)) for value, *ends in (row["domain"], row["general"])]
        body.append(
            (
                f"`{name}`",
                PRESETS[name].about,
                format_percent(row["parameters"] / row["base_parameters"] - 1),
                *map(format_change, losses),
                f"{row['seconds'] / 60:.0f} min",
                "plain transformers" if row["native"] else "with the package or its modeling files",
            )
        )
    first = next(iter(rows.values()))
    general = ", ".join(f"`{name}`: {row['documents'][1]}" for name, row in rows.items())
    header = ("preset", "what it is", "parameters", args.domain, "general text", "time", "opens in")
    return f"""## Presets

SmolLM2-135M-Instruct (float32, dequantised), pruned for {args.domain} by each preset with {args.num_samples} x 512 calibration tokens, an
eighth of them general text where the preset calibrates on any. Change of bits per byte against the base model on passages, at
most {args.eval_tokens:,} tokens of each text: of {first["documents"][0]} documents of {args.domain}, and of the general documents that were not
calibrated on ({general}). 95 % bootstrap intervals draw sources, then documents; with fewer than five sources the range from
the best to the worst stands in their place, with fewer than ten documents nothing. Times with a load average of up to {highest_load(rows.values())}.

{table(header, body)}

`python -m benchmarks.presets --data DATA{args.given}` at {describe_runs(rows.values())}, seed {args.seed}.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of a run."""
    options = parser(__doc__ or "")
    options.set_defaults(domain="law")
    options.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS), help="which of them")
    options.add_argument("--num-samples", type=int, default=64, help="calibration samples of 512 tokens")
    options.add_argument("--eval-tokens", type=int, default=48_000, help="at most this many test tokens per text")
    args = options.parse_args(arguments)
    args.given = given(options, args)
    return args


def main(arguments: Sequence[str]) -> None:
    """Measure every preset that no earlier run left, and write the section."""
    args = parse(arguments)
    load: Callable[[], LoadedModel] = cache(smollm2)
    rows = Rows(args, "presets")
    sizes = {"domain": args.domain, "samples": args.num_samples, "eval_tokens": args.eval_tokens, "seed": args.seed}
    found = {
        name: rows.get_or_measure({"preset": name, **sizes}, lambda name=name: measure(args, name, load()))  # type: ignore[misc]
        for name in args.presets
    }
    write_section("presets", results_text(found, args))


if __name__ == "__main__":
    main(sys.argv[1:])
