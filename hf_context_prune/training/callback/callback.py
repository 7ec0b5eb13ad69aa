"""`ContextPruneCallback`: prunes the model that a `transformers.Trainer` trains, by the text that it trains on."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import ConfigError, DataError, NumericsError, PruningWarning, SaveError
from hf_context_prune.modeling.modeling_context_pruned import MODELING_FILES
from hf_context_prune.modeling.native_fit import build_empty_model
from hf_context_prune.modeling.plan import PruningPlan, fingerprint
from hf_context_prune.modeling.tying import config_as_tied
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.widths import plan_widths
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.planner import check_reconstruction
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.storage.provenance import collect_provenance
from hf_context_prune.training.progress import hide_progress_bars
from hf_context_prune.utils.compat import claim_training, class_forward
from hf_context_prune.utils.distributed import num_processes
from hf_context_prune.utils.file_names import PLAN_NAME
from hf_context_prune.utils.files import write_file
from hf_context_prune.utils.foreign_code import forget_foreign_code
from hf_context_prune.utils.linalg import all_finite
from hf_context_prune.utils.links import resolve_inside
from hf_context_prune.utils.options import from_options

from .batches import BatchListener
from .checkpoints import PruningProgress, complete_checkpoint, read_progress, read_use_cache
from .checks import (
    check_arguments,
    check_attention,
    check_config,
    check_not_cut,
    check_output_dir,
    check_reachable,
    check_types,
    warn_of_plain_push,
    warn_of_unused_choices,
)
from .optimizer import check_optimizer, check_state_loaded
from .pruning import cut_out_zeroed, prune_in_training
from .publishing import Publishable
from .schedule import PruningSchedule
from .transplant import check_modules


class ContextPruneCallback(Publishable, TrainerCallback, ExportableState):  # type: ignore[misc]
    """Prunes during training: ``Trainer(..., callbacks=[ContextPruneCallback(PrunerConfig(pruning_ratio=0.2))])``.

    The last training batches are the calibration text. Each pruning of the schedule chooses units by them, cuts them
    out of the very model that the Trainer holds, reconstructs the rest in closed form, and maps the state of the
    optimizer. After ``train()``, ``trainer.model`` is the smaller model, of its native class if that can hold the
    widths.

    With several processes (DDP), which hold on to the shapes of their weights, removed units are zeroed and stay zero
    until the training ends; then they are cut out.

    Args:
        config: What to remove and how. `num_calibration_samples` x `max_seq_length` of the last tokens are used.
        schedule: When to prune.

    Raises:
        ConfigError: An option that needs more than training batches.

    Example:
        ```python
        from hf_context_prune import ContextPruneCallback, PrunerConfig, PruningSchedule

        schedule = PruningSchedule(start=0.1, end=0.5, num_prunings=3)
        callback = ContextPruneCallback(PrunerConfig(pruning_ratio=0.2), schedule)
        trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[callback])
        trainer.train()
        callback.save_pretrained("mini-gpt")
        ```
    """

    def __init__(
        self,
        config: PrunerConfig | dict[str, Any] | None = None,
        schedule: PruningSchedule | dict[str, Any] | None = None,
    ) -> None:
        # A checkpoint gives plain values back.
        self.config = PrunerConfig.from_dict(config) if isinstance(config, dict) else config or PrunerConfig()
        given = from_options(PruningSchedule, schedule) if isinstance(schedule, dict) else schedule
        self.schedule = given or PruningSchedule()
        check_types(self.config, self.schedule)
        check_config(self.config)
        warn_of_unused_choices(self.config, self.schedule)
        self._progress = PruningProgress()
        self.listener = BatchListener(self.config.num_calibration_samples * self.config.max_seq_length)
        self.pushed_by_mixin = False
        self._training = False
        self._result = None

    @property
    def progress(self) -> PruningProgress:
        """How far the training has pruned."""
        return self._progress

    @progress.setter
    def progress(self, values: PruningProgress | dict[str, Any]) -> None:
        # A Trainer that restores a callback sets the plain values of `state`.
        self._progress = values if isinstance(values, PruningProgress) else PruningProgress.from_dict(values)

    @property
    def plan(self) -> PruningPlan | None:
        """Kept units, counted in the model that the training began with; None before the first pruning."""
        return self.progress.plan

    @property
    def metrics(self) -> dict[str, float]:
        """Sizes that are logged: ``pruning/parameters`` and ``pruning/ratio``."""
        return self.progress.metrics

    @property
    def use_cache(self) -> bool:
        """`use_cache` of the config after training; the Trainer switches it off while it trains."""
        return self.progress.use_cache

    def state(self) -> dict[str, Any]:
        """Return the values that a checkpoint keeps (JSON): `ExportableState`."""
        return {
            "args": {"config": self.config.to_dict(), "schedule": self.schedule.to_dict()},
            "attributes": {"progress": self.progress.to_dict()},
        }

    # --- events of the Trainer ----------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Refuse setups in which pruning can't work, before a weight changes; resume a checkpoint; start to listen."""
        model = kwargs["model"]
        self._claim(state)
        check_arguments(args, state)
        check_output_dir(args.output_dir)
        view = ModelView.of(model)
        check_weights_finite(model)
        forget_foreign_code(model, kwargs.get("processing_class"))
        check_attention(model)
        check_modules(model, build_empty_model(config_as_tied(model), view.spec, view.widths))
        check_optimizer(kwargs.get("optimizer"), model, num_processes())
        check_reconstruction(model, self.config)
        steps = self.schedule.steps(state.max_steps)
        if state.global_step > 0:
            check_state_loaded(kwargs["optimizer"], kwargs.get("lr_scheduler"), state.global_step)
            self._resume(model, state, steps)
        else:
            self._begin(view, steps)
        if args.push_to_hub and not self.pushed_by_mixin and state.is_world_process_zero:
            warn_of_plain_push()
        self._result = None
        self.listener.stop()  # it may still listen to an interrupted training
        self._training = True
        if self.progress.num_done < len(steps):
            self.listener.start(model)

    def _claim(self, state: TrainerState) -> None:
        """Refuse a second callback in one training."""
        other = claim_training(state, self)
        if isinstance(other, ContextPruneCallback):
            other.listener.stop()
            raise ConfigError("The Trainer has two ContextPruneCallbacks, or one twice; give it one, once.")

    def _begin(self, view: ModelView, steps: tuple[int, ...]) -> None:
        model, size = view.model, view.num_parameters
        check_not_cut(self.plan, view.widths)
        check_reachable(model, self.config, self.schedule.share(0))
        self.progress = PruningProgress(
            total_params=size,
            dense=view.widths,
            final=None if self.config.allocation == "adaptive" else plan_widths(model, self.config),
            metrics={"pruning/parameters": size, "pruning/ratio": 0.0},
            fingerprint=fingerprint(model),
            use_cache=read_use_cache(model),
            padding_idx=model.get_input_embeddings().padding_idx,
            steps=steps,
            base=collect_provenance(LoadedModel.from_memory(model, None)),
            num_processes=num_processes(),
        )

    def _resume(self, model: PreTrainedModel, state: TrainerState, steps: tuple[int, ...]) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        self.progress = read_progress(saved, self.state()["args"], state, steps)
        # The Trainer may have written its tokenizer's padding token into the config that the model was built from.
        model.get_input_embeddings().padding_idx = self.progress.padding_idx

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Refuse, before a weight moves, a loss that does not come from the model's own forward pass."""
        if self.listener.is_listening and not self.listener.seen:
            raise DataError(
                "No batch of this step passed through the model's forward with gradients, so there is no text to prune "
                "by: the loss must come from model(**inputs), not from parts of the model."
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Keep the step's tokens, and prune if it is time."""
        if not self.listener.is_listening:
            return
        progress, model = self.progress, kwargs["model"]
        progress.tokens += self.listener.take()
        del progress.tokens[: -self.listener.most_tokens]
        if state.global_step < progress.steps[progress.num_done]:
            return
        bars = hide_progress_bars("hf_context_prune") if args.disable_tqdm else nullcontext()
        try:
            # Autocast would round the logits that widths are measured by.
            with self.listener.pause(), class_forward(model), bars:
                self._prune(model, kwargs["optimizer"], state.global_step)
        except NumericsError as error:
            if all(all_finite(parameter.detach()) for parameter in model.parameters()):
                raise NumericsError(f"The pruning after step {state.global_step} failed: {error}") from error
            raise NumericsError(
                f"After step {state.global_step} the weights or activations of the training are no longer numbers, so "
                f"nothing can be pruned by them. Lower the learning rate, or clip gradients (max_grad_norm)."
            ) from error
        progress.num_done += 1
        # Earlier checkpoints have another size: the best model is one of the checkpoints to come.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        if progress.num_done == len(progress.steps):
            progress.tokens = []
            self.listener.stop()

    def _prune(self, model: PreTrainedModel, optimizer: Optimizer, step: int) -> None:
        prune_in_training(model, optimizer, self.progress, self.config, self.schedule, step=step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Add the sizes to the logs."""
        if logs is not None and self._training:
            logs.update(self.metrics)
            if state.log_history:
                state.log_history[-1].update(self.metrics)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Put the plan into a checkpoint, and ``use_cache`` back into its config."""
        if state.is_world_process_zero:
            complete_checkpoint(
                Path(args.output_dir) / f"checkpoint-{state.global_step}", self.plan, use_cache=self.use_cache
            )

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Add the files that a checkpoint needs to reload, before the Trainer uploads its weights and config."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._training and state.is_world_process_zero and folder.is_dir():
            complete_checkpoint(folder, self.plan, use_cache=self.use_cache)
            for name in (PLAN_NAME, *MODELING_FILES):
                if (folder / name).is_file():
                    write_file(Path(args.output_dir) / name, resolve_inside(folder, name, SaveError).read_bytes())

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Stop listening, cut out zeroed units, and restore ``use_cache``."""
        model, progress = kwargs["model"], self.progress
        self.listener.stop()
        self._training = False
        if progress.num_done < len(progress.steps):
            warnings.warn(
                f"The training ended at step {state.global_step}, after {progress.num_done} of {len(progress.steps)} "
                f"prunings (planned after the steps {', '.join(map(str, progress.steps))}): fewer units were removed "
                f"than asked for.",
                PruningWarning,
                stacklevel=2,
            )
        if progress.plan is not None and num_processes() > 1:
            cut_out_zeroed(model, kwargs["optimizer"], progress.plan)
        model.config.use_cache = self.use_cache
        self._result = (model, kwargs.get("processing_class"))
        if progress.plan is not None and state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            progress.plan.save(Path(args.output_dir) / PLAN_NAME)
