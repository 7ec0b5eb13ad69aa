"""`ContextPruneTrainerMixin`: card, push and logged sizes, which a callback can't reach by itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainingArguments

from hf_context_prune.errors import ConfigError, PruningWarning
from hf_context_prune.publishing.card.card import write_card
from hf_context_prune.utils.compat import CheckpointPushHook, finish_push, save_for_push, track_push
from hf_context_prune.utils.file_names import CARD_NAME

from .callback import ContextPruneCallback
from .publishing import PushedFolder, collect_facts
from .wholeness import check_resumable

_ONLY_THE_MODEL = ("end", "every_save")


class ContextPruneTrainerMixin(CheckpointPushHook):
    """Card, push and logged sizes of this package: ``class MyTrainer(ContextPruneTrainerMixin, Trainer)``.

    - ``push_to_hub`` (its own, or by ``push_to_hub=True``) uploads model, tokenizer, plan and card in one commit, and
      never ``training_args.bin`` or optimizer state. So ``hub_strategy`` must be ``end`` or ``every_save``. With
      several processes, whose checkpoints are as wide as before, only the end is pushed.
    - The sizes reach all reporters. A Trainer calls its reporters (TensorBoard, W&B, ...) before the callbacks that it
      was given, so sizes that a callback adds to the logs reach the console and ``state.log_history`` only.
    """

    args: TrainingArguments
    model: Any
    processing_class: Any
    callback_handler: Any
    hub_model_id: str | None
    push_in_progress: Any

    def _pruning_callback(self) -> ContextPruneCallback | None:
        found = (item for item in self.callback_handler.callbacks if isinstance(item, ContextPruneCallback))
        return next(found, None)

    @property
    def _strategy(self) -> str:
        return str(getattr(self.args.hub_strategy, "value", self.args.hub_strategy))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Train as ``Trainer.train`` does, and check a checkpoint before any of it is loaded.

        Raises:
            ConfigError: A ``hub_strategy`` that uploads whole checkpoints.
            LoadError: The checkpoint to resume is not whole; names the last whole one.
        """
        callback = self._pruning_callback()
        if callback is not None:
            callback.pushed_by_mixin = True
            check_resumable(resume_from_checkpoint, self.args.output_dir)
        if self.args.push_to_hub and self._strategy not in _ONLY_THE_MODEL:
            raise ConfigError(
                f"hub_strategy={self._strategy!r} uploads whole checkpoints, with optimizer state and "
                f"training_args.bin, a pickle that holds hub_token. Use 'end' or 'every_save'."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Log as ``Trainer.log`` does, with the sizes."""
        if (callback := self._pruning_callback()) is not None:
            logs.update(callback.metrics)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Write this package's card and its picture to ``output_dir``; before anything is pruned, the Trainer's own."""
        callback = self._pruning_callback()
        if callback is None or callback.plan is None:
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        elif self.is_world_process_zero():  # type: ignore[attr-defined]
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_card(folder, collect_facts(self.model, callback.plan, self._repo_name()))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Save the model to ``output_dir``, and upload it with tokenizer, plan and card, in one commit.

        Args:
            commit_message: First line of the commit.
            blocking: Whether to wait for the upload; else a ``Future`` is returned.
            token: As for ``Trainer.push_to_hub``.
            revision: As for ``Trainer.push_to_hub``.
            private: As for ``Trainer.push_to_hub``.
            kwargs: Options of ``Trainer.create_model_card``; this package's card does not need them.

        Returns:
            A `PushResult` in the main process, None in the others.
        """
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)  # type: ignore[attr-defined]
        save_for_push(self)  # type: ignore[arg-type]
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return None
        self.create_model_card(**kwargs)
        finish_push(self)  # type: ignore[arg-type]
        return self._push_now(
            blocking, token, revision if revision is not None else self.args.hub_revision, commit_message
        )

    def push_checkpoint(self) -> None:
        """Push the model at a checkpoint of ``hub_strategy="every_save"``, in the background."""
        callback = self._pruning_callback()
        if not self.is_world_process_zero() or self._strategy == "end":  # type: ignore[attr-defined]
            return
        if callback is not None and callback.progress.num_processes > 1:
            return  # removed units are zeroed, and cut out at the end
        if self.push_in_progress is not None:
            if not self.push_in_progress.is_done():
                if not self.args.hub_always_push:
                    return
                finish_push(self)  # type: ignore[arg-type]
            self._warn_of_failed_push()
        step = self.state.global_step  # type: ignore[attr-defined]
        job = self._push_now(False, self.args.hub_token, self.args.hub_revision, f"Training in progress, step {step}")
        track_push(self, job)

    def _push_now(self, blocking: bool, token: str | None, revision: str | None, message: str | None) -> Any:  # noqa: ANN401
        callback = self._pruning_callback()
        plan, use_cache = (None, True) if callback is None else (callback.plan, callback.use_cache)
        card = None if plan is not None else Path(self.args.output_dir) / CARD_NAME  # the Trainer's own
        saved = PushedFolder(
            self.model, self.processing_class, plan, name=self._repo_name(), use_cache=use_cache, card=card
        )
        options = {"token": token, "revision": revision, "commit_message": message}
        if blocking:
            return saved.push(str(self.hub_model_id), **options)
        return HfApi().run_as_future(saved.push, str(self.hub_model_id), **options)

    def _repo_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).resolve().name

    def _warn_of_failed_push(self) -> None:
        for job in self.push_in_progress.jobs:
            if (error := job.exception()) is not None:
                warnings.warn(f"A push of this training failed: {error}", PruningWarning, stacklevel=3)
