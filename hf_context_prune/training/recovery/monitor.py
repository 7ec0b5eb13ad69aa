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
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_context_prune.errors import NumericsError, PruningWarning

from .config import RecoveryConfig

_MEASURING_SHARE = 0.1
"""Share of a given time that measuring during training may take."""
_LOGGER_NAME = "hf_context_prune.recovery"


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
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: RecoveryConfig,
        total_steps: int,
        start: float,
        measure: Callable[[], float],
        reserve: float,
    ) -> None:
        self.model, self.config, self.total_steps, self.measure = model, config, total_steps, measure
        self.start = start
        self.budget = None if config.max_minutes is None else max(60 * config.max_minutes - reserve, 1.0)
        self.history = History()
        self.bar: Any = None
        self.measuring = self.all_measuring = 0.0
        self.step_seconds = 0.0
        self.best, self.without_gain, self.num_measured = math.inf, 0, 0
        self.best_state: dict[str, torch.Tensor] = {}
        self.last_step_end = start
        self.diverged = False

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def share_done(self, step: int) -> float:
        """Return the share of the training that is done, by steps or by time, whichever is further."""
        done = step / self.total_steps
        return min(1.0, done if self.budget is None else max(done, self.elapsed / self.budget))

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
            self.best_state = {
                name: parameter.detach().clone()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
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
            name=_LOGGER_NAME,
        )
        self.last_step_end = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
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
        self.bar.set_postfix({"bits per byte": f"{self.history.losses[-1][1]:.4f}"}, refresh=False)
        self.bar.update(min(1.0 if last else done, 1.0) - self.bar.n)
        self.last_step_end = time.monotonic()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        """Close the bar and note the time."""
        self.finish()

    def finish(self) -> None:
        """Close the bar and note the time."""
        self.bar.close()
        self.history.seconds = self.elapsed

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
