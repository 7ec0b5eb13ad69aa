"""The training of recovery: a `transformers.Trainer` on packed samples, which ends with the best weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hf_context_prune.utils.compat import limit_to_one_gpu
from hf_context_prune.utils.files import write_file
from hf_context_prune.utils.precision import bfloat16_is_fast
from hf_context_prune.utils.temporary import scratch_folder

from .checkpoint import KeptTraining, RecoveryCheckpoint
from .config import RecoveryConfig
from .monitor import History, RecoveryMonitor
from .zeros import KeepZeros

_WARMUP = 0.05
"""Share of the training in which the learning rate rises."""
MICRO_BATCH_TOKENS = 1024
"""Tokens of a pass forward and back, at least one sample."""


class _Samples(Dataset[dict[str, torch.Tensor]]):
    """Samples as the Trainer takes them.

    Args:
        samples: Token ids, int64 [samples, length].
    """

    def __init__(self, samples: torch.Tensor) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.samples[index]}


class _RecoveryTrainer(Trainer):
    """Trains with the cross-entropy of packed samples; the learning rate follows the progress.

    A resumed training goes on from a `KeptTraining` in place of the files of a checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.monitor: RecoveryMonitor | None = None
        self.kept: KeptTraining | None = None
        self.model_accepts_loss_kwargs = False  # every micro-batch has as many tokens, so their mean is the mean

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        ids = inputs["input_ids"]
        assert self.monitor is not None
        self.monitor.history.tokens += ids.numel()
        fast = bfloat16_is_fast(ids.device)
        with torch.autocast(ids.device.type, torch.bfloat16) if fast else nullcontext():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits.float(), ids[:, 1:].flatten())

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        monitor = self.monitor
        assert monitor is not None

        def factor(step: int) -> float:
            done = monitor.share_done(step)
            return min(1.0, (done + 1 / monitor.total_steps) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * done))

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def go_on(self, kept: KeptTraining, scratch: Path) -> None:
        """Train from a kept state to the end; `scratch` is an empty folder."""
        assert kept.trainer is not None
        write_file(scratch / TRAINER_STATE_NAME, json.dumps(kept.trainer))
        self.kept = kept
        self.train(resume_from_checkpoint=str(scratch))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.kept is not None
        self.kept.restore_weights(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.kept is not None:
            self.kept.restore_optimizer(self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.kept is not None:
            self.kept.restore_random()


def train(
    model: PreTrainedModel,
    samples: torch.Tensor,
    config: RecoveryConfig,
    *,
    measure: Callable[[], float],
    start: float,
    reserve: float,
    checkpoint: RecoveryCheckpoint | None = None,
) -> History:
    """Train the weights that require gradients, and end with the best weights that were met, maybe the first.

    An interrupt (Ctrl-C) after weights better than the first were met ends the training; before that it is raised.

    Args:
        model: Trained in place.
        samples: Token ids of the text, int64 [samples, length].
        config: All choices.
        measure: Returns the loss of `model` on the validation text, in bits per byte.
        start: `time.monotonic()` from which `max_minutes` counts.
        reserve: Seconds of `max_minutes` to leave for the time after training.
        checkpoint: Where measured states are kept, and the last one is resumed from; None keeps nothing.

    Raises:
        NumericsError: The loss before training is not a number.
        ConfigError: `max_minutes` leaves no time to train.
        SaveError: A measured state can't be kept.
    """
    most = max(1, MICRO_BATCH_TOKENS // samples.shape[1])
    micro = max(size for size in range(1, min(config.batch_size, most) + 1) if config.batch_size % size == 0)
    accumulation = config.batch_size // micro
    steps = max(1, round(config.num_epochs * math.ceil(math.ceil(len(samples) / micro) / accumulation)))
    steps = min(steps, config.max_steps or steps)
    use_cache = model.config.use_cache
    with scratch_folder() as scratch:
        arguments = TrainingArguments(
            output_dir=str(scratch),
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            learning_rate=config.peak_learning_rate(model.get_input_embeddings().weight.shape[1]),
            adam_beta2=0.95,
            weight_decay=0.01,
            seed=config.recovery_seed,
            use_cpu=model.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        limit_to_one_gpu(arguments)  # several visible GPUs would become a DataParallel
        trainer = _RecoveryTrainer(model, arguments, train_dataset=_Samples(samples))
        monitor = RecoveryMonitor(model, config, steps, start, measure, reserve, checkpoint)
        trainer.monitor = monitor
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(KeepZeros(model))  # before `monitor`, which measures and keeps the weights
        trainer.add_callback(monitor)
        kept = None if checkpoint is None else checkpoint.load()
        try:
            if kept is None:
                monitor.begin()
                trainer.train()
            else:
                monitor.resume(kept)
                if not monitor.is_over:
                    trainer.go_on(kept, scratch)
        except KeyboardInterrupt:
            if monitor.history.best_step == 0:  # nothing was gained
                raise
            monitor.finish_interrupted()
    monitor.restore_best()
    model.config.use_cache = use_cache
    model.eval()
    return monitor.history
