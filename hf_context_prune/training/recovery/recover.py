"""`recover()`: train a pruned model on text of its domain, all weights or low-rank adapters, and keep the best."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.data.documents import TextData, load_documents
from hf_context_prune.errors import ConfigError, NumericsError
from hf_context_prune.evaluation.perplexity import check_positions
from hf_context_prune.evaluation.validation import ValidationText
from hf_context_prune.modeling.architectures import check_supported
from hf_context_prune.modeling.offloaded import map_offloaded
from hf_context_prune.modeling.patching import bfloat16_layers
from hf_context_prune.modeling.specs import ArchSpec
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.storage.resume import has_room, resume_key
from hf_context_prune.training.progress import hide_progress_bars
from hf_context_prune.utils.distributed import num_processes

from .checkpoint import RecoveryCheckpoint, state_bytes, trainable_weights
from .config import RecoveryConfig
from .monitor import History, check_minutes
from .needs import check_memory
from .text import RecoveryText
from .training import train


@dataclass(frozen=True)
class RecoveryResult:
    """A recovered model and how it got there.

    Attributes:
        model: In evaluation mode; never worse on the validation text than the given model.
        history: Steps, tokens, time and losses.
    """

    model: PreTrainedModel
    history: History


def measure_validation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, validation: ValidationText) -> float:
    """Return the loss of a model on validation text in bits per byte, in bfloat16 where that is faster."""
    with bfloat16_layers(model), hide_progress_bars("hf_context_prune.evaluation"):
        return validation.bits_per_byte(model, tokenizer)


@contextmanager
def _keep_random_state() -> Iterator[None]:
    """Leave the caller's random numbers as they are: the Trainer seeds all of them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@_keep_random_state()
def recover(
    model: PreTrainedModel,
    data: TextData,
    config: RecoveryConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str | None = None,
    general_data: TextData | None = None,
    general_data_ratio: float = 0.0,
    balance_sources: bool = False,
    resume_dir: Path | None = None,
) -> RecoveryResult:
    """Train a pruned model on text of its domain.

    A tenth of the documents is held out as validation text: its loss decides which weights are kept, and when to stop.
    Reported figures need test text of their own.

    With a `resume_dir`, the state of the training (weights, optimizer, learning rate, random numbers, step, used
    seconds) is kept there whenever the validation text was measured, and the same call goes on from the last one: to
    the same bits where steps or passes over the text end the training. With `max_minutes` the used time counts on, and
    the end depends on the clock, as in a training without a break.

    Args:
        model: The pruned model; left unchanged.
        data: Text of the domain: whatever [`load_documents`][] reads.
        config: All choices.
        tokenizer: The model's.
        text_column: Column with the text.
        general_data: General text to train on as well, as `data`; it does not choose weights.
        general_data_ratio: Share of the samples to take from it, in [0, 1); see `RecoveryText.samples`.
        balance_sources: Train on as much text of every source of `data`; see `RecoveryText.samples`.
        resume_dir: An existing folder for the state of the training; the caller removes it. None keeps nothing.

    Returns:
        The recovered model, in evaluation mode, and the history of the training: `result.model`, `result.history`.

    Raises:
        ConfigError: An argument of another type, nothing to train, several processes, a GPU that is not the first,
            too little memory, or a time limit that leaves no time to train.
        DataError: Too little text.
        SaveError: The state of the training can't be kept.
        ContextPruneError: See `hf_context_prune.errors`.

    Example:
        ```python
        from hf_context_prune import RecoveryConfig, load_model, recover

        mini = load_model("mini-gpt")
        result = recover(mini.model, "contracts.jsonl", RecoveryConfig(max_minutes=10), tokenizer=mini.tokenizer)
        print(result.history.tokens, result.history.best_step)
        ```
    """
    start = time.monotonic()
    config = config or RecoveryConfig()
    model = map_offloaded(model)
    spec = check_supported(model)
    check_recoverable(model, config)
    check_memory(model, config)
    if not callable(tokenizer):
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}; it must be the model's tokenizer.")
    check_weights_finite(model)
    source = load_documents(data, text_column=text_column, tokenizer=tokenizer, seed=config.recovery_seed)
    general = None
    if general_data is not None:
        general = load_documents(general_data, tokenizer=tokenizer, seed=config.recovery_seed)
    config.warn_of_unused_options()
    text = RecoveryText.of(source, tokenizer, config, general, general_data_ratio, balance_sources=balance_sources)
    samples, validation = text.samples(tokenizer, config), text.validation

    student = copy_without_hooks(model)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    cast_parameters(student.train(), torch.float32)  # half precision loses small updates
    adapters = _add_adapters(student, config, spec, frozen) if config.method == "lora" else None

    checkpoint, needed = None, state_bytes(sum(weight.numel() for _, weight in trainable_weights(student)))
    if resume_dir is not None and has_room(resume_dir, needed, what="The state of the training"):
        decided_by = config.to_dict(), validation.text.fingerprint, sorted(frozen)
        checkpoint = RecoveryCheckpoint(resume_dir, resume_key(model, [{"input_ids": samples}], *decided_by))

    def measure(candidate: PreTrainedModel) -> float:
        return measure_validation(candidate, tokenizer, validation)

    rounds = set(dtypes.values()) != {torch.float32}
    begin = time.monotonic()
    given = measure(copy_without_hooks(model).eval()) if rounds else math.inf  # in its own precision
    reserve = time.monotonic() - begin
    history = train(
        student,
        samples,
        config,
        measure=lambda: measure(student),
        start=start,
        reserve=reserve,
        checkpoint=checkpoint,
    )

    result = student if adapters is None else _merge_adapters(adapters)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(name not in frozen)
        parameter.data = parameter.data.to(dtypes[name])
    result.eval()
    if rounds and history.best_step > 0 and not _is_below(given, measure, result):
        # Rounding took what the training gave.
        history.best_step, result = 0, copy_without_hooks(model).eval()
    return RecoveryResult(result, history)


def check_recoverable(model: PreTrainedModel, config: object) -> None:
    """Refuse, before anything is measured, what can't be trained.

    Raises:
        ConfigError: A config of another type, a model without a weight to train, several processes, or a GPU that is
            not the first.
    """
    if not isinstance(config, RecoveryConfig):
        raise ConfigError(f"config is a {type(config).__name__}; it must be a RecoveryConfig.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "No weight of the model requires a gradient. Call requires_grad_(True) on the weights to train."
        )
    check_single_device(model)


def check_recovery_time(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: RecoveryText, config: RecoveryConfig
) -> None:
    """Refuse, before the model is pruned, samples that are too long for it, and a time limit that is too short.

    Args:
        model: The base model, which is slower than what is left of it.
        tokenizer: Its tokenizer.
        text: The text of the recovery.
        config: All choices.

    Raises:
        ConfigError: The model has fewer positions than a sample has tokens, or `max_minutes` is not longer than two
            measurements of the validation text with this model: one before and one after the training.
    """
    check_positions(model, config.max_seq_length)
    if config.max_minutes is not None:
        begin = time.monotonic()
        measure_validation(model, tokenizer, text.validation)
        seconds = 2 * (time.monotonic() - begin)
        check_minutes(config, seconds, "measuring the validation text before and after the training takes")


def check_single_device(model: PreTrainedModel) -> None:
    """Refuse several processes, and a GPU that is not the first, which is the one that a Trainer takes.

    Raises:
        ConfigError: Says how to train instead.
    """
    if num_processes() > 1:
        raise ConfigError(
            f"recover trains in one process, but there are {num_processes()}. Start it without a launcher; to train in "
            f"several processes, give the pruned folder to a Trainer."
        )
    if model.device.type == "cuda" and model.device.index:
        raise ConfigError(
            f"The model is on {model.device}, but recover trains on the first GPU. Choose the GPU by the environment, "
            f"CUDA_VISIBLE_DEVICES={model.device.index}, and leave the device out."
        )


def copy_without_hooks(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model, with its class's forward.

    A forward that was set on the model (by a Trainer's autocast, or TRL) would still run the original.
    """
    copied: PreTrainedModel = copy.deepcopy(model)
    vars(copied).pop("forward", None)
    return copied


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights alone: computed buffers (rotary tables) keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _add_adapters(model: PreTrainedModel, config: RecoveryConfig, spec: ArchSpec, frozen: set[str]) -> PeftModel:
    """Put low-rank adapters on all linear layers that are not frozen.

    Raises:
        ConfigError: Every linear layer is frozen.
    """
    torch.manual_seed(config.recovery_seed)
    options = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules="all-linear",
        exclude_modules=[name.removesuffix(".weight") for name in sorted(frozen)] or None,
        fan_in_fan_out=spec.transposed,
    )
    try:
        adapters = get_peft_model(model, options)
    except ValueError as error:
        if not frozen:
            raise
        raise ConfigError(
            "method='lora' finds no linear layer to adapt: all of them are frozen. Call requires_grad_(True) on some, "
            "or use method='full'."
        ) from error
    assert isinstance(adapters, PeftModel)
    return adapters


def _merge_adapters(adapters: PeftModel) -> PreTrainedModel:
    merged = adapters.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged


def _is_below(loss: float, measure: Callable[[PreTrainedModel], float], model: PreTrainedModel) -> bool:
    """Return whether a model's loss is a number below `loss`."""
    try:
        return measure(model) < loss
    except NumericsError:
        return False
