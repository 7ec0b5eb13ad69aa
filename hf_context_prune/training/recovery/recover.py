"""`recover()`: text -> withheld and training blocks, a teacher that fits, full or low-rank training."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource, load_documents
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.errors import ConfigError, DataError, NumericsError, PlanError
from hf_context_prune.evaluation.perplexity import choose_documents, document_losses
from hf_context_prune.modeling.architectures import check_supported
from hf_context_prune.modeling.patching import bfloat16_layers
from hf_context_prune.modeling.plan import PruningPlan, Vocabulary, fingerprint
from hf_context_prune.modeling.specs import read_geometry
from hf_context_prune.modeling.token_rows import num_rows
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.training.progress import without_bars
from hf_context_prune.utils.distributed import num_processes
from hf_context_prune.utils.precision import bfloat16_is_fast

from .config import RecoveryConfig
from .training import History, train

_WITHHELD_TOKENS = 8_000
"""Tokens on which the way is measured, in whole documents."""


@dataclass(frozen=True)
class RecoveryResult:
    """A recovered model and how it got there.

    Attributes:
        model: In evaluation mode; never worse on the withheld text than the one given (or its rewound weights).
        history: Steps, tokens, time and losses.
    """

    model: PreTrainedModel
    history: History


def teacher_of(dense: PreTrainedModel, plan: PruningPlan | None, student: PreTrainedModel) -> PreTrainedModel:
    """The dense parent as a teacher: over the student's tokens, and in bfloat16 where that is fast.

    Args:
        dense: The parent, or another model over the parent's tokens; left as it is.
        plan: The student's, with the vocabulary that was kept.
        student: The model to be trained.

    Raises:
        ConfigError: Their tokens are not the same.
    """
    teacher = dense
    if plan is not None and plan.vocabulary is not None and has_all_tokens(dense, plan.vocabulary):
        spec = check_supported(dense)
        whole = PruningPlan.identity(spec.model_type, read_geometry(dense.config, spec), fingerprint(dense))
        teacher = apply_plan(dense, replace(whole, vocabulary=plan.vocabulary))
    if num_rows(teacher) != num_rows(student):
        kept = f", of which the plan keeps {len(plan.vocabulary.kept):,}" if plan and plan.vocabulary else ""
        raise ConfigError(
            f"The teacher has {num_rows(dense):,} tokens{kept}, and the model {num_rows(student):,}; a teacher must be "
            f"over the same tokens. Pass the model that was pruned (and its plan), or distillation=0."
        )
    if teacher is dense:
        teacher = copy_without_hooks(dense)
    if bfloat16_is_fast(student.device):
        cast_parameters(teacher, torch.bfloat16)
    return teacher.to(student.device).eval().requires_grad_(False)


def has_all_tokens(teacher: PreTrainedModel, vocabulary: Vocabulary) -> bool:
    """Whether a teacher is over the tokens before some were pruned, and not over those that were kept."""
    return num_rows(teacher) == vocabulary.dense


def copy_without_hooks(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that runs its class's forward: one set on the model (autocast of a Trainer, TRL's) would run the model."""
    copied: PreTrainedModel = copy.deepcopy(model)
    vars(copied).pop("forward", None)
    return copied


def check_output_folder(model: PreTrainedModel) -> None:
    """Refuse several processes, and a GPU that is not the first, which is what a Trainer takes.

    Raises:
        ConfigError: Says how to do it.
    """
    if num_processes() > 1:
        raise ConfigError(
            f"recover trains in one process, and here are {num_processes()}. Start it without a launcher; for several "
            f"processes train the pruned folder in a Trainer of your own."
        )
    if model.device.type == "cuda" and model.device.index:
        raise ConfigError(
            f"The model is on {model.device}, and recover trains on the first GPU. Choose the GPU by the environment, "
            f"CUDA_VISIBLE_DEVICES={model.device.index}, and leave the device out."
        )


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights alone: computed buffers (rotary tables) stay as precise as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def rewound(dense: PreTrainedModel, plan: PruningPlan | None) -> PreTrainedModel:
    """The kept weights with the parent's values (the lottery ticket, arXiv 1803.03635, rewound to the pretrained ones).

    Raises:
        ConfigError: There is no plan.
        PlanError: The model is not the one that the plan was made for.
    """
    if plan is None:
        raise ConfigError("rewind='pretrained' needs the plan of what was kept: pass plan=.")
    try:
        return apply_plan(dense, plan)
    except PlanError as error:
        raise PlanError(f"rewind='pretrained' needs the very model that was pruned: {error}") from error


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave the caller's random numbers as they are: the Trainer seeds all of them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@_own_randomness()
def recover(
    model: PreTrainedModel,
    data: Any,  # noqa: ANN401 - whatever load_documents reads
    config: RecoveryConfig | None = None,
    *,
    tokenizer: Any,  # noqa: ANN401
    teacher: PreTrainedModel | None = None,
    plan: PruningPlan | None = None,
    text_column: str | None = None,
) -> RecoveryResult:
    """Train a pruned model back on text of its domain.

    A tenth of the documents is withheld: the loss on them says which weights are kept, and when to stop. Figures to be
    reported need text of their own. With ``rewind="pretrained"`` the best of what follows from the rewound weights is
    kept, which may be worse than what was given: that is what such an experiment is to show.

    Args:
        model: The pruned model; left as it is.
        data: Text of the domain: what [`load_documents`][] reads.
        config: All choices.
        tokenizer: The model's.
        teacher: The dense parent, for distillation and for rewinding; left as it is.
        plan: What was pruned; needed where tokens were, or to rewind.
        text_column: Column with the text.

    Raises:
        ConfigError: Distillation without a teacher, or a teacher over other tokens.
        DataError: Too little text.
        ContextPruneError: See `hf_context_prune.errors`.
    """
    start = time.monotonic()
    config = config or RecoveryConfig()
    spec = check_supported(model)
    for value, kinds, what in (
        (config, RecoveryConfig, "config"),
        (plan, PruningPlan | None, "plan"),
        (teacher, PreTrainedModel | None, "teacher"),
    ):
        if not isinstance(value, kinds):
            raise ConfigError(f"{what} is a {type(value).__name__}; it must be a {getattr(kinds, '__name__', kinds)}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "No weight of the model requires a gradient; set requires_grad_(True) on those to be trained."
        )
    if teacher is None and (config.distillation > 0 or config.rewind != "none"):
        raise ConfigError(
            f"distillation={config.distillation:g} and rewind={config.rewind!r} need the dense parent: pass teacher=, "
            f"or set distillation=0 (and rewind='none')."
        )
    if not callable(tokenizer):
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}; it must be the model's tokenizer.")
    check_output_folder(model)
    check_weights_finite(model)
    if teacher is not None:
        if any(parameter.is_meta for parameter in teacher.parameters()):
            raise ConfigError("The teacher is on the meta device, without weights. Load it with weights.")
        check_weights_finite(teacher)
    source = load_documents(data, text_column=text_column, tokenizer=tokenizer, seed=config.recovery_seed)
    rest, withheld, docs = _withheld(source, tokenizer, config)
    blocks = _all_blocks(rest, tokenizer, config)
    student = copy_without_hooks(model) if config.rewind == "none" or teacher is None else rewound(teacher, plan)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name not in frozen)
    cast_parameters(student.train(), torch.float32)  # half precision loses small updates
    guide = None if teacher is None or config.distillation == 0 else teacher_of(teacher, plan, student)
    adapters = None
    if config.method == "lora":
        torch.manual_seed(config.recovery_seed)
        options = LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules="all-linear",
            exclude_modules=[name.removesuffix(".weight") for name in sorted(frozen)] or None,
            fan_in_fan_out=spec.transposed,
        )
        try:
            adapters = get_peft_model(student, options)
        except ValueError as error:
            if not frozen:
                raise
            raise ConfigError(
                "method='lora' finds no linear layer to adapt beside those that require no gradient. Set "
                "requires_grad_(True) on some, or use method='full'."
            ) from error

    def measure(model: PreTrainedModel) -> float:
        with bfloat16_layers(model), without_bars("hf_context_prune.evaluation"):
            losses = document_losses(model, tokenizer, withheld, max_seq_length=config.max_seq_length, docs=docs)
        return sum(loss.nll for loss in losses) / sum(loss.num_bytes for loss in losses) / math.log(2)

    rounds = set(dtypes.values()) != {torch.float32} and config.rewind == "none"
    begin = time.monotonic()
    given = (
        measure(copy_without_hooks(model).eval()) if rounds else math.inf
    )  # as precisely as what will come of rounding
    spare = time.monotonic() - begin
    look = partial(measure, student)
    history = train(student, blocks, config, teacher=guide, measure=look, start=start, spare=spare)
    if adapters is not None:
        student = _merged(adapters)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name not in frozen)
        parameter.data = parameter.data.to(dtypes[name])
    student.eval()
    if rounds and history.best_step > 0:
        try:
            gained = measure(student) < given
        except NumericsError:
            gained = False
        if not gained:  # rounding took what the training gave
            history.best_step, student = 0, copy_without_hooks(model).eval()
    return RecoveryResult(student, history)


def _merged(adapters: PeftModel) -> PreTrainedModel:
    merged = adapters.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged


def _withheld(source: TextSource, tokenizer: Any, config: RecoveryConfig) -> tuple[TextSource, TextSource, list[str]]:  # noqa: ANN401
    rest, given = hold_out_documents(source, seed=config.recovery_seed)
    own, _ = drop_overlapping(given, rest)
    if not len(own):
        raise DataError(
            f"Recovery measures its way on documents withheld from {source.name}, but the rest repeats all "
            f"{len(given):,} of them. Give text that repeats itself less."
        )
    return rest, own, choose_documents(own, tokenizer, max_tokens=_WITHHELD_TOKENS)


def _all_blocks(source: TextSource, tokenizer: Any, config: RecoveryConfig) -> torch.Tensor:  # noqa: ANN401
    """All of the text (or as much as the steps can use), packed."""
    wanted = 2**31 if config.max_steps is None else config.max_steps * config.batch_size
    options = {"num_samples": wanted, "max_seq_length": config.max_seq_length, "seed": config.recovery_seed}
    return tokenize_samples(source, tokenizer, **options, fewer=True)
