"""What calibration text costs and what it gives: loss, time and peak memory of a pruning by the number of its tokens.

Every pruning has a process of its own, so that nothing else is in its peak. Times are worth something on a quiet machine.

python -m benchmarks.cost --data PATH/TO/data
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import psutil
import torch

from benchmarks.common import Rows, cell, given, parser, plot_path, table, write_section
from benchmarks.methods import HIGH, METHODS, REFERENCE, SIZES, Domain, documents_of, rounded
from benchmarks.models import smollm2
from benchmarks.one_shot import errorbars, excess
from hf_context_prune.evaluation._memory_worker import peak_rss
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.modeling.architectures import TARGETS, spec_of
from hf_context_prune.modeling.specs import read_geometry
from hf_context_prune.pruning.allocation.probing import SEARCH_TOKENS
from hf_context_prune.pruning.allocation.sensitivity import PROBE_TOKENS
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.vocabulary.refit import refit_rows

COMPARED = ("ours", "obs+least_squares", REFERENCE)
SEARCHED = "ours-adaptive"
SIZE, SEARCHED_SIZE = "mlp25", "all20"
"""Uniform widths at the first; the search, of neurons and KV groups as with the default budget, at the second."""
GOAL = 3.0
"""Dense forward passes that a pruning of uniform widths may take."""


def run_once(args: argparse.Namespace, method: str, blocks: int) -> dict[str, Any]:
    """Prune in this process: seconds, bytes and losses."""
    size = SIZES[SEARCHED_SIZE if method == SEARCHED else SIZE]
    own = argparse.Namespace(**{**vars(args), "blocks": blocks})
    domain = Domain(cache(smollm2), own, args.domain, targets=TARGETS if size.attention else ("mlp",))
    domain.held_out  # noqa: B018  # text, read before anything is counted
    before = psutil.Process().memory_info().rss
    model, samples = domain.model, domain.samples
    begin = time.perf_counter()
    config = domain.config(METHODS[method], size)
    if METHODS[method].adaptive:
        domain.adaptive(config)
    searched = time.perf_counter()
    smaller, _ = domain.prune(METHODS[method], size)
    pruned = time.perf_counter()
    peak, _ = peak_rss()
    row = {
        "before": before,
        "peak": peak,
        "model": model_bytes(model),
        "pruned": model_bytes(smaller),
        "held": held_bytes(model, smaller, samples, method),
        "tokens": samples.numel(),
        "search_seconds": searched - begin,
        "seconds": pruned - searched,
    }
    if method == SEARCHED:  # what `refit_lm_head=True` adds
        begin = time.perf_counter()
        refit_rows(smaller, samples)
        row |= {"refit_seconds": time.perf_counter() - begin, "refit_peak": peak_rss()[0]}
    if blocks in args.timed:  # after the peak was read: the logits of a batch are large
        begin = time.perf_counter()
        with torch.inference_mode():
            for batch in batches_of(samples):
                model(**batch, use_cache=False)
        row["forward_seconds"] = time.perf_counter() - begin
    losses = [] if method == SEARCHED else domain.losses(smaller)  # of another size: not in the table of losses
    return {**row, "documents": documents_of(losses), "nll": rounded(losses)}


def model_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def held_bytes(model: Any, smaller: Any, samples: torch.Tensor, method: str) -> int:
    """What the formula counts beside the two models: Gram matrices of all layers, or for a walk one layer's and two streams.

    A search holds the Gram matrices of all layers, every block's output on the text that it probes, and the dense
    model's log-probabilities there beside the narrowed one's logits; but there is no pruned model yet.
    """
    geometry = read_geometry(model.config, spec_of(model.config))
    neurons = [4 * widths.neurons**2 for widths in geometry.layers]
    heads = [4 * (w.kv_groups * geometry.queries_per_group * geometry.head_dim) ** 2 for w in geometry.layers]
    streams = 2 * samples.numel() * geometry.hidden_size * 4
    if method == SEARCHED:
        outputs = len(geometry.layers) * geometry.hidden_size + 2 * model.config.vocab_size
        searching = sum(neurons) + sum(heads) + 4 * PROBE_TOKENS * outputs
        return max(searching - model_bytes(smaller), max(neurons) + max(heads) + streams)
    if method == "ours":
        return max(neurons) + streams
    return sum(neurons) if "least_squares" in method else 0


def in_fresh_process(args: argparse.Namespace, method: str, blocks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.cost", "--worker", method, str(blocks)]
    for name in ("data", "domain", "length", "eval_tokens", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    result = subprocess.run([*command, "--timed", *map(str, args.timed)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def plot(tokens: Sequence[int], found: Mapping[str, Sequence[Estimate]]) -> None:
    """Excess over calibration tokens, both on log scales."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for method, estimates in found.items():
        errorbars(axis, tokens, estimates, METHODS[method].label.replace("`", ""), horizontal=False)
    drawn = any(estimate.value > 0 for estimates in found.values() for estimate in estimates)
    axis.set(
        xscale="log",
        yscale="log" if drawn else "linear",
        xlabel="calibration tokens",
        ylabel="excess, nats a token",
        title=SIZES[SIZE].label,
    )
    axis.grid(which="both", alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(plot_path("cost"), dpi=120)
    plt.close(figure)


def cost_cells(method: str, row: Mapping[str, Any]) -> list[str]:
    """One line of the table of time and memory."""
    mebibyte = 2**20
    formula = row["before"] + row["model"] + row["pruned"] + row["held"]
    forward = row.get("forward_seconds")
    return [
        METHODS[method].label + (f", {SIZES[SEARCHED_SIZE].label}" if method == SEARCHED else ""),
        f"{row['tokens']:,}",
        f"{row['seconds']:.0f}",
        f"{row['seconds'] / forward:.2f}" if forward else "",
        f"{row['search_seconds'] / forward:.2f}" if forward and METHODS[method].adaptive else "",
        f"{(row['peak'] - row['before']) / row['model']:.2f}",
        *(f"{part / mebibyte:,.0f}" for part in (row["peak"], formula, row["peak"] - formula)),
    ]


def high_cells(row: Mapping[str, Any]) -> list[str]:
    """The line of `refit_lm_head=True`, which is the searched pruning and a refit of rows; no formula has its memory."""
    row = {**row, "seconds": row["seconds"] + row["refit_seconds"], "peak": row["refit_peak"]}
    _, *found = cost_cells(SEARCHED, row)
    return [f"{METHODS[HIGH].label}, of the same size", *found[:-2], "", ""]


COST_HEADER = [
    *("", "calibration tokens", "seconds", "x dense forward", "its search, x dense forward"),
    *("own multiple", "peak, MiB", "formula, MiB", "left over, MiB"),
]


def results_text(
    dense: Mapping[str, Any], rows: Mapping[tuple[str, int], dict[str, Any]], args: argparse.Namespace, machine: str
) -> str:
    """The section of RESULTS.md."""
    sizes = sorted({blocks for method, blocks in rows if method != SEARCHED})
    found = {
        method: [excess(dense, rows[method, blocks], dense, args.seed) for blocks in sizes] for method in args.methods
    }
    tokens = [blocks * args.length for blocks in sizes]
    plot(tokens, found)
    losses = table(
        ["calibration tokens", *(METHODS[method].label for method in args.methods)],
        [[f"{n:,}", *(cell(found[method][i]) for method in args.methods)] for i, n in enumerate(tokens)],
    )
    ours = [row for (method, _), row in rows.items() if method == "ours" and "forward_seconds" in row]
    most = max((row["seconds"] / row["forward_seconds"] for row in ours), default=0.0)
    verdict = (
        f" Uniform widths, `sequential`: at most {most:.2f} dense forward passes (goal: {GOAL:g})." if ours else ""
    )
    costs = [cost_cells(method, row) for (method, _), row in sorted(rows.items())]
    costs += [high_cells(row) for (method, _), row in rows.items() if method == SEARCHED]
    commits = sorted({row["setting"]["commit"] for row in rows.values()})
    return f"""## Cost of pruning, and loss by calibration text

SmolLM2-135M-Instruct, {SIZES[SIZE].label} (but for adaptive widths), calibrated on blocks of {args.length} tokens of
`{args.domain}` train, every pruning in a process of its own. Excess loss over the dense model in nats a token on
{sum(tokens for _, tokens, _ in dense["documents"]):,} tokens ({len(dense["documents"])} whole documents) of its validation text, 95 % bootstrap
interval over documents, paired.

![Excess loss by calibration tokens]({plot_path("cost").name})

{losses}

*Seconds*: calibration, scoring and surgery, data loading excluded; the dense forward pass (with logits) is over the same
tokens, in the same process afterwards. The search of adaptive widths comes before the walk.{verdict}

*Own multiple* is (peak - what the process held before loading) / model bytes. The formula: `process before loading + model
+ pruned model + Gram matrices + streams`. `least_squares` and the search hold layers x width^2 x 4 bytes of Gram matrices
(of as many layers at once as a quarter of the free memory holds); `sequential` holds one layer's, and two streams of tokens
x hidden size x 4 bytes. The search, which comes before there is a pruned model, holds for the {PROBE_TOKENS:,} tokens that
it probes on every block's output, and log-probabilities and logits of the whole vocabulary, 4 bytes each. What is left over
is one batch's activations, one layer's float64 solver workspace, the libraries loaded on the way and the allocator's slack.
`refit_lm_head=True` refits the rows of the tokens once the walk is done; its peak is that of all three.

{table(COST_HEADER, costs)}

`python -m benchmarks.cost --data DATA{args.given}` at {", ".join(f"`{commit}`" for commit in commits)}, {machine}, seed {args.seed}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--blocks", type=int, nargs="+", default=[16, 32, 96, 192, 256], help="of calibration text")
    options.add_argument("--timed", type=int, nargs="+", default=[32, 96], help="of --blocks: beside a dense pass")
    options.add_argument("--search-blocks", type=int, default=96, help="for adaptive widths; one of --timed")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED), help="of uniform widths")
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--eval-tokens", type=int, default=24_000)
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    if args.worker:
        print(json.dumps(run_once(args, args.worker[0], int(args.worker[1]))))
        return
    args.given = given(options, args)
    store = Rows(args, "cost", seed=args.seed)
    common = {"domain": args.domain, "length": args.length, "eval_tokens": args.eval_tokens, "seed": args.seed}
    own = argparse.Namespace(**{**vars(args), "blocks": 1})
    dense = store.get(
        {**common, "method": "dense"}, Domain(cache(smollm2), own, args.domain, targets=("mlp",)).measure_dense
    )
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for method, blocks in [
        *((method, blocks) for blocks in args.blocks for method in args.methods),
        (SEARCHED, args.search_blocks),
    ]:
        key = {**common, "method": method, "blocks": blocks, "timed": blocks in args.timed}
        if method == SEARCHED:
            key["search"] = [SEARCH_TOKENS, PROBE_TOKENS]
        row = store.get(key, lambda m=method, b=blocks: in_fresh_process(args, m, b))
        if method != SEARCHED and row["documents"] != dense["documents"]:
            raise SystemExit("The dense row was measured on other documents than are there now; start over: --fresh.")
        rows[method, blocks] = row
    write_section("cost", results_text(dense, rows, args, store.setting["machine"]))


if __name__ == "__main__":
    main()
