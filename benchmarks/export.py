"""Size, loss and speed of SmolLM2 with 30 % of its parameters pruned, in every export runtime, beside the base model.

python -m benchmarks.export --data PATH/TO/data [--uniform FOLDER --variable FOLDER]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Rows, corpus, highest_load, parser, table, write_section
from benchmarks.models import smollm2
from hf_context_prune.config import PrunerConfig
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.export.run import open_export
from hf_context_prune.export.runtime import TorchRuntime
from hf_context_prune.pipelines.export import export_model
from hf_context_prune.pipelines.prune import prune
from hf_context_prune.storage.loading import load_model
from hf_context_prune.storage.saving import count_weight_bytes

EXPORTS = (
    ("quanto", "int8"),
    ("quanto", "int4"),
    ("torchao", "int8"),
    ("onnx", "float32"),
    ("onnx", "int8"),
    ("gguf", "f16"),
    ("gguf", "q8_0"),
)
BASE_EXPORTS = (("gguf", "f16"), ("gguf", "q8_0"))
KINDS = ("base", "uniform", "variable")
BASE = "dense in transformers"
"""Key of the base model's speed in the rows."""
ROW_NAMES = {"base": "dense", "uniform": "stock"}
"""Kinds that the rows on disk name otherwise."""
ANY = 1e6  # every result is shown, however large the difference


def make_folder(kind: str, given: Path | None, options: argparse.Namespace, scratch: Path) -> Path:
    """Return the given folder, or prune one now."""
    if given is not None:
        return given
    config = PrunerConfig(
        pruning_ratio=0.3,
        vocab_size=16_384,
        allocation="adaptive" if kind == "variable" else "uniform",
        native_architecture=kind == "uniform",
        num_calibration_samples=options.num_samples,
        pruning_seed=options.seed,
    )
    quick = EvalOptions(max_tokens=options.tokens, benchmark=False, memory=False)
    result = prune(
        smollm2(), corpus(options, "train"), config, eval_data=corpus(options, "validation"), eval_options=quick
    )
    return result.save_pretrained(scratch / kind)


def measure(folder: Path, exports: tuple[tuple[str, str], ...], options: argparse.Namespace) -> dict[str, Any]:
    """Export a folder to every format, then time all exports in turns."""
    text = options.data / options.domain / "corpus.validation.jsonl.gz"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as open_until_timed:
        loaded = load_model(folder, device="cpu")
        # The base model takes turns with the exports of every folder, because the machine may be busier an hour later.
        runtimes: dict[str, Any] = {BASE: TorchRuntime(smollm2().model), "transformers": TorchRuntime(loaded.model)}
        for format, weights in exports:
            name = f"{format} {weights}"
            result = export_model(
                folder,
                Path(scratch, name.replace(" ", "-")),
                format=format,
                dtype=weights,
                data=text,
                max_tokens=options.tokens,
                tolerance=ANY,
                seed=options.seed,
            )
            report = result.report.to_dict()
            found[name] = {key: report[key] for key in ("packages", "verification")}
            runtimes[name] = open_until_timed.enter_context(closing(open_export(result.folder)))
        prompt = loaded.tokenizer("The", add_special_tokens=False)["input_ids"][:1] * 16
        speeds: dict[str, list[float]] = {name: [] for name in runtimes}
        for turn in range(options.rounds + 1):
            for name, runtime in runtimes.items():
                seconds = runtime.time_generation([prompt], options.new_tokens)[1]
                if turn:  # the first turn warms up
                    speeds[name].append(options.new_tokens / seconds)
    return {"exports": found, "speeds": speeds, "bytes": count_weight_bytes(folder)}


def lines_of(kind: str, row: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table: the folder itself, then its exports."""
    middle = {name: statistics.median(values) for name, values in row["speeds"].items()}
    base_speed = middle[BASE]

    def line(name: str, size: int, bits: str, change: str, equal: str) -> list[str]:
        speed = middle[name]
        return [
            f"{kind}: {name}",
            f"{size / 1e6:.1f}",
            bits,
            change,
            equal,
            f"{speed:.1f}",
            f"{speed / base_speed:.2f}",
        ]

    checks = {name: entry["verification"] for name, entry in row["exports"].items()}
    before = next(iter(checks.values()))["bits_per_byte_before"]
    lines = [line("transformers", row["bytes"], f"{before:.4f}", "", "")]
    for name, check in checks.items():
        change = check["bits_per_byte_after"] / check["bits_per_byte_before"] - 1
        equal = f"{check['equal_texts']} of {check['prompts']}"
        lines.append(line(name, check["bytes_after"], f"{check['bits_per_byte_after']:.4f}", f"{change:+.2%}", equal))
    return lines


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--uniform", type=Path, help="a pruned folder with uniform widths; by default one is made")
    options.add_argument("--variable", type=Path, help="a pruned folder with variable widths; by default one is made")
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="rows of the table")
    options.add_argument(
        "--num-samples", type=int, default=64, help="calibration samples of 512 tokens, if a folder is made"
    )
    options.add_argument("--tokens", type=int, default=2000, help="test tokens to compare on")
    options.add_argument("--new-tokens", type=int, default=48, help="tokens to decode in a timed turn")
    options.add_argument("--rounds", type=int, default=5, help="timed turns of each runtime")
    args = options.parse_args(arguments)
    rows = Rows(args, "export", seed=args.seed, tokens=args.tokens, new_tokens=args.new_tokens, rounds=args.rounds)
    with tempfile.TemporaryDirectory() as scratch:

        def of(kind: str) -> dict[str, Any]:
            if kind == "base":
                folder = smollm2().folder
                assert folder is not None
                return measure(folder, BASE_EXPORTS, args)
            return measure(make_folder(kind, getattr(args, kind), args, Path(scratch)), EXPORTS, args)

        found = {
            kind: rows.get_or_measure(
                {"folder": ROW_NAMES.get(kind, kind), "domain": args.domain}, functools.partial(of, kind)
            )
            for kind in args.kinds
        }
    header = ["", "MB", "bits per byte", "change by export", "equal texts", "tokens/s", "x base in transformers"]
    packages = {
        name: version
        for row in found.values()
        for e in row["exports"].values()
        for name, version in e["packages"].items()
    }
    first = next(iter(found.values()))
    tokens = next(iter(first["exports"].values()))["verification"]["num_tokens"]
    write_section(
        "export",
        f"""## Exports

SmolLM2-135M-Instruct (float32, dequantised), the base model and two models with 30 % of its parameters removed (vocabulary
of 16,384 entries, then MLP neurons; uniform: the same width in every layer, variable: adaptive widths), in every runtime of
`hf-context-prune export`. Bits per byte on about {tokens:,} test tokens of `{args.domain}` (a check of the export; too little text to judge
the pruning); greedy texts of 32 tokens against those of the folder; {args.new_tokens} decode steps of one sequence by the runtime's own clock, median of
{args.rounds} rounds in which the runtimes of a folder and the base model take turns. Highest load average after a row:
{highest_load(found.values())} (above 1 per core, speeds mean little: run again on a quiet machine).

{table(header, [line for kind, row in found.items() for line in lines_of(kind, row)])}

{", ".join(f"{name} {version}" for name, version in sorted(packages.items()))}.

`python -m benchmarks.export --data DATA` at `{first["setting"]["commit"]}`, {first["setting"]["machine"]}, seed {args.seed}.
""",
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
