"""Measure whole layers against narrower ones and against peers that remove layers: loss, and seconds of real runtimes.

python -m benchmarks.depth --data PATH/TO/data --peers PATH/TO/peers            # about three hours; resumes
python -m benchmarks.depth --data PATH/TO/data --peers PATH/TO/peers --quick    # one domain, one size: 40 minutes
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.by_source import mean_change, read_sources, sources_of
from benchmarks.checkouts import BLOCKPRUNER, depth_masks, mask_layers
from benchmarks.common import Rows, describe_runs, highest_load, parse_compared, parser, table, write_section
from benchmarks.decoding import Artefact, compare, spread
from benchmarks.frontier import FrontierDomain
from benchmarks.models import smollm2
from hf_context_prune.config import PrunerConfig
from hf_context_prune.evaluation.reports.formatting import format_change
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.depth import Depth
from hf_context_prune.pruning.model_builder import PrunedModel
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.loading import LoadedModel

WHOLE, WIDTHS, BOTH, PATCH = "layers", "widths", "layers and widths", "window and a linear map"
HALF = "half layers, half widths"
OWN = (WHOLE, WIDTHS, BOTH, HALF)
METHODS = (*OWN, "shortgpt", "window", PATCH, BLOCKPRUNER)
"""BlockPruner is the last, since it takes longer than all others together."""
LABELS = {"shortgpt": "ShortGPT", "window": "window of layers", BLOCKPRUNER: "BlockPruner"}
RUNTIMES = ("transformers float32", "gguf f16")
BATCH = 1

Found = Mapping[tuple[str, float, str], Mapping[str, Any]]
"""Rows by (domain, share, method); the base model has the share 0 and the method ""."""


class DepthDomain(FrontierDomain):
    """A domain whose layers become fewer, or narrower. A share is of the parameters of all layers."""

    label = "depth"

    def __init__(self, peers: Path, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.peers = peers
        self.perplexities: dict[Any, float] = {}

    def count(self, share: float) -> int:
        """Return how many whole layers a share is."""
        return round(share * len(ModelView.of(self.model).layers))

    def own_config(self, method: str, share: float) -> PrunerConfig:
        args, view = self.args, ModelView.of(self.model)
        layers = len(view.layers)
        gone = self.count(share) * sum(parameter.numel() for parameter in view.layers[0].parameters())
        size: dict[str, Any] = {"target_params": view.num_parameters - gone}
        if method == WHOLE:
            size = {"num_layers": layers - self.count(share)}
        elif method in OWN:
            size["units"] = "neurons,kv_groups" + (",layers" if method == BOTH else "")
        if method == HALF:
            size["num_layers"] = layers - self.count(share / 2)
        return PrunerConfig(
            **size,
            refit_lm_head=False,
            num_calibration_samples=args.num_samples,
            max_seq_length=args.length,
            pruning_seed=args.seed,
        )

    def pruned(self, method: str, share: float) -> PrunedModel:
        """Prune once and keep the model on the disk: loss and speed, measured apart, are of one model."""
        return self.keep(share, partial(super().pruned, method, share), method)

    def make(self, method: str, share: float) -> tuple[Any, dict[str, Any]]:
        """Return a smaller model, and facts on what was removed."""
        if method in OWN:
            found: PrunedModel = self.pruned(method, share)
            return found.model, {"gone": list(found.plan.removed_layers)}
        name = "window" if method == PATCH else method
        attention, mlp, note = depth_masks(
            self.peers / "2SSP", name, self.model, self.samples, self.count(share), self.perplexities
        )
        if attention != mlp:
            masked = copy.deepcopy(self.model)
            mask_layers(masked, attention, mlp)
            sizes = zip(masked.model.layers, attention, mlp, strict=True)
            parameters = self.model.num_parameters() - sum(
                parameter.numel()
                for layer, *gone in sizes
                for part, removed in zip((layer.self_attn, layer.mlp), gone, strict=True)
                for parameter in part.parameters()
                if removed
            )
            halves = {"attentions": attention.count(True), "mlps": mlp.count(True)}
            return masked, {"call": note, "parameters": parameters, **halves}
        gone = [index for index, removed in enumerate(attention) if removed]
        shorter = apply_plan(self.model, Depth(len(attention), tuple(gone)).plan(self.model), share=True)
        facts: dict[str, Any] = {"gone": gone, "call": note}
        if method == PATCH:
            matrix = self.linear_map(gone[0], gone[-1])
            shorter.model.layers[gone[0] - 1].register_forward_hook(lambda _, args, output: output @ matrix)
            facts["parameters"] = shorter.num_parameters() + matrix.numel()
        return shorter, facts

    @torch.no_grad()
    def linear_map(self, first: int, last: int) -> torch.Tensor:
        """Return T of least |X T - Y|^2: X is the hidden state before layer `first`, Y behind `last`, [hidden, hidden]."""
        seen: dict[int, torch.Tensor] = {}
        layers = self.model.model.layers
        handles = [
            layers[index].register_forward_hook(lambda _, args, output, place=index: seen.update({place: output}))
            for index in (first - 1, last)
        ]
        size = self.model.config.hidden_size
        gram, cross = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
        for batch in batches_of(self.samples):
            self.model(**batch, use_cache=False)
            before, behind = (seen[index].flatten(0, 1).double() for index in (first - 1, last))
            gram += before.T @ before
            cross += before.T @ behind
        for handle in handles:
            handle.remove()
        return torch.linalg.solve(gram, cross).float()


def score(domain: DepthDomain, method: str, share: float, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a smaller model."""
    begin = time.perf_counter()
    model, facts = domain.make(method, share)
    facts["prune_seconds"] = round(time.perf_counter() - begin, 1)
    row = domain.scored(model, domain.load().tokenizer, base, general=False)
    return {**row, **facts}


def measure_speed(domain: DepthDomain, method: str, share: float, runtime: str) -> dict[str, Any]:
    """Time the base model and a smaller one in turns."""
    load = domain.load()
    smaller = LoadedModel(domain.make(method, share)[0], load.tokenizer, method, None, None)
    with tempfile.TemporaryDirectory() as scratch:
        pair = (Artefact(runtime, loaded, Path(scratch, name)) for name, loaded in (("base", load), ("small", smaller)))
        return compare(*pair, domain.args.context, BATCH, domain.args)


def measure_all(rows: Rows, args: argparse.Namespace) -> tuple[Found, dict[tuple[float, str, str], Any]]:
    """Return the rows of losses and those of speed, which come last; each is measured or found on disk."""
    load: Callable[[], Any] = cache(smollm2)
    found: dict[tuple[str, float, str], dict[str, Any]] = {}
    speed: dict[tuple[float, str, str], Any] = {}
    sizes = {"blocks": args.num_samples, "length": args.length, "eval_tokens": args.eval_tokens, "seed": args.seed}
    known = read_sources(args, args.domains)
    domains = {name: DepthDomain(args.peers, load, args, name, targets=("mlp", "attention")) for name in args.domains}
    for name, domain in domains.items():
        base = rows.get_or_measure({"domain": name, **sizes}, domain.measure_dense)
        found[name, 0.0, ""] = {**base, "sources": sources_of(base, known[name])}
        wanted = [*product(METHODS, args.shares if name == args.compared else args.others)]
        wanted += [(WIDTHS, share) for share in args.narrower if name == args.compared]
        for method, share in wanted:
            key = {"domain": name, "share": share, "method": method, **sizes}
            found[name, share, method] = rows.get_or_measure(key, partial(score, domain, method, share, base))
        domain.forget()
    timed_sizes = [*product(args.shares, OWN), *((share, WIDTHS) for share in args.narrower)]
    for (share, method), runtime in product(timed_sizes, RUNTIMES):
        key = {"share": share, "method": method, "runtime": runtime, **sizes}
        timed = partial(measure_speed, domains[args.compared], method, share, runtime)
        speed[share, method, runtime] = rows.get_or_measure(key, timed)
    return found, speed


def gains(row: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return how many times as fast the smaller model decodes and reads a prompt, by turn."""
    return [turn[1] / turn[3] for turn in row["rounds"]], [turn[0] / turn[2] for turn in row["rounds"]]


def change(found: Found, name: str, share: float, method: str, seed: int) -> Any:
    """Return the relative change of bits per byte."""
    base = found[name, 0.0, ""]
    return mean_change(base["nll"], found[name, share, method]["nll"], base["sources"], seed)


def loss_table(found: Found, args: argparse.Namespace) -> str:
    """Return the table of losses."""
    body = []
    for name, share, method in product(args.domains, sorted({*args.shares, *args.others, *args.narrower}), METHODS):
        if (name, share, method) not in found:
            continue
        row, base = found[name, share, method], found[name, 0.0, ""]
        if "attentions" in row:
            what = f"{row['attentions']} attentions, {row['mlps']} MLPs"
        else:
            what = f"layers {', '.join(map(str, row['gone']))}" if row["gone"] else "no layer"
        smaller = 1 - row["parameters"] / base["parameters"]
        cells = [format_change(change(found, name, share, method, args.seed)), f"{smaller:.1%}", what]
        body.append([name, f"{share:.0%}", LABELS.get(method, method), *cells, f"{row['prune_seconds']:,.0f}"])
    return table(["text", "of layers", "method", "bits per byte", "parameters gone", "removed", "seconds"], body)


def speed_table(found: Found, speed: Mapping[tuple[float, str, str], Any], args: argparse.Namespace) -> str:
    """Return the table of speed beside the loss."""
    body = []
    for (share, method, runtime), row in speed.items():
        decode, prefill = gains(row)
        cells = [spread(decode), spread(prefill), format_change(change(found, args.compared, share, method, args.seed))]
        body.append([f"{share:.0%}", method, runtime, str(len(decode)), *cells])
    return table(["of layers", "method", "runtime", "turns", "decode gain", "prefill gain", "bits per byte"], body)


def verdicts(found: Found, speed: Mapping[tuple[float, str, str], Any], args: argparse.Namespace) -> str:
    """Return, for each runtime and size, the loss of layers beside that of widths that decode as fast."""
    lines = []
    for runtime in RUNTIMES:
        line = [
            (float(np.median(gains(speed[share, WIDTHS, runtime])[0])), value.value)
            for share in (*args.shares, *args.narrower)
            for value in [change(found, args.compared, share, WIDTHS, args.seed)]
        ]
        line = sorted([(1.0, 0.0), *line])
        for share in args.shares:
            for method in (WHOLE, BOTH, HALF):
                fast = float(np.median(gains(speed[share, method, runtime])[0]))
                own = change(found, args.compared, share, method, args.seed).value
                if fast > line[-1][0]:
                    beside = f"faster than any of the narrower models ({line[-1][0]:.2f}, {line[-1][1]:+.1%})"
                else:
                    as_fast = float(np.interp(fast, *zip(*line, strict=True)))
                    beside = f"{as_fast:+.1%} by widths that decode as fast (on the line between their sizes)"
                lines.append(f"- {runtime}, {share:.0%}, {method}: {fast:.2f} times as fast, {own:+.1%}; {beside}")
    return "\n".join(lines)


def results_text(
    found: Found, speed: Mapping[tuple[float, str, str], Any], rows: Rows, args: argparse.Namespace
) -> str:
    """Return the section of RESULTS.md."""
    used = [*found.values(), *speed.values()]
    calls = sorted({row["call"] for row in found.values() if "call" in row})
    named = "; ".join(call.partition("; ")[0] for call in calls)
    deviations = "; ".join(sorted({call.partition("; ")[2] for call in calls}))
    return f"""## Whole layers

SmolLM2-135M-Instruct (float32, dequantised): a share of the parameters of its 30 layers removed as whole layers
(`num_layers`), as neurons and KV groups (`units="neurons,kv_groups"`), as both by one budget (`units=...,layers`), or half of
the share as layers and the rest as neurons and KV groups (`num_layers` beside `target_params`);
calibrated on {args.num_samples} x {args.length} tokens, without refit of the head's rows and without training. Peers by their own code (in the
repository of 2SSP, commit 88ab660) on the same calibration samples; none of them repairs anything. *{PATCH.capitalize()}*: the
layers of the window replaced by one matrix, by least squares on the hidden states around them. Change of bits per byte on
windows of {len(next(iter(found.values()))["nll"])} and more documents of the validation split; 95 % intervals draw sources, then documents; ranges over sources
where there are fewer than five. Seconds: of pruning alone, on one of two busy cores; what an earlier row found out (widths,
the order of the layers, BlockPruner's perplexities) is not measured twice.

{loss_table(found, args)}

### At equal speed

The base model and a smaller one take turns: context of {args.context} tokens, batch {BATCH}. How many times as fast, median and range over
the turns, on {args.compared}.

{speed_table(found, speed, args)}

{verdicts(found, speed, args)}

Calls: {named}. Deviations: {deviations}.

`python -m benchmarks.depth --data DATA{args.given}` at {describe_runs(used)}, seed {args.seed}. Highest load average: {highest_load(used)}.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of a run."""
    options = parser(__doc__ or "", several=True)
    options.add_argument("--quick", action="store_true", help="one domain, one size, little text")
    options.add_argument("--peers", type=Path, required=True, help="folder with a checkout of 2SSP")
    options.add_argument("--compared", default="medicine", help="domain with all sizes, and with speed")
    options.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2, 0.3], help="sizes there")
    options.add_argument("--others", nargs="+", type=float, default=[0.2], help="sizes in the other domains")
    options.add_argument(
        "--narrower", nargs="*", type=float, default=[0.4, 0.5], help="sizes of widths alone, which decode as fast"
    )
    options.add_argument("--num-samples", type=int, default=64, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=24_000, help="at most this many test tokens per domain")
    options.add_argument("--context", type=int, default=512, help="tokens before the first timed step")
    options.add_argument("--new-tokens", type=int, default=32, help="decode steps in a timed turn")
    options.add_argument("--rounds", type=int, default=5, help="timed turns")
    if "--quick" in arguments:
        options.set_defaults(domains=["medicine"], shares=[0.2], narrower=[0.3], num_samples=32, eval_tokens=12_000)
    return parse_compared(options, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    rows = Rows(args, "depth", seed=args.seed)
    write_section("depth_quick" if args.quick else "depth", results_text(*measure_all(rows, args), rows, args))


if __name__ == "__main__":
    main()
