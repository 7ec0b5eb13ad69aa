"""What pruning costs: time as a multiple of one dense forward pass, and peak memory as a multiple of the model.

python -m benchmarks.cost --data PATH/TO/data
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil
import torch

from benchmarks.common import Rows, corpus, given, parser, table, write_section
from benchmarks.models import smollm2
from hf_context_prune.calibration import batches_of
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data import token_blocks
from hf_context_prune.evaluation._memory_worker import peak_rss
from hf_context_prune.planning import Planner, plan_and_repair
from hf_context_prune.surgery import apply_plan

DEFAULT, SEARCH = "obs+sequential", "search"
SEARCHED = "`obs` + `sequential` with adaptive widths"


def prune_once(model: Any, samples: torch.Tensor, config: PrunerConfig) -> Any:
    """Calibration, scoring and surgery, as `prune` runs them."""
    plan, repair = plan_and_repair(model, samples, config)
    return apply_plan(model, plan, repair=repair)


def dense_forward(model: Any, samples: torch.Tensor) -> None:
    """One pass over the same batches, with logits."""
    with torch.inference_mode():
        for batch in batches_of(samples):
            model(**batch, use_cache=False)


def timed(function: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def search_widths(model: Any, samples: torch.Tensor, config: PrunerConfig) -> None:
    """What adaptive allocation measures before anything is cut: statistics, and the loss of every narrowed layer."""
    Planner(model, samples, config)


def measure_time(args: argparse.Namespace, criterion: str, reconstruction: str) -> dict[str, Any]:
    model, samples, config = prepare(args, criterion, reconstruction, args.blocks)
    run, rounds = prune_once, args.rounds
    if reconstruction == SEARCH:
        run, rounds = search_widths, 1  # as long as several walks
    dense_forward(model, samples[:4])
    found = []
    for _ in range(rounds):
        forward = timed(dense_forward, model, samples)
        found.append((timed(run, model, samples, config), forward))
    return {"rounds": found}


def prepare(
    args: argparse.Namespace, criterion: str, reconstruction: str, blocks: int
) -> tuple[Any, torch.Tensor, PrunerConfig]:
    loaded = smollm2()
    samples = token_blocks(
        corpus(args, "train"), loaded.tokenizer, num_samples=blocks, max_seq_length=args.length, seed=args.seed
    )
    options: dict[str, Any] = {"mlp_ratio": 0.25, "reconstruction": reconstruction}
    if reconstruction == SEARCH:  # neurons and KV groups, as with the default budget
        options = {"pruning_ratio": 0.15, "reconstruction": "sequential"}
    config = PrunerConfig(criterion=criterion, **options, pruning_seed=args.seed)
    return loaded.model, samples, config


def measure_memory(args: argparse.Namespace, criterion: str, reconstruction: str, blocks: int) -> dict[str, Any]:
    """In a fresh process, so that nothing else is in its peak."""
    command = [sys.executable, "-m", "benchmarks.cost", "--worker", criterion, reconstruction]
    command += ["--data", str(args.data), "--domain", args.domain, "--blocks", str(blocks)]
    command += ["--length", str(args.length), "--seed", str(args.seed)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def worker(args: argparse.Namespace) -> None:
    before = psutil.Process().memory_info().rss
    model, samples, config = prepare(args, *args.worker, args.blocks)
    loaded = psutil.Process().memory_info().rss
    smaller = prune_once(model, samples, config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = sum(p.numel() * p.element_size() for p in smaller.parameters())
    peak, _ = peak_rss()
    print(json.dumps({"before": before, "loaded": loaded, "peak": peak, "model": size, "pruned": kept}))


def memory_line(name: str, memory: dict[str, Any], blocks: int, length: int) -> list[str]:
    """Peak against the formula."""
    layer = 1536**2 * 4
    search = name == SEARCHED
    walks = "sequential" in name or search
    held = 30 * (layer + 576**2 * 4) if search else layer if walks else 30 * layer
    streams = 2 * blocks * length * 576 * 4 if walks else 0
    terms = memory["before"] + memory["model"] + memory["pruned"] + held + streams
    mebibyte = 2**20
    return [
        name,
        f"{blocks * length:,}",
        f"{(memory['peak'] - memory['before']) / memory['model']:.2f}",
        *(f"{part / mebibyte:,.0f}" for part in (memory["peak"], terms, memory["peak"] - terms)),
    ]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--blocks", type=int, default=48)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument(
        "--methods", nargs="+", default=["wanda+least_squares", "obs+least_squares", DEFAULT, f"obs+{SEARCH}"]
    )
    options.add_argument("--memory-blocks", type=int, nargs="+", default=[32, 96, 192], help="blocks, for the default")
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args()
    args.given = given(options, args)
    if args.worker:
        worker(args)
        return
    rows = Rows(args, "cost", seed=args.seed)
    lines, memory_lines, commits = [], [], set()

    def add_memory(criterion: str, reconstruction: str, blocks: int) -> None:
        key = {"criterion": criterion, "reconstruction": reconstruction, "blocks": blocks, "what": "memory"}
        row = rows.get(key, lambda: measure_memory(args, criterion, reconstruction, blocks))
        commits.add(row["setting"]["commit"])
        name = SEARCHED if reconstruction == SEARCH else f"`{criterion}` + `{reconstruction}`"
        memory_lines.append(memory_line(name, row, blocks, args.length))

    for criterion, reconstruction in (method.split("+") for method in args.methods):
        name = f"`{criterion}` + `{reconstruction}`" if reconstruction != SEARCH else "its search of adaptive widths"
        key = {"criterion": criterion, "reconstruction": reconstruction, "blocks": args.blocks, "what": "time"}
        row = rows.get(key, lambda c=criterion, r=reconstruction: measure_time(args, c, r))
        commits.add(row["setting"]["commit"])
        ratios = sorted(prune / forward for prune, forward in row["rounds"])
        lines.append([name, f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"])
        if f"{criterion}+{reconstruction}" != DEFAULT:
            add_memory(criterion, reconstruction, args.blocks)
    for blocks in args.memory_blocks:
        add_memory(*DEFAULT.split("+"), blocks)
    write_section(
        "cost",
        f"""## Cost of pruning

Calibration + scoring + surgery over one dense forward pass (with logits) on the same {args.blocks} x {args.length} tokens,
25 % of the MLP neurons; data loading excluded, the two interleaved, median and range of {args.rounds} rounds (the search:
one). With adaptive widths, the search (neurons and KV groups, 15 % of all parameters) comes before the walk.

{table(["", "x dense forward", "range"], lines)}

Peak memory of a fresh process that prunes. *Own multiple* is (peak - what the process held before loading) / model bytes.
The formula: `process before loading + model + pruned model + Gram matrices + streams`: the one-shot repairs hold layers x
width^2 x 4 bytes of Gram matrices (the search too, of as many layers at once as a quarter of the free memory holds);
`sequential` holds one layer's, and two streams of tokens x hidden size x 4 bytes. What is left over is one batch's
activations, one layer's float64 solver workspace, the libraries loaded on the way and the allocator's slack.

{table(["", "calibration tokens", "own multiple", "peak, MiB", "formula, MiB", "left over, MiB"], memory_lines)}

`python -m benchmarks.cost --data DATA{args.given}` at {", ".join(f"`{commit}`" for commit in sorted(commits))}, {rows.setting["machine"]}, seed {args.seed}.
""",
    )


if __name__ == "__main__":
    main()
