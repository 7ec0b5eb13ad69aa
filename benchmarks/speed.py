"""Compare removed time with removed FLOPs: prefill of 4 x 512 tokens, base model against pruned models.

python -m benchmarks.speed --data PATH/TO/data
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Rows, given, parser, table, write_section
from benchmarks.models import smollm2
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import LayerWidths, read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan
from hf_context_prune.pruning.surgery import apply_plan


def plan_of(model: Any, widths: list[LayerWidths]) -> PruningPlan:
    """Return a plan with these widths. It keeps the first units, because only shapes matter here."""
    geometry = read_geometry(model.config, spec_of(model.config))
    layers = tuple(LayerPlan(tuple(range(w.neurons)), tuple(range(w.kv_groups))) for w in widths)
    return PruningPlan("llama", geometry.layers, layers)


def flops(model: Any, ids: torch.Tensor) -> int:
    """Return the FLOPs of one forward pass with the head, as torch counts them (eager attention: all products are matmuls)."""
    model.set_attn_implementation("eager")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    model.set_attn_implementation("sdpa")
    return counter.get_total_flops()


def seconds(model: Any, ids: torch.Tensor) -> float:
    """Return the seconds of one forward pass."""
    start = time.perf_counter()
    with torch.inference_mode():
        model(input_ids=ids, use_cache=True)
    return time.perf_counter() - start


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--pairs", type=int, default=12, help="timed pairs of base and pruned model")
    options.add_argument("--batch", type=int, default=4, help="sequences per forward pass")
    options.add_argument("--length", type=int, default=512, help="tokens per sequence")
    args = options.parse_args()
    args.given = given(options, args)
    rows = Rows(args, "speed", seed=args.seed)
    model = smollm2().model
    ids = torch.randint(100, 40_000, (args.batch, args.length), generator=torch.Generator().manual_seed(args.seed))
    layers = model.config.num_hidden_layers
    cases = {
        "uniform, 25 % of the neurons (1152, a multiple of 32)": [LayerWidths(1152, 3)] * layers,
        "variable, 640 to 1536 neurons by 32": [LayerWidths(640 + 32 * (i % 29), 3) for i in range(layers)],
        "variable, 701 to 1533 neurons, 1 to 3 KV groups": [
            LayerWidths(701 + 32 * (i % 27), 1 + i % 3) for i in range(layers)
        ],
    }
    lines, commit = [], ""
    for name, widths in cases.items():

        def measure(widths: list[LayerWidths] = widths) -> dict[str, Any]:
            smaller = apply_plan(model, plan_of(model, widths))
            seconds(model, ids), seconds(smaller, ids)
            pairs = []
            for turn in range(args.pairs):
                order = (model, smaller) if turn % 2 == 0 else (smaller, model)
                times = {id(m): seconds(m, ids) for m in order}
                pairs.append((times[id(model)], times[id(smaller)]))
            return {"pairs": pairs, "flops": [flops(model, ids), flops(smaller, ids)], "class": type(smaller).__name__}

        row = rows.get_or_measure({"case": name, "batch": args.batch, "length": args.length}, measure)
        gains = sorted(dense / pruned for dense, pruned in row["pairs"])
        work = row["flops"][0] / row["flops"][1]
        quarter = len(gains) // 4
        lines.append(
            [
                name,
                f"{statistics.median(gains):.2f}",
                f"{gains[quarter]:.2f} to {gains[-1 - quarter]:.2f}",
                f"{work:.2f}",
                f"{statistics.median(gains) / work:.2f}",
            ]
        )
        commit = row["setting"]["commit"]
    write_section(
        "speed",
        f"""## Speed for FLOPs

SmolLM2-135M-Instruct, float32, prefill of {args.batch} x {args.length} tokens with the head; median and interquartile
range of {args.pairs} interleaved pairs. FLOPs with the head, as `torch.utils.flop_counter` counts them. The last
column is the share of the removed work that is saved as time.

{table(["widths", "base time / pruned time", "IQR", "base FLOPs / pruned FLOPs", "time gain / FLOP gain"], lines)}

`python -m benchmarks.speed --data DATA{args.given}` at `{commit}`, {rows.setting["machine"]}, seed {args.seed}.
""",
    )


if __name__ == "__main__":
    main()
