"""`recover()`: train a pruned model on text of its domain, all weights or low-rank adapters, and keep the best."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.data.documents import TextData, TextSource, load_documents
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.errors import ConfigError, DataError, NumericsError
from hf_context_prune.evaluation.validation import ValidationText
from hf_context_prune.modeling.architectures import check_supported
from hf_context_prune.modeling.patching import bfloat16_layers
from hf_context_prune.modeling.specs import ArchSpec
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.training.progress import hide_progress_bars
from hf_context_prune.utils.distributed import num_processes

from .config import RecoveryConfig
from .monitor import History
from .training import train

_VALIDATION_TOKENS = 8_000
"""Tokens that are measured during training, in whole documents."""


@dataclass(frozen=True)
class RecoveryResult:
    """A recovered model and how it got there.

    Attributes:
        model: In evaluation mode; never worse on the validation text than the given model.
        history: Steps, tokens, time and losses.
    """

    model: PreTrainedModel
    history: History


def hold_out_validation(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, config: RecoveryConfig
) -> tuple[TextSource, ValidationText]:
    """Split documents into training text and the validation text that chooses weights and the end.

    Raises:
        DataError: There are too few documents, or the training text repeats all validation documents.
    """
    rest, given = hold_out_documents(source, seed=config.recovery_seed)
    validation = ValidationText.apart_from(
        given, rest, tokenizer=tokenizer, max_tokens=_VALIDATION_TOKENS, max_seq_length=config.max_seq_length
    )
    if not len(validation.text):
        raise DataError(
            f"Recovery chooses weights by validation documents held out of {source.name}, but the other documents "
            f"repeat all {len(given):,} of them. Give text that repeats itself less."
        )
    return rest, validation


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
) -> RecoveryResult:
    """Train a pruned model on text of its domain.

    A tenth of the documents is held out as validation text: its loss decides which weights are kept, and when to stop.
    Reported figures need test text of their own.

    Args:
        model: The pruned model; left unchanged.
        data: Text of the domain: whatever [`load_documents`][] reads.
        config: All choices.
        tokenizer: The model's.
        text_column: Column with the text.

    Raises:
        ConfigError: An argument of another type, nothing to train, several processes, or a GPU that is not the first.
        DataError: Too little text.
        ContextPruneError: See `hf_context_prune.errors`.
    """
    start = time.monotonic()
    config = config or RecoveryConfig()
    spec = check_supported(model)
    _check_arguments(model, config, tokenizer)
    check_single_device(model)
    check_weights_finite(model)
    source = load_documents(data, text_column=text_column, tokenizer=tokenizer, seed=config.recovery_seed)
    config.warn_of_unused_options()
    text, validation = hold_out_validation(source, tokenizer, config)
    samples = _tokenize_training_text(text, tokenizer, config)

    student = copy_without_hooks(model)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    cast_parameters(student.train(), torch.float32)  # half precision loses small updates
    adapters = _add_adapters(student, config, spec, frozen) if config.method == "lora" else None

    def measure(candidate: PreTrainedModel) -> float:
        return measure_validation(candidate, tokenizer, validation)

    rounds = set(dtypes.values()) != {torch.float32}
    begin = time.monotonic()
    given = measure(copy_without_hooks(model).eval()) if rounds else math.inf  # in its own precision
    reserve = time.monotonic() - begin
    history = train(student, samples, config, measure=lambda: measure(student), start=start, reserve=reserve)

    result = student if adapters is None else _merge_adapters(adapters)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(name not in frozen)
        parameter.data = parameter.data.to(dtypes[name])
    result.eval()
    if rounds and history.best_step > 0 and not _is_below(given, measure, result):
        # Rounding took what the training gave.
        history.best_step, result = 0, copy_without_hooks(model).eval()
    return RecoveryResult(result, history)


def _check_arguments(model: PreTrainedModel, config: object, tokenizer: object) -> None:
    """Refuse arguments of another type, and a model without a weight to train.

    Raises:
        ConfigError: One of them.
    """
    if not isinstance(config, RecoveryConfig):
        raise ConfigError(f"config is a {type(config).__name__}; it must be a RecoveryConfig.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "No weight of the model requires a gradient. Call requires_grad_(True) on the weights to train."
        )
    if not callable(tokenizer):
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}; it must be the model's tokenizer.")


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


def _tokenize_training_text(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, config: RecoveryConfig
) -> torch.Tensor:
    """Return the whole text, or as much as the steps can use, as packed samples, int64 [samples, length]."""
    wanted = 2**31 if config.max_steps is None else config.max_steps * config.batch_size
    return tokenize_samples(
        source,
        tokenizer,
        num_samples=wanted,
        max_seq_length=config.max_seq_length,
        seed=config.recovery_seed,
        warn_if_short=False,
    )


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
