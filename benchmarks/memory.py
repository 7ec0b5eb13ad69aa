"""Measure what pruning takes of a model that is larger than the memory that it may have.

python -m benchmarks.memory --data PATH/TO/data                       # the shape of an 8B model, 16 GB on disk
python -m benchmarks.memory --data PATH/TO/data --shape 1b --searched --limit 3GiB
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import ROOT, Rows, corpus, given, parser, table, write_section
from benchmarks.models import smollm2
from hf_context_prune.config import PrunerConfig
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.modeling.in_turns import forward_in_turns
from hf_context_prune.pipelines.dry_run import dry_run
from hf_context_prune.pipelines.prune import prune_to_folder
from hf_context_prune.pruning.calibration.samples import CalibrationSet, batches_of
from hf_context_prune.pruning.sequential.layer_pruner import SequentialPruner
from hf_context_prune.storage.loading import load_model, load_pruned
from hf_context_prune.utils.memory import memory_limit, own_memory, parse_bytes

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
"""Sizes of Llama 3.1 8B and Llama 3.2 1B, and of a model for tests of this script."""
REMOVED = 0.2
_GROUPS = Path("/sys/fs/cgroup")


def write_checkpoint(folder: Path, shape: str, seed: int) -> None:
    """Write a checkpoint of random weights in bfloat16, a shard per layer, unless it is there."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPES[shape], dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[str]] = {}
    for name in dict(empty.named_parameters()):
        layer = name.split(".")[2] if ".layers." in name else name
        parts.setdefault(layer, []).append(name)
    index, shapes = {}, {name: value.shape for name, value in empty.named_parameters()}
    for number, names in enumerate(parts.values(), start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: _draw(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        print(f"Wrote {file}.", flush=True)
    config.save_pretrained(folder)
    smollm2().tokenizer.save_pretrained(folder)
    text = json.dumps({"metadata": {"total_size": 2 * empty.num_parameters()}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _draw(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def count_bytes(folder: Path) -> int:
    """Return the bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@contextmanager
def limited_group(limit: int) -> Iterator[Path | None]:
    """Make a control group that can't take more memory; None where this user may not."""
    for mount, name in ((_GROUPS / "memory", "memory.limit_in_bytes"), (_GROUPS, "memory.max")):
        group = mount / f"hf-context-prune-{secrets.token_hex(4)}"
        try:
            group.mkdir()
            (group / name).write_text(str(limit))
        except OSError:
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


def run_limited(arguments: Sequence[str], limit: int) -> dict[str, Any]:
    """Run this script in a fresh process that can't take more memory, and return the JSON of its last line."""
    with limited_group(limit) as group:

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        command = [sys.executable, "-m", "benchmarks.memory", *arguments]
        done = subprocess.run(command, cwd=ROOT.parent, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=enter)
    return json.loads(done.stdout.splitlines()[-1]) | {"held": group is not None}


class Watch:
    """Peak of the memory that no file backs, and bytes read from disk, while a block runs."""

    def __enter__(self) -> Watch:
        self.begin, self.read, self.peak = time.perf_counter(), psutil.Process().io_counters().read_bytes, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self.begin
        self.read = psutil.Process().io_counters().read_bytes - self.read

    def _sample(self) -> None:
        while not self._ended.wait(0.1):
            self.peak = max(self.peak, own_memory())

    def facts(self) -> dict[str, Any]:
        """Return seconds, peak and bytes read."""
        return {"seconds": round(self.seconds, 1), "peak": self.peak, "read": self.read}


def config_of(args: argparse.Namespace) -> PrunerConfig:
    """Return the config: uniform widths, or the default."""
    uniform = {} if args.searched else {"allocation": "uniform"}
    return PrunerConfig(
        pruning_ratio=REMOVED, num_calibration_samples=args.num_samples, max_seq_length=args.length, **uniform
    )


def run_dense(args: argparse.Namespace) -> dict[str, Any]:
    """Run the base model once over the calibration samples."""
    loaded = load_model(args.checkpoint)
    samples = CalibrationSet(corpus(args, "train"), config_of(args)).samples(loaded.tokenizer)
    with Watch() as watch, torch.inference_mode(), memory_limit(None):
        for _ in forward_in_turns(loaded.model, batches_of(samples), head=False):
            pass
    return watch.facts()


def run_prune(args: argparse.Namespace) -> dict[str, Any]:
    """Prune to a folder; `growth` is that of the memory from the first finished layer to the last."""
    held, walk = [], 0.0
    own = SequentialPruner.prune

    def watched(self: SequentialPruner, *given: Any) -> Any:
        nonlocal walk
        begin = time.perf_counter()
        found = own(self, *given)
        walk += time.perf_counter() - begin
        held.append(own_memory())
        return found

    SequentialPruner.prune = watched  # type: ignore[method-assign]
    config = config_of(args)
    planned = dry_run(args.checkpoint, config)
    options = EvalOptions(max_tokens=args.eval_tokens, benchmark=False, memory=False)
    with Watch() as watch:
        result = prune_to_folder(
            args.checkpoint,
            corpus(args, "train"),
            args.output,
            config,
            eval_data=corpus(args, "validation"),
            eval_options=options,
        )
    removed = 1 - result.model.num_parameters() / result.report.size.base_parameters
    growth = max(held, default=0) - (held[0] if held else 0)
    facts = {"growth": growth, "removed": removed, "walk": round(walk, 1), "class": type(result.model).__name__}
    predicted = {"seconds": round(sum(planned.seconds.values())), "memory": planned.needs.step_memory}
    return watch.facts() | facts | {"predicted": predicted}


def run_open(args: argparse.Namespace) -> dict[str, Any]:
    """Open the result, and score it."""
    with Watch() as watch, memory_limit(None):
        model = load_pruned(args.output)
        tokenizer = load_model(args.output).tokenizer
        losses = document_losses(model, tokenizer, corpus(args, "validation"), max_tokens=args.eval_tokens)
    return watch.facts() | {"nats": sum(one.nll for one in losses) / sum(one.num_tokens for one in losses)}


CHILDREN = {"dense": run_dense, "prune": run_prune, "open": run_open}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all steps, each in a fresh process under the limit."""
    folder = Path(args.work) / "models" / f"memory-{args.shape}"
    write_checkpoint(folder, args.shape, args.seed)
    output = folder.with_name(f"{folder.name}-pruned")
    shutil.rmtree(output, ignore_errors=True)
    options = ["--data", str(args.data), "--domain", args.domain, "--shape", args.shape, "--seed", str(args.seed)]
    for name in ("num_samples", "length", "eval_tokens"):
        options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    options += ["--searched"] if args.searched else []
    places = ["--checkpoint", str(folder), "--output", str(output)]
    limit = parse_bytes(args.limit)
    assert limit is not None
    row: dict[str, Any] = {"checkpoint": count_bytes(folder)}
    for step in CHILDREN:
        for path in folder.glob("*.safetensors"):  # each step reads it from the disk
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        row[step] = run_limited([*options, *places, "--child", step], limit)
    row["result"] = count_bytes(output)
    shutil.rmtree(output)
    return row


def results_text(row: dict[str, Any], args: argparse.Namespace) -> str:
    """Return the section of RESULTS.md."""
    gib, dense = 2**30, row["dense"]
    names = {
        "dense": "one forward pass over the calibration text",
        "prune": "prune",
        "open": "open the result and score it",
    }
    body = [
        [
            names[step],
            f"{row[step]['seconds']:,.0f}",
            f"{row[step]['seconds'] / dense['seconds']:.1f}",
            f"{row[step]['peak'] / gib:.2f}",
            f"{row[step]['read'] / row['checkpoint']:.1f}",
        ]
        for step in names
    ]
    header = ["step, in a process of its own", "seconds", "forward passes", "peak memory (GiB)", "checkpoints read"]
    walk, predicted = row["prune"]["walk"], row["prune"]["predicted"]
    body.insert(2, ["of these, the walk through the layers", f"{walk:,.0f}", f"{walk / dense['seconds']:.1f}", "", ""])
    how = "the default" if args.searched else "uniform widths"
    held = "a control group" if row["prune"]["held"] else "nothing (the peak shows what was taken)"
    return f"""## Memory of a large model ({args.shape}, {how})

A Llama of the {args.shape} shape with random weights in bfloat16, {row["checkpoint"] / 1e9:.1f} GB on disk; {row["prune"]["removed"]:.1%} of all
parameters removed ({how}), calibrated on {args.num_samples} x {args.length} tokens of {args.domain}, with evaluation of both models and the saved folder
({row["result"] / 1e9:.1f} GB). Limit: {args.limit}, held to by {held}. Peak memory is that which no file backs. From the first pruned layer
to the last it grew by {row["prune"]["growth"] / gib:.2f} GiB. Predicted before the work, without evaluation: {predicted["memory"] / gib:.2f} GiB for the largest
step beside what the process holds, and {predicted["seconds"]:,.0f} seconds.

{table(header, body)}

`python -m benchmarks.memory --data DATA{args.given}` at `{row["setting"]["commit"]}`, {row["setting"]["machine"]}, load {row["setting"]["load"]}, seed {args.seed}.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of a run."""
    options = parser(__doc__ or "")
    options.add_argument("--shape", choices=SHAPES, default="8b", help="sizes of the model")
    options.add_argument("--searched", action="store_true", help="search widths and tokens, as the default does")
    options.add_argument("--limit", default="8GiB", help="most memory of a process")
    options.add_argument("--num-samples", type=int, default=8, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=2_000, help="at most this many test tokens")
    options.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    options.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    args.given = given(options, args)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    if args.child:
        print(json.dumps(CHILDREN[args.child](args)))
        return
    names = ("shape", "searched", "limit", "num_samples", "length", "eval_tokens", "domain", "seed")
    row = Rows(args, "memory").get_or_measure({name: getattr(args, name) for name in names}, lambda: measure(args))
    write_section(f"memory_{args.shape}{'_searched' if args.searched else ''}", results_text(row, args))


if __name__ == "__main__":
    main()
