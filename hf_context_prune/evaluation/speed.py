"""Speed, memory and size of models, measured so that two models can be compared."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.utils import tqdm

from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.modeling.generation import draw_prompt, fit_prompt, hardware_name, time_generation
from hf_context_prune.modeling.inference import dtype_name, max_positions, vocabulary_rows
from hf_context_prune.utils.child_processes import child_environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORKER = "hf_context_prune.evaluation._memory_worker"
_STDERR_TAIL = 2000
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 512, 32, 5
"""What is timed by default: the length of the prompt, the steps after it, and the rounds."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class SpeedMeasurement:
    """Speed of one model, measured in rounds interleaved with those of the other models of the same call.

    Attributes:
        prefill_rounds: Prompt tokens per second (all sequences of the batch), one value per round.
        decode_rounds: Generated tokens per second (all sequences of the batch), one value per round.
        prefill: Median and quartiles of `prefill_rounds`.
        decode: Median and quartiles of `decode_rounds`.
        prompt_tokens: Length of the prompt, after capping it to the models' positions.
        new_tokens: Decode steps per round, with the KV cache.
        batch_size: Sequences per batch.
        dtype: Dtype of the weights.
        threads: Intra-op threads of torch.
        device: Device type, such as "cpu".
        hardware: Name of the processor or accelerator.
    """

    prefill_rounds: tuple[float, ...]
    decode_rounds: tuple[float, ...]
    prefill: Spread
    decode: Spread
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    dtype: str
    threads: int
    device: str
    hardware: str


@dataclass(frozen=True)
class SpeedRatio:
    """Speed of the pruned model over that of its base, from the ratios of the paired rounds (above 1: faster)."""

    prefill: Spread
    decode: Spread


@dataclass(frozen=True)
class MemoryMeasurement:
    """Memory of a fresh process that loads a model and uses it.

    Attributes:
        baseline_rss: Resident bytes after the imports, before loading.
        peak_rss: Highest resident bytes of the whole run.
        load_seconds: Time to load the model.
        prompt_tokens: Length of the prompt, after capping it to the model's positions.
        new_tokens: Decode steps.
        dtype: Dtype of the loaded weights.
        method: Source of the peak: "VmHWM" (Linux), "ru_maxrss" (other Unix) or "peak_wset" (Windows).
    """

    baseline_rss: int
    peak_rss: int
    load_seconds: float
    prompt_tokens: int
    new_tokens: int
    dtype: str
    method: str


def measure_speed(
    models: "Mapping[str, PreTrainedModel]",
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, SpeedMeasurement]:
    """Measure prefill and greedy decoding of several models in turns, so that drift of the machine affects all alike.

    Every model runs once to warm up, then once per round; the order of the models alternates from round to round. All
    models read the same random prompt, cut to the shortest `max_position_embeddings` less `new_tokens`.

    Args:
        models: Name to causal LM, each on its device.
        prompt_tokens: Length of the prompt.
        new_tokens: Decode steps after the prompt.
        repeats: Rounds.
        batch_size: Sequences per batch.
        seed: Seed of the prompt.

    Returns:
        One measurement per model, in the order of `models`.

    Raises:
        ConfigError: There is no model, a number is below 1, or `new_tokens` leaves no room for a prompt.
        UnsupportedArchitectureError: The `forward` of a model takes no KV cache.
    """
    if not models:
        raise ConfigError("models is empty; give at least one model to measure.")
    if repeats < 1 or batch_size < 1:
        raise ConfigError(f"repeats is {repeats} and batch_size is {batch_size}; both must be at least 1.")
    prompt_tokens = fit_prompt(map(max_positions, models.values()), prompt_tokens, new_tokens)
    prompt = draw_prompt(min(map(vocabulary_rows, models.values())), batch_size, prompt_tokens, seed)

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with tqdm(total=len(models) * (repeats + 1), desc="Timing", name="hf_context_prune.evaluation") as progress:
        for turn in range(repeats + 1):
            for name in list(models) if turn % 2 == 0 else reversed(list(models)):
                timing = time_generation(models[name], prompt, new_tokens)
                if turn > 0:  # turn 0 warms up
                    seconds[name].append(timing)
                progress.update()
    return {
        name: _speed_measurement(models[name], timings, prompt_tokens, new_tokens, batch_size)
        for name, timings in seconds.items()
    }


def speed_ratio(base: SpeedMeasurement, pruned: SpeedMeasurement) -> SpeedRatio:
    """Compare two measurements of one `measure_speed` call, round by round.

    Raises:
        ConfigError: They were measured in different settings.
    """
    for name in ("prompt_tokens", "new_tokens", "batch_size", "threads", "device", "hardware"):
        before, after = getattr(base, name), getattr(pruned, name)
        if before != after:
            raise ConfigError(
                f"{name} is {before!r} for the base and {after!r} for the pruned model; measure both alike."
            )
    if len(base.decode_rounds) != len(pruned.decode_rounds):
        raise ConfigError(
            f"The base has {len(base.decode_rounds)} rounds and the pruned model {len(pruned.decode_rounds)}: rounds "
            "can't be paired. Measure both in one call of measure_speed()."
        )
    return SpeedRatio(
        prefill=_spread([a / b for b, a in zip(base.prefill_rounds, pruned.prefill_rounds, strict=True)]),
        decode=_spread([a / b for b, a in zip(base.decode_rounds, pruned.decode_rounds, strict=True)]),
    )


def measure_peak_memory(
    folder: str | os.PathLike[str],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 16,
    trust_remote_code: bool = False,
    timeout_seconds: float = 600.0,
) -> MemoryMeasurement:
    """Load the model of `folder` in a fresh process, run one prefill and some decode steps, and return its peak RSS.

    Args:
        folder: Local model folder with safetensors weights.
        prompt_tokens: Length of the prompt, cut to the model's positions less `new_tokens`.
        new_tokens: Decode steps.
        trust_remote_code: Whether the process may run code from the folder. The classes of this package never need it.
        timeout_seconds: Time limit of the whole process.

    Raises:
        ConfigError: A length is below 1.
        LoadError: `folder` is no model folder, or the process fails or takes too long; the message ends with the tail
            of its stderr.
    """
    if prompt_tokens < 1 or new_tokens < 1:
        raise ConfigError(f"prompt_tokens is {prompt_tokens} and new_tokens {new_tokens}; both must be at least 1.")
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise LoadError(f"{str(folder)!r} is not a model folder: it holds no config.json. Give a saved model's folder.")
    # -P with the parent's own sys.path: the child imports what the parent would, and nothing from the current folder.
    command = [sys.executable, "-P", "-m", _WORKER, str(folder.resolve())]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    command += ["--threads", str(torch.get_num_threads())]
    if trust_remote_code:
        command.append("--trust-remote-code")
    try:
        done = subprocess.run(
            command,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadError(
            f"Measuring the memory of {str(folder)!r} took longer than timeout_seconds={timeout_seconds:g}. Allow more "
            f"time or use fewer tokens.{_tail(error.stderr)}"
        ) from error
    if done.returncode != 0:
        raise LoadError(
            f"Measuring the memory of {str(folder)!r} failed with exit status {done.returncode}.{_tail(done.stderr)}"
        )
    try:
        # The last line only: code from the folder may have printed before.
        return MemoryMeasurement(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError) as error:
        raise LoadError(
            f"Measuring the memory of {str(folder)!r} gave no result but {done.stdout[-200:]!r}.{_tail(done.stderr)}"
        ) from error


def _speed_measurement(
    model: "PreTrainedModel",
    timings: Sequence[tuple[float, float]],
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
) -> SpeedMeasurement:
    prefill = tuple(batch_size * prompt_tokens / seconds for seconds, _ in timings)
    decode = tuple(batch_size * new_tokens / seconds for _, seconds in timings)
    return SpeedMeasurement(
        prefill_rounds=prefill,
        decode_rounds=decode,
        prefill=_spread(prefill),
        decode=_spread(decode),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        dtype=dtype_name(model),
        threads=torch.get_num_threads(),
        device=model.device.type,
        hardware=hardware_name(model.device),
    )


def _spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3)


def _tail(stderr: str | bytes | None) -> str:
    text = stderr.decode("utf-8", "replace") if isinstance(stderr, bytes) else stderr or ""
    return f" Its stderr ends with:\n{text.strip()[-_STDERR_TAIL:]}" if text.strip() else ""
