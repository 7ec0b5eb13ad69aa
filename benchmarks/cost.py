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

from benchmarks.common import Rows, corpus, parser, table, write_section
from benchmarks.models import smollm2
from hf_context_prune.calibration import batches_of
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data import token_blocks
from hf_context_prune.evaluation._memory_worker import peak_rss
from hf_context_prune.planning import plan_and_repair
from hf_context_prune.surgery import apply_plan


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


def measure_time(args: argparse.Namespace, criterion: str, reconstruction: str) -> dict[str, Any]:
    model, samples, config = prepare(args, criterion, reconstruction)
    dense_forward(model, samples[:4])
    rounds = []
    for _ in range(args.rounds):
        forward = timed(dense_forward, model, samples)
        rounds.append((timed(prune_once, model, samples, config), forward))
    return {"rounds": rounds}


def prepare(args: argparse.Namespace, criterion: str, reconstruction: str) -> tuple[Any, torch.Tensor, PrunerConfig]:
    loaded = smollm2()
    samples = token_blocks(
        corpus(args, "train"), loaded.tokenizer, num_samples=args.blocks, max_seq_length=args.length, seed=args.seed
    )
    config = PrunerConfig(mlp_ratio=0.25, criterion=criterion, reconstruction=reconstruction, pruning_seed=args.seed)
    return loaded.model, samples, config


def measure_memory(args: argparse.Namespace, criterion: str, reconstruction: str) -> dict[str, Any]:
    """In a fresh process, so that nothing else is in its peak."""
    command = [sys.executable, "-m", "benchmarks.cost", "--worker", criterion, reconstruction]
    command += ["--data", str(args.data), "--domain", args.domain, "--blocks", str(args.blocks)]
    command += ["--length", str(args.length), "--seed", str(args.seed)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def worker(args: argparse.Namespace) -> None:
    before = psutil.Process().memory_info().rss
    model, samples, config = prepare(args, *args.worker)
    loaded = psutil.Process().memory_info().rss
    smaller = prune_once(model, samples, config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = sum(p.numel() * p.element_size() for p in smaller.parameters())
    peak, _ = peak_rss()
    print(json.dumps({"before": before, "loaded": loaded, "peak": peak, "model": size, "pruned": kept}))


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--blocks", type=int, default=48)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--methods", nargs="+", default=["wanda+least_squares", "obs+least_squares", "obs+sequential"])
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        worker(args)
        return
    rows = Rows(args, "cost", seed=args.seed)
    lines, memory_lines, commit = [], [], ""
    for criterion, reconstruction in (method.split("+") for method in args.methods):
        name = f"`{criterion}` + `{reconstruction}`"
        common = {"criterion": criterion, "reconstruction": reconstruction, "blocks": args.blocks}
        row = rows.get({**common, "what": "time"}, lambda c=criterion, r=reconstruction: measure_time(args, c, r))
        ratios = sorted(prune / forward for prune, forward in row["rounds"])
        lines.append([name, f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"])
        memory = rows.get(
            {**common, "what": "memory"}, lambda c=criterion, r=reconstruction: measure_memory(args, c, r)
        )
        layer = 1536**2 * 4
        held = layer if reconstruction == "sequential" else 30 * layer
        streams = 2 * args.blocks * args.length * 576 * 4 if reconstruction == "sequential" else 0
        terms = memory["before"] + memory["model"] + memory["pruned"] + held + streams
        memory_lines.append(
            [
                name,
                f"{(memory['peak'] - memory['before']) / memory['model']:.2f}",
                f"{memory['peak'] / 2**20:,.0f}",
                f"{terms / 2**20:,.0f}",
                f"{(memory['peak'] - terms) / 2**20:,.0f}",
            ]
        )
        commit = row["setting"]["commit"]
    write_section(
        "cost",
        f"""## Cost of pruning

Calibration + scoring + surgery over one dense forward pass (with logits) on the same {args.blocks} x {args.length} tokens,
25 % of the MLP neurons; data loading excluded, the two interleaved, median and range of {args.rounds} rounds.

{table(["", "x dense forward", "range"], lines)}

Peak memory of a fresh process that prunes. *Own multiple* is (peak - what the process held before loading) / model bytes.
The formula: `process before loading + model + pruned model + Gram matrices + streams`: the one-shot repairs hold layers x
width^2 x 4 bytes of Gram matrices; `sequential` holds one layer's, and two streams of tokens x hidden size x 4 bytes. What
is left over is one batch's activations, one layer's float64 solver workspace, the libraries loaded on the way and the
allocator's slack.

{table(["", "own multiple", "peak, MiB", "formula, MiB", "left over, MiB"], memory_lines)}

`python -m benchmarks.cost --data DATA` at `{commit}`, {rows.setting["machine"]}, seed {args.seed}.
""",
    )


if __name__ == "__main__":
    main()
