"""The course of a recovery: keeps the time, measures validation text, keeps the best weights, ends the training."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_context_prune.errors import ConfigError, NumericsError, PruningWarning

from .checkpoint import KeptTraining, RecoveryCheckpoint, trainable_weights
from .config import RecoveryConfig

_MEASURING_SHARE = 0.1
"""Share of a given time that measuring during training may take."""
_LOGGER_NAME = "hf_context_prune.recovery"
_KEPT = (
    *("best", "without_gain", "num_measured", "is_over"),
    *("preparation", "measuring", "all_measuring", "step_seconds"),
)
"""Attributes of a monitor, beside history and time, that a resumed training goes on with."""


def check_minutes(config: RecoveryConfig, needed: float, reason: str) -> None:
    """Refuse a time limit that leaves nothing for the training.

    Args:
        config: All choices.
        needed: Seconds that are needed beside the training.
        reason: What needs them, with a verb: "measuring the validation text takes".

    Raises:
        ConfigError: The time is not longer than that.
    """
    if config.max_minutes is not None and 60 * config.max_minutes <= needed:
        least = math.ceil(needed / 60 * 1000 + 1) / 1000
        raise ConfigError(
            f"The recovery may take {config.max_minutes:g} minutes (max_minutes), which is "
            f"{60 * config.max_minutes:.3g} s, but {reason} {needed:.3g} s on this machine, "
            f"so no time is left to train. Give at least {least:g} minutes."
        )


@dataclass
class History:
    """The course of a recovery.

    Attributes:
        steps: Optimizer steps taken.
        tokens: Tokens trained on.
        seconds: Wall time, measuring included.
        tokens_per_second: Speed of training alone.
        losses: (step, bits per byte of the validation text), the first before training; of weights in float32.
        best_step: The step whose weights were kept; 0 keeps the weights from before training.
        ended: Why the training ended.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    ended: str = "all steps were taken"

    def to_dict(self) -> dict[str, Any]:
        """Return all facts as plain values."""
        return asdict(self)


class RecoveryMonitor(TrainerCallback):
    """Measures validation text during training, keeps the best weights, and ends the training in time.

    Args:
        model: The model that is trained.
        config: All choices.
        total_steps: Steps of the whole training.
        start: `time.monotonic()` from which `max_minutes` counts.
        measure: Returns the loss of `model` on the validation text, in bits per byte.
        reserve: Seconds of `max_minutes` to leave for the time after training.
        checkpoint: Keeps every measured state, for a resumed run; None keeps nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: RecoveryConfig,
        total_steps: int,
        start: float,
        measure: Callable[[], float],
        reserve: float,
        checkpoint: RecoveryCheckpoint | None = None,
    ) -> None:
        self.model, self.config, self.total_steps, self.measure = model, config, total_steps, measure
        self.start, self.reserve, self.checkpoint = start, reserve, checkpoint
        self.budget = None if config.max_minutes is None else 60 * config.max_minutes - reserve
        self.history = History()
        self.bar: Any = None
        self.preparation = self.measuring = self.all_measuring = 0.0
        self.step_seconds = 0.0
        self.best, self.without_gain, self.num_measured = math.inf, 0, 0
        self.best_state: dict[str, torch.Tensor] = {}
        self.last_step_end = start
        self.diverged = self.is_over = False

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def share_done(self, step: int) -> float:
        """Return the share of the training that is done, by steps or by time, whichever is further."""
        done = step / self.total_steps
        return min(1.0, done if self.budget is None else max(done, self.elapsed / self.budget))

    def begin(self) -> None:
        """Measure the validation text before the training.

        Raises:
            NumericsError: The loss is not a number.
            ConfigError: `max_minutes` leaves no time to train.
        """
        self.preparation = self.elapsed
        self.measure_validation(0)
        reason = "reading the text and measuring the validation text before and after the training take"
        check_minutes(self.config, self.elapsed + self.measuring + self.reserve, reason)

    def resume(self, kept: KeptTraining) -> None:
        """Go on where an earlier run was: with its measurements, its best weights and the time it had used."""
        if kept.course["history"]["best_step"] == 0:  # of before the training, as the model still has them
            self._keep_best()
        else:
            self.best_state = {
                name: tensor.to(self.model.device) for name, tensor in (kept.best or kept.weights).items()
            }
        for name in _KEPT:
            setattr(self, name, kept.course[name])
        history = kept.course["history"]
        self.history = History(**{**history, "losses": [tuple(loss) for loss in history["losses"]]})
        self.start = time.monotonic() - kept.course["elapsed"]

    def _keep_best(self) -> None:
        for name, weight in trainable_weights(self.model):
            if name in self.best_state:  # in place: two copies of a large model would not fit
                self.best_state[name].copy_(weight.detach())
            else:
                self.best_state[name] = weight.detach().clone()

    def measure_validation(self, step: int) -> None:
        """Measure the validation text, and keep a copy of the weights if they are the best so far.

        Raises:
            NumericsError: The loss before training is not a number.
        """
        begin = time.monotonic()
        try:
            loss = self.measure()
        except NumericsError:
            if step == 0:
                raise  # the model was given so
            self.diverged = True
            return
        # Compare with the measurement before, not with the best: at the full learning rate a reconstructed model first
        # gets worse.
        falls = not self.history.losses or loss < self.history.losses[-1][1]
        self.without_gain = 0 if falls else self.without_gain + 1
        self.history.losses.append((step, loss))
        if loss < self.best:
            self.best, self.history.best_step = loss, step
            self._keep_best()
        self.measuring = time.monotonic() - begin
        self.all_measuring += self.measuring

    @torch.no_grad()
    def restore_best(self) -> None:
        """Write the best weights back into the model, and free the gradients."""
        for name, parameter in self.model.named_parameters():
            if name in self.best_state:
                parameter.copy_(self.best_state[name])
            parameter.grad = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        """Show a progress bar."""
        self.bar = tqdm(
            total=1.0,
            desc="Recovering",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            initial=self.share_done(state.global_step),
            name=_LOGGER_NAME,
        )
        self.last_step_end = time.monotonic()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler,
        **_: Any,  # noqa: ANN401
    ) -> None:
        """Measure if it is time, and end the training if the time is up or the loss no longer falls."""
        now, step = time.monotonic(), state.global_step
        seconds = now - self.last_step_end
        self.step_seconds = seconds if step == 1 else 0.8 * self.step_seconds + 0.2 * seconds
        self.history.steps = step
        done = self.share_done(step)
        over = self.budget is not None and self.elapsed + self.step_seconds + 1.2 * self.measuring > self.budget
        last = over or step >= self.total_steps
        due = done * self.config.num_evals >= self.num_measured + 1
        if due and self.budget is not None:  # else the weights that are kept would depend on the machine's speed
            due = self.all_measuring + self.measuring <= _MEASURING_SHARE * self.elapsed
        if last or due:
            self.num_measured = int(done * self.config.num_evals)
            self.measure_validation(step)
        if self.diverged:
            self.history.ended, control.should_training_stop = "the loss is no longer a number", True
        elif over:
            self.history.ended, control.should_training_stop = "the time was up", True
        elif not last and self.without_gain >= self.config.early_stopping_patience:
            self.history.ended = f"{self.without_gain} measurements in a row did not fall"
            control.should_training_stop = True
        self.is_over = last or control.should_training_stop
        if last or due:
            self._save(state, optimizer, lr_scheduler)
        self.bar.set_postfix({"bits per byte": f"{self.history.losses[-1][1]:.4f}"}, refresh=False)
        self.bar.update(min(1.0 if last else done, 1.0) - self.bar.n)
        self.last_step_end = time.monotonic()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        """Close the bar and note the time."""
        self.finish()

    def _save(self, state: TrainerState, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Keep the measured state for a resumed run; the time for that counts as measuring."""
        if self.checkpoint is None:
            return
        begin, best_step = time.monotonic(), self.history.best_step
        self._note_time()
        course = {name: getattr(self, name) for name in _KEPT}
        course |= {"history": self.history.to_dict(), "elapsed": self.elapsed}
        if self.is_over:
            self.checkpoint.save_ended(course, self.best_state if best_step else {})
        else:
            best = self.best_state if 0 < best_step < state.global_step else {}
            self.checkpoint.save(course, best, self.model, optimizer, scheduler, state)
        seconds = time.monotonic() - begin
        self.measuring += seconds
        self.all_measuring += seconds

    def _note_time(self) -> None:
        self.history.seconds = self.elapsed
        training = self.elapsed - self.preparation - self.all_measuring
        self.history.tokens_per_second = self.history.tokens / training

    def finish(self) -> None:
        """Close the bar and note the time."""
        if self.bar is not None:  # it ends before the first step of a resumed training
            self.bar.close()
        self._note_time()

    def finish_interrupted(self) -> None:
        """Finish an interrupted training with the best weights, and warn about it."""
        self.finish()
        self.history.ended = "it was interrupted"
        warnings.warn(
            f"Interrupted: the weights of step {self.history.best_step:,} are kept, the best so far "
            f"({self.best:.4f} bits per byte on the validation text). Interrupt again to end without them.",
            PruningWarning,
            stacklevel=2,
        )
