"""What a callback can't do by itself: a mixin for Trainers."""

from __future__ import annotations

from typing import Any

from .callback import ContextPruneCallback


class ContextPruneTrainerMixin:
    """Gives the sizes to all reporters: ``class MyTrainer(ContextPruneTrainerMixin, Trainer)``.

    A Trainer calls its reporters (TensorBoard, W&B, ...) before the callbacks that it was given, so what a callback
    adds to the logs reaches the console and ``state.log_history``, but not them.
    """

    callback_handler: Any

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """As ``Trainer.log``, with the sizes."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ContextPruneCallback):
                logs.update(callback.metrics)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
