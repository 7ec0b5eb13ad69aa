"""Measure loss, time and peak memory of pruning by the number of calibration tokens.

Every pruning runs in its own process, so that its peak holds nothing else. Times mean little on a busy machine.

python -m benchmarks.cost --data PATH/TO/data
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import psutil
import torch

from benchmarks.by_source import read_sources, sources_of
from benchmarks.common import Rows, cell, describe_runs, given, parser, plot_path, table, write_section
from benchmarks.methods import DEFAULT, METHODS, REFERENCE, SIZES, Domain, documents_of, rounded
from benchmarks.models import smollm2
from benchmarks.one_shot import OneShotDomain, errorbars, excess
from hf_context_prune.evaluation._memory_worker import peak_rss
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.modeling.architectures import TARGETS, spec_of, unit_size
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.pruning.allocation.probing import SEARCH_TOKENS
from hf_context_prune.pruning.allocation.sensitivity import PROBE_TOKENS, choose_probe_counts

COMPARED = ("ours", "obs+least_squares", REFERENCE)
SEARCHED = "ours-adaptive"
SIZE, SEARCHED_SIZE = "mlp25", "all20"
"""Sizes for uniform widths, and for the search, which removes neurons and KV groups as the default budget does."""
GOAL = 3.0
"""Most forward passes of the base model that a pruning to uniform widths may take."""
SHARE, GOAL_OF_DEFAULT = 0.2, 4.0
"""Share of all parameters that the default removes, and the forward passes that it may take, its search included."""


def run_once(args: argparse.Namespace, method: str, num_samples: int) -> dict[str, Any]:
    """Prune in this process and return seconds, bytes and losses; of the default, no losses."""
    if method == DEFAULT:
        return _run_default(args, num_samples)
    size = SIZES[SEARCHED_SIZE if method == SEARCHED else SIZE]
    own = argparse.Namespace(**{**vars(args), "num_samples": num_samples})
    domain = Domain(cache(smollm2), own, args.domain, targets=TARGETS if size.attention else ("mlp",))
    domain.test_text  # noqa: B018  # read before anything is measured
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
    if num_samples in args.timed:  # after the peak was read, because the logits of a batch are large
        row["forward_seconds"] = domain.time_forward()
    losses = [] if method == SEARCHED else domain.losses(smaller)  # another size, so not in the table of losses
    return {**row, "documents": documents_of(losses), "nll": rounded(losses)}


def _run_default(args: argparse.Namespace, num_samples: int) -> dict[str, Any]:
    """Prune by the default, tokens and the refit of the head included."""
    with tempfile.TemporaryDirectory() as work:
        own = argparse.Namespace(**{**vars(args), "num_samples": num_samples, "work": work, "shares": [SHARE]})
        domain = OneShotDomain(cache(smollm2), own, args.domain, targets=TARGETS)
        domain.calibration  # noqa: B018  # read before anything is measured
        before = psutil.Process().memory_info().rss
        model, begin = domain.model, time.perf_counter()
        domain.compare_forms(SHARE)
        searched = time.perf_counter()
        smaller, _, _ = domain.pruned(DEFAULT, SHARE)
        pruned = time.perf_counter()
        row = {"before": before, "peak": peak_rss()[0], "model": model_bytes(model), "pruned": model_bytes(smaller)}
        row |= {"search_seconds": searched - begin, "seconds": pruned - searched, "tokens": domain.samples.numel()}
        return {**row, "forward_seconds": domain.time_forward()}


def model_bytes(model: Any) -> int:
    """Return the bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def held_bytes(model: Any, smaller: Any, samples: torch.Tensor, method: str) -> int:
    """Return the bytes that the formula counts besides the two models.

    `least_squares` holds the Gram matrices of all layers, `sequential` those of one layer and the hidden states of two
    models. A search holds the Gram matrices of all layers, and their output projections at every probed width; there is
    no pruned model yet.
    """
    geometry = read_geometry(model.config, spec_of(model.config))
    neurons = [4 * widths.neurons**2 for widths in geometry.layers]
    group = unit_size(geometry, "attention")
    heads = [4 * (w.kv_groups * group) ** 2 for w in geometry.layers]
    hidden_states = 2 * samples.numel() * geometry.hidden_size * 4
    if method == SEARCHED:
        features = sum(
            len(choose_probe_counts(w, "mlp")) * w.neurons
            + len(choose_probe_counts(w, "attention")) * w.kv_groups * group
            for w in geometry.layers
        )
        searching = sum(neurons) + sum(heads) + 4 * geometry.hidden_size * features
        return max(searching - model_bytes(smaller), max(neurons) + max(heads) + hidden_states)
    if method == "ours":
        return max(neurons) + hidden_states
    return sum(neurons) if "least_squares" in method else 0


def in_fresh_process(args: argparse.Namespace, method: str, num_samples: int) -> dict[str, Any]:
    """Run [`run_once`][] in a new process and return its row.

    Raises:
        SystemExit: The process failed; its errors are in the message.
    """
    command = [sys.executable, "-m", "benchmarks.cost", "--worker", method, str(num_samples)]
    for name in ("data", "domain", "length", "eval_tokens", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    result = subprocess.run([*command, "--timed", *map(str, args.timed)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def plot(tokens: Sequence[int], found: Mapping[str, Sequence[Estimate]]) -> None:
    """Plot excess loss over calibration tokens, both on log scales."""
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
        ylabel="excess, nats per token",
        title=SIZES[SIZE].label,
    )
    axis.grid(which="both", alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(plot_path("cost"), dpi=120)
    plt.close(figure)


def cost_cells(method: str, row: Mapping[str, Any]) -> list[str]:
    """Return one row of the table of time and memory."""
    mebibyte, searches = 2**20, method in (SEARCHED, DEFAULT)
    parts = [row["peak"]]
    if "held" in row:
        formula = row["before"] + row["model"] + row["pruned"] + row["held"]
        parts += [formula, row["peak"] - formula]
    forward = row.get("forward_seconds")
    what = {SEARCHED: f", {SIZES[SEARCHED_SIZE].label}", DEFAULT: f", {SHARE:.0%} of all parameters"}
    return [
        METHODS[method].label + what.get(method, ""),
        f"{row['tokens']:,}",
        f"{row['seconds']:.0f}",
        f"{row['seconds'] / forward:.2f}" if forward else "",
        f"{row['search_seconds'] / forward:.2f}" if forward and searches else "",
        f"{(row['peak'] - row['before']) / row['model']:.2f}",
        *(f"{part / mebibyte:,.0f}" for part in parts),
        *[""] * (3 - len(parts)),
    ]


COST_HEADER = [
    *("", "calibration tokens", "seconds", "x base forward", "search, x base forward"),
    *("model sizes", "peak, MiB", "formula, MiB", "rest, MiB"),
]


def results_text(
    dense: Mapping[str, Any], rows: Mapping[tuple[str, int], dict[str, Any]], args: argparse.Namespace
) -> str:
    """Return the section of RESULTS.md."""
    sizes = sorted({number for method, number in rows if method not in (SEARCHED, DEFAULT)})
    found = {
        method: [excess(dense, rows[method, number], dense, args.seed) for number in sizes] for method in args.methods
    }
    tokens = [number * args.length for number in sizes]
    plot(tokens, found)
    losses = table(
        ["calibration tokens", *(METHODS[method].label for method in args.methods)],
        [[f"{n:,}", *(cell(found[method][i]) for method in args.methods)] for i, n in enumerate(tokens)],
    )
    ours = [row for (method, _), row in rows.items() if method == "ours" and "forward_seconds" in row]
    most = max((row["seconds"] / row["forward_seconds"] for row in ours), default=0.0)
    verdict = (
        f" Uniform widths, `sequential`: at most {most:.2f} forward passes of the base model (goal: {GOAL:g})."
        if ours
        else ""
    )
    whole = [
        (row["search_seconds"] + row["seconds"]) / row["forward_seconds"] for row in rows.values() if "held" not in row
    ]
    verdict += f" The default with its search: {whole[0]:.2f} passes (goal: {GOAL_OF_DEFAULT:g})." if whole else ""
    costs = [cost_cells(method, row) for (method, _), row in sorted(rows.items())]
    return f"""## Cost of pruning, and loss by calibration text

SmolLM2-135M-Instruct, {SIZES[SIZE].label} removed (except with adaptive widths), calibrated on samples of {args.length} tokens of
`{args.domain}` train, every pruning in its own process. Excess loss over the base model in nats per token on
{sum(tokens for _, tokens, _ in dense["documents"]):,} tokens ({len(dense["documents"])} whole documents) of its validation split; 95 % bootstrap
intervals draw sources, then documents, paired.

![Excess loss by calibration tokens]({plot_path("cost").name})

{losses}

*Seconds*: calibration, scoring and surgery, without loading of data; the forward pass of the base model (with logits) runs
over the same tokens, in the same process, afterwards. The search for adaptive widths comes before the sequential run.{verdict}

*Model sizes*: (peak - memory of the process before loading) / bytes of the model. The formula: `process before loading +
model + pruned model + Gram matrices + hidden states`. `least_squares` and the search hold layers x width^2 x 4 bytes of Gram
matrices (of as many layers at once as fit in a quarter of the free memory); `sequential` holds those of one layer, and the
hidden states of two models, tokens x hidden size x 4 bytes each. The search, during which there is no pruned model yet, holds
beside its Gram matrices every output projection at each of the three to five widths that are probed, 4 bytes per weight.
*Rest*: activations of one batch, the float64 workspace of one layer's solver, libraries that are loaded during the run, and
slack of the allocator. The default prices tokens, too, and refits the rows of the vocabulary behind the sequential run; no
formula covers its memory.

{table(COST_HEADER, costs)}

`python -m benchmarks.cost --data DATA{args.given}` at {describe_runs(rows.values())}, seed {args.seed}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--num-samples", type=int, nargs="+", default=[16, 32, 96, 192, 256], help="numbers of calibration samples"
    )
    options.add_argument(
        "--timed",
        type=int,
        nargs="+",
        default=[32, 96],
        help="those of --num-samples that are timed beside the base model",
    )
    options.add_argument(
        "--search-samples", type=int, default=96, help="calibration samples for adaptive widths; one of --timed"
    )
    options.add_argument("--default-samples", type=int, default=128, help="calibration samples of the default")
    options.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(COMPARED), help="methods, all with uniform widths"
    )
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=24_000, help="at most this many test tokens")
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    if args.worker:
        print(json.dumps(run_once(args, args.worker[0], int(args.worker[1]))))
        return
    args.given = given(options, args)
    store = Rows(args, "cost", seed=args.seed)
    common = {"domain": args.domain, "length": args.length, "eval_tokens": args.eval_tokens, "seed": args.seed}
    own = argparse.Namespace(**{**vars(args), "num_samples": 1})
    dense = store.get_or_measure(
        {**common, "method": "dense"}, Domain(cache(smollm2), own, args.domain, targets=("mlp",)).measure_dense
    )
    dense = {**dense, "sources": sources_of(dense, read_sources(args, [args.domain])[args.domain])}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for method, number in [
        *((method, number) for number in args.num_samples for method in args.methods),
        (SEARCHED, args.search_samples),
        (DEFAULT, args.default_samples),
    ]:
        key = {**common, "method": method, "blocks": number, "timed": number in args.timed}
        if method == SEARCHED:
            key["search"] = [SEARCH_TOKENS, PROBE_TOKENS]
        row = store.get_or_measure(key, lambda m=method, n=number: in_fresh_process(args, m, n))
        if method not in (SEARCHED, DEFAULT) and row["documents"] != dense["documents"]:
            raise SystemExit(
                "The row of the base model was measured on other documents than --data has now. Start over with --fresh."
            )
        rows[method, number] = row
    write_section("cost", results_text(dense, rows, args))


if __name__ == "__main__":
    main()
