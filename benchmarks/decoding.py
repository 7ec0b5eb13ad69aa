"""Speed gained for bytes removed, in every runtime: a model beside its pruned forms, in turns, timed by the runtime itself.

python -m benchmarks.decoding --data PATH/TO/data
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Rows, describe_runs, given, highest_load, parser, table, write_section
from benchmarks.models import smollm2
from benchmarks.speed import plan_of
from hf_context_prune.export import gguf
from hf_context_prune.export.formats import format_of
from hf_context_prune.export.llama_cpp import LlamaCppRuntime
from hf_context_prune.export.runtime import TorchRuntime
from hf_context_prune.modeling.geometry import LayerWidths
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.pruning.vocabulary.prune import prune_vocabulary
from hf_context_prune.storage.loading import LoadedModel

REMOVED = 0.3
VOCABULARY = 16_384
RUNTIMES = ("transformers float32", "onnx float32", "onnx int8", "gguf f16", "gguf q8_0")
MOST_TOKENS = {"onnx": 8_192}
"""Largest context times batch: an ONNX graph computes the logits of all its tokens, 16,384 of which take over 24 GB."""
CASES = ("uniform:1", "uniform:8", "uniform:32", "uniform:64", "variable:1", "variable:32")


def large() -> LoadedModel:
    """Return a random Llama of 1.07 billion parameters, with the tokenizer of SmolLM2: speed asks for shapes alone."""
    torch.manual_seed(0)
    small = smollm2()
    config = LlamaConfig(
        vocab_size=small.model.config.vocab_size,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=small.model.config.eos_token_id,
    )
    return LoadedModel(LlamaForCausalLM(config).eval(), small.tokenizer, "random 1B", None, None)


MODELS: dict[str, Callable[[], LoadedModel]] = {"smollm2-135m": smollm2, "random-1b": large}


class Forms:
    """The base model and its pruned forms: fewer tokens, then narrower MLPs, cut without calibration."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self._base = functools.cache(MODELS[name])
        self._text = options.data / options.domain / "corpus.validation.jsonl.gz"

    @functools.cached_property
    def _trimmed(self) -> LoadedModel:
        base = self._base()
        size: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_to_multiple_of": 8}
        found = prune_vocabulary(base.model, base.tokenizer, self._text, criterion="frequency", refit=False, **size)
        return LoadedModel(found.model, found.tokenizer, "trimmed", None, None)

    def make(self, case: str) -> LoadedModel:
        """Return ``"base"``, or the model of a case such as ``"variable:32"`` (widths of the layers: multiple)."""
        if case == "base":
            return self._base()
        kind, _, multiple = case.partition(":")
        trimmed = self._trimmed
        plan = plan_of(trimmed.model, self._widths(kind, int(multiple)))
        return LoadedModel(apply_plan(trimmed.model, plan), trimmed.tokenizer, case, None, None)

    def _widths(self, kind: str, multiple: int) -> list[LayerWidths]:
        """Return MLP widths that remove the share of all parameters that the tokens leave."""
        view = ModelView.of(self._trimmed.model)
        dense = view.widths
        surplus = view.num_parameters - (1 - REMOVED) * self._base().model.num_parameters()
        mean = dense[0].neurons - surplus / (3 * view.geometry.hidden_size) / len(dense)  # gate, up and down
        draw = random.Random(0)
        drawn = [draw.uniform(0.4, 1.0) if kind == "variable" else 1.0 for _ in dense]
        wanted = [mean * value * len(drawn) / sum(drawn) for value in drawn]
        return [
            LayerWidths(min(layer.neurons, max(multiple, round(width / multiple) * multiple)), layer.kv_groups)
            for layer, width in zip(dense, wanted, strict=True)
        ]


class Artefact:
    """A model in one runtime: its file if it has one, its bytes, and the multiplications that a prompt takes."""

    def __init__(self, runtime: str, loaded: LoadedModel, folder: Path) -> None:
        self.format, _, dtype = runtime.partition(" ")
        self.folder = folder
        self.model = loaded.model if self.format == "transformers" else None
        view = ModelView.of(loaded.model)
        self.vocabulary = loaded.model.config.vocab_size
        self._head = loaded.model.get_input_embeddings().weight.numel()
        self._projections = view.num_parameters - self._head
        features = sum(layer.kv_groups for layer in view.widths) * view.geometry.head_dim
        self._cache_bytes = 2 * features * (2 if self.format == "gguf" else 4)
        self._query_features = features * view.geometry.queries_per_group
        self._weights = sum(4 * parameter.numel() for parameter in loaded.model.parameters())
        if self.model is None:
            folder.mkdir()
            format_of(self.format).module().write(loaded, folder, dtype)
            self._weights = gguf_bytes(folder) if self.format == "gguf" else onnx_bytes(folder)

    def open(self, context: int, batch: int, new_tokens: int) -> Any:
        """Open the runtime, with room for a setting."""
        if self.model is not None:
            return TorchRuntime(self.model)
        if self.format == "gguf":
            file, positions = self.folder / gguf.FILE_NAME, context + new_tokens + 2
            threads = torch.get_num_threads()
            return LlamaCppRuntime(file, threads=threads, positions=positions, sequences=batch)
        return format_of(self.format).module().load(self.folder)

    def bytes_per_step(self, context: int, batch: int) -> int:
        """Return the bytes that a decode step reads at least once: all weights, and the caches of the batch."""
        return self._weights + batch * context * self._cache_bytes

    def work(self, context: int) -> int:
        """Return the multiplications of a prompt. An ONNX graph computes the logits of all its tokens."""
        attention = 2 * context**2 * self._query_features
        return context * self._projections + attention + self._head * (context if self.format == "onnx" else 1)


def gguf_bytes(folder: Path) -> int:
    """Return the bytes of the tensors of a GGUF file: all are read at each step, the tied embedding as the head."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(folder / gguf.FILE_NAME).tensors)


def onnx_bytes(folder: Path) -> int:
    """Return the bytes of the weights that a step reads whole, so without an embedding of which rows are gathered."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    whole = {name for node in graph.node if node.op_type != "Gather" for name in node.input}
    return sum(
        sum(int(entry.value) for entry in tensor.external_data if entry.key == "length") or len(tensor.raw_data)
        for tensor in graph.initializer
        if tensor.name in whole
    )


def compare(base: Artefact, pruned: Artefact, context: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time both in turns; the first turn warms up. Long and wide settings take fewer turns."""
    draw = torch.Generator().manual_seed(options.seed)
    prompts = torch.randint(min(base.vocabulary, pruned.vocabulary), (batch, context), generator=draw).tolist()
    turns = max(2, min(options.rounds, options.rounds * 512 // (context * batch)))
    rounds = []
    with ExitStack() as stack:
        opened = [
            stack.enter_context(closing(each.open(context, batch, options.new_tokens))) for each in (base, pruned)
        ]
        for turn in range(turns + 1):
            seconds: dict[int, tuple[float, float]] = {}
            for place in (0, 1) if turn % 2 else (1, 0):
                seconds[place] = opened[place].time_generation(prompts, options.new_tokens)
            if turn:
                rounds.append([*seconds[0], *seconds[1]])
    return {
        "rounds": rounds,
        "bytes": [each.bytes_per_step(context, batch) for each in (base, pruned)],
        "work": [each.work(context) for each in (base, pruned)],
        "new_tokens": options.new_tokens,
    }


def settings_of(runtime: str, case: str, options: argparse.Namespace) -> list[tuple[int, int]]:
    """Return the pairs of context and batch to measure a case at: all that fit for the chosen cases, else the first."""
    most = MOST_TOKENS.get(runtime.split()[0], math.inf)
    pairs = [pair for pair in itertools.product(options.contexts, options.batches) if math.prod(pair) <= most]
    return pairs if case in options.whole_grid else pairs[:1]


def measure_all(rows: Rows, options: argparse.Namespace) -> None:
    """Measure what has no row yet."""
    forms = Forms(options.model, options)
    for runtime in options.runtimes:
        with tempfile.TemporaryDirectory() as scratch:

            @functools.cache
            def build(case: str, runtime: str = runtime, scratch: str = scratch) -> Artefact:
                return Artefact(runtime, forms.make(case), Path(scratch, case.replace(":", "-")))

            def pair(case: str, setting: tuple[int, int], make: Callable[..., Artefact] = build) -> dict[str, Any]:
                return compare(make("base"), make(case), *setting, options)

            for case in options.cases:
                for setting in settings_of(runtime, case, options):
                    key = {"model": options.model, "runtime": runtime, "case": case}
                    key |= {"context": setting[0], "batch": setting[1]}
                    rows.get_or_measure(key, functools.partial(pair, case, setting))


def spread(values: Sequence[float]) -> str:
    """Return median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def byte_share(row: dict[str, Any]) -> float:
    """Return the gain in decode speed, median of the turns, as a share of the gain in bytes."""
    return statistics.median(each[1] / each[3] for each in row["rounds"]) * row["bytes"][1] / row["bytes"][0]


def verdict(rows: Sequence[dict[str, Any]], runtimes: Sequence[str]) -> str:
    """Return in words how much of the bytes each runtime hears."""
    shares = {name: [byte_share(row) for row in rows if row["key"]["runtime"] == name] for name in runtimes}
    found = "; ".join(f"{name} {spread(values)}" for name, values in shares.items() if values)
    return (
        f"Decode / bytes by runtime, median and range of its rows: {found} (goal: 0.9 in llama.cpp and ONNX Runtime)."
    )


def line_of(row: dict[str, Any]) -> list[str]:
    """Return a line of the table."""
    key, rounds = row["key"], row["rounds"]
    steps = row["new_tokens"]
    dense, pruned = (statistics.median(each[place] / steps for each in rounds) for place in (1, 3))
    byte_gain, work_gain = (row[name][0] / row[name][1] for name in ("bytes", "work"))
    decode, prefill = [each[1] / each[3] for each in rounds], [each[0] / each[2] for each in rounds]
    # ms = constant + bytes / bandwidth through both points
    constant = (pruned * row["bytes"][0] - dense * row["bytes"][1]) / (row["bytes"][0] - row["bytes"][1])
    return [
        f"{key['model']}: {key['runtime']}, {key['case'].replace(':', ' by ')}",
        f"{key['context']:,} x {key['batch']}",
        f"{1000 * dense:.1f}",
        f"{1000 * pruned:.1f}",
        f"{1000 * constant:.1f}",
        spread(decode),
        f"{byte_gain:.2f}",
        f"**{byte_share(row):.2f}**",
        spread(prefill),
        f"{work_gain:.2f}",
        f"{statistics.median(prefill) / work_gain:.2f}",
    ]


HEADER = (
    *("", "context x batch", "base ms", "pruned ms", "constant ms", "decode gain", "byte gain", "decode / bytes"),
    *("prefill gain", "work gain", "prefill / work"),
)


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--model", choices=MODELS, default="smollm2-135m", help="the base model")
    options.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), help="runtimes and dtypes")
    options.add_argument("--cases", nargs="+", default=list(CASES), help="widths of the layers: multiple of the widths")
    options.add_argument("--whole-grid", nargs="+", default=["uniform:32"], help="cases to measure at every setting")
    options.add_argument("--contexts", nargs="+", type=int, default=[512, 2048], help="tokens before the first step")
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="sequences decoded together")
    options.add_argument("--new-tokens", type=int, default=32, help="decode steps in a timed turn")
    options.add_argument("--rounds", type=int, default=5, help="timed turns at context 512, batch 1; fewer elsewhere")
    args = options.parse_args(arguments)
    rows = Rows(args, "decoding", seed=args.seed)
    measure_all(rows, args)
    write_section(
        "decoding",
        f"""## Speed for bytes

A model and its forms with {REMOVED:.0%} of all parameters removed (vocabulary of {VOCABULARY:,} entries, then MLP neurons; uniform
widths, or widths that vary from 0.4 to 1.0 times the widest; rounded to multiples of the number behind `by`), cut without
calibration: speed asks for shapes alone. Base and pruned model take turns; the times are the runtime's own (llama.cpp: as
it states them, without server, HTTP and tokenizer). Milliseconds of a decode step after the context, all sequences of the batch;
gains are base time / pruned time, median and range of the turns. Bytes: what a step reads at least once, all weights and
the caches of the batch. Work: multiplications of the prompt. Constant: the time left at zero bytes, by a line through both
models; it is what keeps decode / bytes below 1. ONNX Runtime takes at most {MOST_TOKENS["onnx"]:,} tokens of context times batch: its graph
computes the logits of all of them, which would take over 24 GB. `random-1b` has random weights (16 layers, hidden size 2,048). Highest load
average after a row: {highest_load(rows.rows)} (above 1 per core: run again on a quiet machine).

{verdict(rows.rows, args.runtimes)}

{table(HEADER, [line_of(row) for row in rows.rows])}

`python -m benchmarks.decoding --data DATA{given(options, args)}` at {describe_runs(rows.rows)}, seed {args.seed}.
""",
    )


if __name__ == "__main__":
    main()
