"""`ContextPruneCallback`: prunes the model that a `transformers.Trainer` trains, by the text that it trains on."""

from __future__ import annotations

import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from hf_context_prune.config import PrunerConfig, from_options
from hf_context_prune.errors import ConfigError, DataError, NumericsError, PruningWarning
from hf_context_prune.modeling.architectures import check_supported
from hf_context_prune.modeling.modeling_context_pruned import MODELING_FILES
from hf_context_prune.modeling.native_fit import build_empty
from hf_context_prune.modeling.plan import PruningPlan, fingerprint
from hf_context_prune.modeling.specs import LayerWidths, read_geometry
from hf_context_prune.pruning.allocation.widths import plan_widths
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite
from hf_context_prune.pruning.planner import check_reconstruction, plan_and_reconstruct
from hf_context_prune.pruning.surgery import apply_plan, kept_entries
from hf_context_prune.storage.loading import in_memory
from hf_context_prune.storage.provenance import provenance_of
from hf_context_prune.training.progress import without_bars
from hf_context_prune.utils.distributed import all_gather, num_processes
from hf_context_prune.utils.file_names import PLAN_NAME
from hf_context_prune.utils.version import versions

from .batches import read_batch
from .checkpoints import complete_checkpoint, progress_of, use_cache_of
from .checks import (
    check_arguments,
    check_attention,
    check_config,
    check_not_cut,
    check_reachable,
    check_types,
    warn_of_plain_push,
)
from .optimizer import check_optimizer, clear_entries, map_state, replace_parameters
from .publishing import Publishable
from .schedule import PruningSchedule, config_at
from .transplant import check_modules, compose_plans, scatter, transplant

_ADAPTIVE_BLOCKS = 16


class ContextPruneCallback(Publishable, TrainerCallback, ExportableState):  # type: ignore[misc]
    """Prunes during training: ``Trainer(..., callbacks=[ContextPruneCallback(PrunerConfig(pruning_ratio=0.2))])``.

    The last training batches are the calibration text. Each pruning of the schedule chooses units by them, cuts them
    out of the very model that the Trainer holds, repairs the rest in closed form, and maps the state of the optimizer.
    After ``train()``, ``trainer.model`` is the smaller model, of its native class where that can hold the widths.

    With several processes (DDP), which hold on to the shapes of their weights, what is pruned is zeroed and stays zero
    until the training ends; then it is cut out.

    Args:
        config: What to remove and how. `num_calibration_samples` x `max_seq_length` of the last tokens are used.
        schedule: When.

    Attributes:
        plan: What was kept so far, in the units of the model that the training began with; None before.

    Raises:
        ConfigError: An option that needs more than training batches.
    """

    def __init__(
        self,
        config: PrunerConfig | dict[str, Any] | None = None,
        schedule: PruningSchedule | dict[str, Any] | None = None,
    ) -> None:
        # Plain values are what a checkpoint gives back.
        self.config = PrunerConfig.from_dict(config) if isinstance(config, dict) else config or PrunerConfig()
        given = from_options(PruningSchedule, schedule) if isinstance(schedule, dict) else schedule
        self.schedule = given or PruningSchedule()
        check_types(self.config, self.schedule)
        self.plan: PruningPlan | None = None
        self.total_params = 0
        self.dense: tuple[LayerWidths, ...] = ()
        self.final: tuple[LayerWidths, ...] | None = None
        self.tokens: list[int] = []
        self.metrics: dict[str, float] = {}
        self.num_done = 0
        self.steps: tuple[int, ...] = ()
        self.num_processes = 1
        self._training = False
        self._seen: list[torch.Tensor] = []
        self._hook: Any = None
        self.use_cache = True
        self.padding_idx: int | None = None
        self._fingerprint = ""
        self._pruning = False
        self._base: dict[str, Any] = {}
        self._result = None
        self.pushed_by_mixin = False
        check_config(self.config)

    # --- the state in a checkpoint ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (JSON values): `ExportableState`."""
        return {
            "args": {"config": self.config.to_dict(), "schedule": self.schedule.to_dict()},
            "attributes": {
                "progress": {
                    "plan": None if self.plan is None else self.plan.to_dict(),
                    "total_params": self.total_params,
                    "dense": [[widths.neurons, widths.kv_groups] for widths in self.dense],
                    "final": None if self.final is None else [[w.neurons, w.kv_groups] for w in self.final],
                    "tokens": self.tokens,
                    "metrics": self.metrics,
                    "num_done": self.num_done,
                    "fingerprint": self._fingerprint,
                    "use_cache": self.use_cache,
                    "padding_idx": self.padding_idx,
                    "steps": list(self.steps),
                    "base": self._base,
                    "num_processes": self.num_processes,
                }
            },
        }

    @property
    def progress(self) -> dict[str, Any]:
        """The part of the state that training changes."""
        return self.state()["attributes"]["progress"]  # type: ignore[no-any-return]

    @progress.setter
    def progress(self, values: dict[str, Any]) -> None:
        self.plan = None if values["plan"] is None else PruningPlan.from_dict(values["plan"])
        self.total_params, self.num_done = values["total_params"], values["num_done"]
        self.dense = tuple(LayerWidths(*widths) for widths in values["dense"])
        self.final = None if values["final"] is None else tuple(LayerWidths(*widths) for widths in values["final"])
        self.tokens, self.metrics = list(values["tokens"]), dict(values["metrics"])
        self._fingerprint, self.use_cache = values["fingerprint"], values["use_cache"]
        self.steps, self.num_processes = tuple(values["steps"]), values["num_processes"]
        # Checkpoints of earlier versions lack these.
        self._base, self.padding_idx = dict(values.get("base") or {}), values.get("padding_idx")

    def _resume(self, model: PreTrainedModel, state: TrainerState, steps: tuple[int, ...]) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        self.progress = progress_of(saved, self.state()["args"], state, steps)
        model.get_input_embeddings().padding_idx = self.padding_idx  # a Trainer's config may have another by now

    # --- events of the Trainer ----------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Refuse what can't work, while no weight has changed; take up a checkpoint's state; start to listen."""
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if hasattr(state, "_context_prune"):  # each training has a state of its own
            state._context_prune._stop_listening()
            raise ConfigError("The Trainer has two ContextPruneCallbacks, or one twice; give it one, once.")
        state._context_prune = self
        check_arguments(args, state)
        spec = check_supported(model)
        check_weights_finite(model)
        check_attention(model)
        widths = read_geometry(model.config, spec).layers
        check_modules(model, build_empty(model.config, spec, widths))
        check_optimizer(optimizer, model, num_processes())
        check_reconstruction(model, self.config, will_save=True)
        steps = self.schedule.steps(state.max_steps)
        if state.global_step > 0:
            self._resume(model, state, steps)
        else:
            check_not_cut(self.plan, widths)
            check_reachable(model, self.config, self.schedule.share(0))
            self.final = None if self.config.allocation == "adaptive" else plan_widths(model, self.config)
            self.dense, self.total_params = widths, model.num_parameters()
            self.plan, self.tokens, self.num_done = None, [], 0
            self.use_cache, self.padding_idx = use_cache_of(model), model.get_input_embeddings().padding_idx
            self._fingerprint, self._base = fingerprint(model), provenance_of(in_memory(model, None))
            self.metrics = {"pruning/parameters": self.total_params, "pruning/ratio": 0.0}
            self.steps, self.num_processes = steps, num_processes()
        if args.push_to_hub and not self.pushed_by_mixin and state.is_world_process_zero:
            warn_of_plain_push()
        self._result = None
        self._stop_listening()  # to a training that did not end
        self._training = True
        if self.num_done < len(self.steps):
            self._hook = model.register_forward_pre_hook(self._listen, with_kwargs=True)

    def _stop_listening(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._seen = None, []

    def _listen(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or self._pruning or not torch.is_grad_enabled():  # SFTTrainer may run a batch twice
            return
        self._seen.append(read_batch(args, kwargs, getattr(model.config, "pad_token_id", None)))
        while sum(map(len, self._seen[1:])) >= self._most_tokens:  # of a training that was interrupted, for one
            del self._seen[0]

    @property
    def _most_tokens(self) -> int:
        return self.config.num_calibration_samples * self.config.max_seq_length

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Refuse, before a weight moves, a loss that does not come from the model's own forward pass."""
        if self._hook is not None and not self._seen:
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
        if self._hook is None:
            return
        own = [int(index) for tokens in self._seen for index in tokens.tolist()]
        self._seen = []
        self.tokens += [index for tokens in all_gather(own) for index in tokens]
        del self.tokens[: -self._most_tokens]
        if state.global_step < self.steps[self.num_done]:
            return
        self._pruning = True
        model = kwargs["model"]
        autocast = vars(model).pop("forward", None)  # it would round the logits that widths are measured by
        try:
            with without_bars("hf_context_prune") if args.disable_tqdm else nullcontext():
                self._prune(model, kwargs["optimizer"], state.global_step)
        except NumericsError as error:
            raise NumericsError(
                f"After step {state.global_step} the weights or activations of the training are no longer numbers, so "
                f"nothing can be pruned by them. Lower the learning rate, or clip gradients (max_grad_norm)."
            ) from error
        finally:
            self._pruning = False
            if autocast is not None:
                model.forward = autocast
        self.num_done += 1
        # Checkpoints from before are of another size: the best model is one of those to come.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        if self.num_done == len(self.steps):
            self.tokens = []
            self._stop_listening()

    def _samples(self, model: PreTrainedModel) -> torch.Tensor:
        """The last tokens as blocks, no longer than the model has positions; adaptive allocation needs several."""
        positions = getattr(model.config, "max_position_embeddings", None) or self.config.max_seq_length
        fewest = _ADAPTIVE_BLOCKS if self.config.allocation == "adaptive" else 1
        length = min(self.config.max_seq_length, positions, len(self.tokens) // fewest)
        if length < 2:
            raise DataError(
                f"The training batches up to the first pruning hold {len(self.tokens)} tokens, which is too little. "
                f"Prune later, or check the data."
            )
        count = len(self.tokens) // length
        return torch.tensor(self.tokens[-count * length :]).view(count, length)

    def _prune(self, model: PreTrainedModel, optimizer: Any, step: int) -> None:  # noqa: ANN401
        several = num_processes() > 1
        current = self._cut_out(model) if several else model
        spec = check_supported(current)
        share = self.schedule.share(self.num_done)
        config = config_at(
            share, self.config, self.dense, read_geometry(current.config, spec).layers, self.final, self.total_params
        )
        smaller, size = None, current.num_parameters()
        if self.final is None and (config.target_params or 0) >= size:  # whole units: the last one went far enough
            plan = PruningPlan.identity(spec.model_type, read_geometry(current.config, spec))
        else:
            plan, reconstruct = plan_and_reconstruct(current, self._samples(current), config)
            smaller = apply_plan(current, plan, reconstruct=reconstruct)
            size = smaller.num_parameters()
        prunings = [] if self.plan is None else list(self.plan.provenance["prunings"])
        prunings.append({"step": step, "parameters": size, "tokens": len(self.tokens)})
        provenance = {
            **self._base,
            "config": self.config.to_dict(),
            "schedule": self.schedule.to_dict(),
            "prunings": prunings,
            "versions": versions(),
        }
        whole = compose_plans(self.plan, plan, model_fingerprint=self._fingerprint, provenance=provenance)
        if smaller is None:
            pass
        elif several:
            self._silence(model, smaller, whole, optimizer)
        else:
            self._cut(model, optimizer, plan, smaller)
            model.config.use_cache = False
        self.plan = whole
        self.metrics = {"pruning/parameters": size, "pruning/ratio": 1 - size / self.total_params}

    def _cut_out(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model without what was silenced so far."""
        return model if self.plan is None else apply_plan(model, self._exact(model))

    def _exact(self, model: PreTrainedModel) -> PruningPlan:
        """What was silenced so far, as a plan for the weights as they are now."""
        assert self.plan is not None
        return compose_plans(None, self.plan, model_fingerprint=fingerprint(model), provenance={})

    @staticmethod
    def _cut(model: PreTrainedModel, optimizer: Any, plan: PruningPlan, smaller: PreTrainedModel) -> None:  # noqa: ANN401
        """Make `model` the smaller one in place, for the optimizer too."""
        check_modules(model, smaller)
        own = dict(model.named_parameters())
        map_state(optimizer, ((own[name], places) for name, places in kept_entries(model, plan)))
        replace_parameters(optimizer, transplant(model, smaller))

    def _silence(self, model: PreTrainedModel, smaller: PreTrainedModel, plan: PruningPlan, optimizer: Any) -> None:  # noqa: ANN401
        """Zero what a plan removes, on both sides: no gradient reaches it, and nothing moves it."""
        narrow, wide = dict(smaller.named_parameters()), dict(model.named_parameters())
        for name, places in kept_entries(model, plan):
            scatter(wide[name], narrow[name].detach(), places)
            clear_entries(optimizer, wide[name], places)
        for name, parameter in wide.items():
            if parameter.shape == narrow[name].shape:
                parameter.data.copy_(narrow[name].detach())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Add the sizes to what is logged."""
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
        """Before the Trainer uploads weights and config of a checkpoint: the rest that they need to reload."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._training and state.is_world_process_zero and folder.is_dir():
            complete_checkpoint(folder, self.plan, use_cache=self.use_cache)
            for name in (PLAN_NAME, *MODELING_FILES):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, Path(args.output_dir) / name)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Stop listening, cut out what was silenced, and put ``use_cache`` back."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._stop_listening()
        self._training = False
        if self.num_done < len(self.steps):
            warnings.warn(
                f"The training ended at step {state.global_step}, after {self.num_done} of {len(self.steps)} prunings "
                f"(planned after the steps {', '.join(map(str, self.steps))}): fewer units went than were asked for.",
                PruningWarning,
                stacklevel=2,
            )
        if self.plan is not None and num_processes() > 1:
            self._cut(model, optimizer, self._exact(model), self._cut_out(model))
        model.config.use_cache = self.use_cache
        self._result = (model, kwargs.get("processing_class"))
        if self.plan is not None and state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self.plan.save(Path(args.output_dir) / PLAN_NAME)
