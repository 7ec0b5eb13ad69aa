"""The training of recovery: a `transformers.Trainer` that also learns from a teacher and keeps the best weights."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_context_prune.errors import NumericsError, PruningWarning
from hf_context_prune.modeling.modeling_context_pruned import is_transposed
from hf_context_prune.utils.precision import bfloat16_is_fast

from .config import RecoveryConfig
from .loss import token_loss

_WARMUP = 0.05
"""Share of the training in which the learning rate rises."""
_MEASURING = 0.1
"""Share of a given time that measuring on the way may take."""
_MICRO_BATCH_TOKENS = 1024
_LOGGER_NAME = "hf_context_prune.recovery"


@dataclass
class History:
    """What happened in a recovery.

    Attributes:
        steps: Optimizer steps taken.
        tokens: Tokens trained on.
        seconds: Wall time, measuring included.
        tokens_per_second: Of training alone.
        losses: (step, bits a byte of the withheld text), the first before training; of weights in float32.
        best_step: The step whose weights were kept; 0: those that were given.
        ended: Why it ended.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    ended: str = "all steps were taken"

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Token blocks as the Trainer takes them.

    Args:
        blocks: [blocks, length], int64.
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index]}


class _Progress(TrainerCallback):
    """Keeps the time, measures the withheld text, keeps the best weights, and ends the training."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: RecoveryConfig,
        total_steps: int,
        start: float,
        measure: Callable[[], float],
        spare: float,
    ) -> None:
        self.model, self.config, self.total_steps, self.measure = model, config, total_steps, measure
        self.start = start
        self.budget = None if config.max_minutes is None else max(60 * config.max_minutes - spare, 1.0)
        self.history = History()
        self.bar: Any = None
        self.measuring = self.all_measuring = 0.0
        self.step_seconds = 0.0
        self.best, self.without_gain, self.measured = math.inf, 0, 0
        self.best_state: dict[str, torch.Tensor] = {}
        self.last_step_end = start
        self.broken = False

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def progress(self, step: int) -> float:
        """Share of the training that is done, by steps or by time, whichever is further."""
        done = step / self.total_steps
        return min(1.0, done if self.budget is None else max(done, self.elapsed / self.budget))

    def look(self, step: int) -> None:
        """Measure the withheld text, and keep the weights if they are the best so far."""
        begin = time.monotonic()
        try:
            loss = self.measure()
        except NumericsError:
            if step == 0:
                raise  # it came so
            self.broken = True
            return
        # Against the one before, not the best: at the full learning rate a repaired model first gets worse.
        falls = not self.history.losses or loss < self.history.losses[-1][1]
        self.without_gain = 0 if falls else self.without_gain + 1
        self.history.losses.append((step, loss))
        if loss < self.best:
            self.best, self.history.best_step = loss, step
            self.best_state = {
                name: parameter.detach().clone()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
        self.measuring = time.monotonic() - begin
        self.all_measuring += self.measuring

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        self.bar = tqdm(
            total=1.0,
            desc="Recovering",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            name=_LOGGER_NAME,
        )
        self.last_step_end = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        now, step = time.monotonic(), state.global_step
        seconds = now - self.last_step_end
        self.step_seconds = seconds if step == 1 else 0.8 * self.step_seconds + 0.2 * seconds
        self.history.steps = step
        done = self.progress(step)
        over = self.budget is not None and self.elapsed + self.step_seconds + 1.2 * self.measuring > self.budget
        last = over or step >= self.total_steps
        due = done * self.config.evaluations >= self.measured + 1
        if due and self.budget is not None:  # else the weights that are kept would depend on the machine's speed
            due = self.all_measuring + self.measuring <= _MEASURING * self.elapsed
        if last or due:
            self.measured = int(done * self.config.evaluations)
            self.look(step)
        if self.broken:
            self.history.ended, control.should_training_stop = "the loss is no longer a number", True
        elif over:
            self.history.ended, control.should_training_stop = "the time was up", True
        elif not last and self.without_gain >= self.config.patience:
            self.history.ended = f"{self.without_gain} measurements in a row did not fall"
            control.should_training_stop = True
        self.bar.set_postfix({"bits/byte": f"{self.history.losses[-1][1]:.4f}"}, refresh=False)
        self.bar.update(min(1.0 if last else done, 1.0) - self.bar.n)
        self.last_step_end = time.monotonic()

    def end_early(self) -> None:
        """End an interrupted training with the best weights, and tell."""
        self.end()
        self.history.ended = "it was interrupted"
        warnings.warn(
            f"Interrupted: the weights of step {self.history.best_step:,} are kept, the best so far "
            f"({self.best:.4f} bits/byte on the withheld text). Interrupt again to end without them.",
            PruningWarning,
            stacklevel=2,
        )

    def end(self) -> None:
        self.bar.close()
        self.history.seconds = self.elapsed

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        self.end()


class _KeepZeros(TrainerCallback):
    """Rows and columns of weights that are zero as a whole stay zero, and so do the zero biases of such rows.

    Thresholds pruned them, and nothing else holds them. Of a layer with adapters, W + B A, the rows of B and the
    columns of A are held instead.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.zeros: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.biases: list[tuple[torch.Tensor, torch.Tensor]] = []
        adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
        if adapted:
            for layer in adapted:
                self._hold_adapters(layer)
            self._apply()  # A begins at random
            return
        for weight in model.parameters():
            if weight.requires_grad and weight.ndim == 2:
                rows, columns = _silent(weight)
                if bool(rows.any()) or bool(columns.any()):
                    self.zeros.append((weight, rows, columns))
        for module in model.modules():
            weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
            if weight is not None and bias is not None and weight.ndim == 2 and bias.requires_grad:
                rows, columns = _silent(weight)
                silent = (columns if is_transposed(module) else rows) & (bias == 0)
                if bool(silent.any()):
                    self.biases.append((bias, silent))

    def _hold_adapters(self, layer: LoraLayer) -> None:
        base = layer.get_base_layer()
        rows, columns = _silent(base.weight.T if is_transposed(base) else base.weight)
        if bool(rows.any()) or bool(columns.any()):
            for name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight  # [rank, in], [out, rank]
                nothing = torch.zeros(a.shape[0], dtype=torch.bool, device=a.device)
                self.zeros += [(a, nothing, columns), (b, rows, nothing)]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        for weight, rows, columns in self.zeros:
            weight[rows] = 0
            weight[:, columns] = 0
        for bias, silent in self.biases:
            bias[silent] = 0


def _silent(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows and which columns are zero as a whole."""
    zero = weight == 0
    return zero.all(dim=1), zero.all(dim=0)


class _RecoveryTrainer(Trainer):
    """Cross-entropy and distillation on packed blocks; the learning rate follows the progress."""

    def __init__(self, *args: Any, teacher: PreTrainedModel | None, config: RecoveryConfig, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.teacher, self.config = teacher, config
        self.progress: _Progress | None = None
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
        wanted = None
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return token_loss(
            logits,
            ids[:, 1:].flatten(),
            wanted,
            distillation=self.config.distillation,
            temperature=self.config.temperature,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        progress = self.progress
        assert progress is not None

        def factor(step: int) -> float:
            done = progress.progress(step)
            return min(1.0, (done + 1 / progress.total_steps) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * done))

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


def train(
    model: PreTrainedModel,
    blocks: torch.Tensor,
    config: RecoveryConfig,
    *,
    teacher: PreTrainedModel | None,
    measure: Callable[[], float],
    start: float,
    spare: float,
) -> History:
    """Train those weights of a model that require gradients; it ends with the best that were met, maybe the first.

    An interrupt (Ctrl-C) after weights better than the first were met ends the training; before that it is raised.

    Args:
        model: Trained in place.
        blocks: Text, [blocks, length], int64.
        config: All choices.
        teacher: Gives the distribution to learn from, over the same tokens; None: the text alone.
        measure: The loss of `model` on withheld text.
        start: `time.monotonic()` from which `max_minutes` counts.
        spare: Seconds of it to be left for what follows.
    """
    most = max(1, _MICRO_BATCH_TOKENS // blocks.shape[1])
    micro = max(size for size in range(1, min(config.batch_size, most) + 1) if config.batch_size % size == 0)
    accumulation = config.batch_size // micro
    steps = max(1, round(config.num_epochs * math.ceil(math.ceil(len(blocks) / micro) / accumulation)))
    steps = min(steps, config.max_steps or steps)
    use_cache = model.config.use_cache
    with tempfile.TemporaryDirectory(prefix="hf_context_prune-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
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
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several that are visible would become a DataParallel
        trainer = _RecoveryTrainer(model, arguments, train_dataset=Blocks(blocks), teacher=teacher, config=config)
        progress = trainer.progress = _Progress(model, config, steps, start, measure, spare)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_KeepZeros(model))  # before what measures and keeps the weights
        trainer.add_callback(progress)
        progress.look(0)
        begin = time.monotonic() - progress.all_measuring
        try:
            trainer.train()
        except KeyboardInterrupt:
            if progress.history.best_step == 0:  # nothing was gained, and the bar may not be there yet
                raise
            progress.end_early()
        seconds = time.monotonic() - begin - progress.all_measuring
    history = progress.history
    history.tokens = trainer.num_tokens
    history.tokens_per_second = history.tokens / seconds
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in progress.best_state:
                parameter.copy_(progress.best_state[name])
            parameter.grad = None
    model.config.use_cache = use_cache
    model.eval()
    return history
