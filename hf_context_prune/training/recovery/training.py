"""The training of recovery: a `transformers.Trainer` on packed samples, which ends with the best weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from hf_context_prune.utils.compat import limit_to_one_gpu
from hf_context_prune.utils.precision import bfloat16_is_fast
from hf_context_prune.utils.temporary import scratch_folder

from .config import RecoveryConfig
from .monitor import History, RecoveryMonitor
from .zeros import KeepZeros

_WARMUP = 0.05
"""Share of the training in which the learning rate rises."""
_MICRO_BATCH_TOKENS = 1024


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
    """Trains with the cross-entropy of packed samples; the learning rate follows the progress."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.monitor: RecoveryMonitor | None = None
        self.num_tokens = 0
        self.model_accepts_loss_kwargs = False  # every micro-batch has as many tokens, so their mean is the mean

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        ids = inputs["input_ids"]
        self.num_tokens += ids.numel()
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


def train(
    model: PreTrainedModel,
    samples: torch.Tensor,
    config: RecoveryConfig,
    *,
    measure: Callable[[], float],
    start: float,
    reserve: float,
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

    Raises:
        NumericsError: The loss before training is not a number.
    """
    most = max(1, _MICRO_BATCH_TOKENS // samples.shape[1])
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
            learning_rate=config.peak_learning_rate,
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
        monitor = trainer.monitor = RecoveryMonitor(model, config, steps, start, measure, reserve)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(KeepZeros(model))  # before `monitor`, which measures and keeps the weights
        trainer.add_callback(monitor)
        monitor.measure_validation(0)
        begin = time.monotonic() - monitor.all_measuring
        try:
            trainer.train()
        except KeyboardInterrupt:
            if monitor.history.best_step == 0:  # nothing was gained, and the bar may not be there yet
                raise
            monitor.finish_interrupted()
        seconds = time.monotonic() - begin - monitor.all_measuring
    monitor.restore_best()
    model.config.use_cache = use_cache
    model.eval()
    history = monitor.history
    history.tokens = trainer.num_tokens
    history.tokens_per_second = history.tokens / seconds
    return history
