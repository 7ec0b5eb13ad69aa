"""Checks before the first training step: refuse setups in which pruning can't work."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from hf_context_prune.config import PrunerConfig, ThresholdConfig
from hf_context_prune.errors import BudgetError, ConfigError, PlanError, PruningWarning, SaveError
from hf_context_prune.modeling.configuration_context_pruned import is_modeling_file
from hf_context_prune.modeling.geometry import LayerWidths, widths_vary
from hf_context_prune.modeling.modeling_context_pruned import MODELING_FILES
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import ParameterBudget, removed_params
from hf_context_prune.pruning.allocation.widths import check_adaptive, check_round_to
from hf_context_prune.pruning.unused_options import warn_of_unused_options
from hf_context_prune.storage.files import refuse_inside_own
from hf_context_prune.utils.compat import attention_implementation
from hf_context_prune.utils.file_names import PLAN_NAME
from hf_context_prune.utils.files import resolve_path
from hf_context_prune.utils.unused import warn_of_unused

from .schedule import PruningSchedule


def check_config(config: PrunerConfig) -> None:
    """Refuse options that need more than training batches.

    Raises:
        ConfigError: Names the option.
    """
    if config.removes_layers:
        raise ConfigError(
            "num_layers, layer_ratio and layers in units remove whole layers, which the callback can't: the optimizer, "
            "the schedule and the other processes hold every layer. Call prune() with them before the training, and "
            "leave them out here."
        )
    if config.prunes_experts:
        raise ConfigError(
            "num_experts, experts_ratio, expert_neurons_ratio and shared_expert_ratio remove experts and their neurons "
            "by what a text routes to them, which the callback can't: call prune() with them before the training, and "
            "leave them out here."
        )
    if config.fixes_tokens or (config.units is not None and config.lists("tokens")):
        raise ConfigError(
            "The vocabulary can't be pruned during training: the collator's tokenizer would no longer fit. Prune it "
            "before: trimmed = prune_vocabulary(model, tokenizer, text, vocab_size=...), then give trimmed.model and "
            "trimmed.tokenizer to the Trainer, and leave the vocab_* options and tokens in units out here. Keep "
            "trimmed.model: it is the base that the result is compared with."
        )
    if config.general_data_ratio:
        raise ConfigError(
            "The callback calibrates on the training batches alone. Mix general text into the training data, and leave "
            "general_data_ratio out."
        )
    if config.balance_sources:
        raise ConfigError(
            "The callback calibrates on the training batches, whose sources it does not know. Balance the training "
            "data (datasets.interleave_datasets), and leave balance_sources out."
        )
    if config.refit_lm_head:
        raise ConfigError(
            "refit_lm_head=True refits the LM head on the text, which training does anyway. Leave refit_lm_head out."
        )
    if config.max_loss_increase is not None:
        raise ConfigError(
            "max_loss_increase finds the size on validation text, which a training does not have. Give pruning_ratio "
            "here, or use prune(), and recover() after it."
        )
    if config.allocation == "adaptive" and (config.mlp_ratio is not None or config.attention_ratio is not None):
        raise ConfigError(
            "allocation='adaptive' during training needs one budget for all parameters: give pruning_ratio or "
            "target_params, without mlp_ratio and attention_ratio."
        )


def warn_of_unused_choices(config: PrunerConfig, schedule: PruningSchedule) -> None:
    """Warn about options of the callback that change nothing.

    Warns:
        PruningWarning: Names every such option, and why it changes nothing.
    """
    reasons = dict.fromkeys(("pad_to_multiple_of", "vocab_criterion"), "no token is removed during training")
    reasons["text_column"] = "the callback takes the token ids of the training batches"
    warn_of_unused_options(config, reasons)
    if schedule.num_prunings == 1:
        unused = ("shape",) if schedule.end == schedule.start else ("end", "shape")
        warn_of_unused(schedule, dict.fromkeys(unused, "num_prunings=1 prunes at the start alone"))


def warn_of_plain_push() -> None:
    """Warn, before the first step, about the files that a Trainer without the mixin will push."""
    warnings.warn(
        "push_to_hub=True of a plain Trainer uploads the Trainer's own model card, without plan and figures of the "
        "pruning, and training_args.bin, a pickle that holds hub_token. Use class MyTrainer(ContextPruneTrainerMixin, "
        "Trainer), or leave push_to_hub out and call callback.push_to_hub(repo_id) after train().",
        PruningWarning,
        stacklevel=3,
    )


def check_types(config: object, schedule: object) -> None:
    """Refuse arguments of another type, such as the two swapped.

    Raises:
        ConfigError: Names the argument.
    """
    if isinstance(config, ThresholdConfig):
        raise ConfigError(
            "The callback's config is a ThresholdConfig; the paper's thresholds decide once, on calibration text. Use "
            "prune() with them, and recover() after it, or give a PrunerConfig here."
        )
    for value, kind, name in ((config, PrunerConfig, "config"), (schedule, PruningSchedule, "schedule")):
        if not isinstance(value, kind):
            raise ConfigError(
                f"The callback's {name} is a {type(value).__name__}; it must be a {kind.__name__}: "
                f"ContextPruneCallback(PrunerConfig(...), PruningSchedule(...))."
            )


def check_not_cut(last: PruningPlan | None, widths: Sequence[LayerWidths]) -> None:
    """Refuse to begin again with the model that the last training with this callback has pruned.

    Raises:
        ConfigError: It is that model.
    """
    if last is not None and tuple(widths) == last.widths != last.dense:
        raise ConfigError(
            "The model was pruned by the last training with this callback; another one would prune it as much again. "
            "Resume from a checkpoint (load_checkpoint), continue in a Trainer without the callback, or begin with a "
            "new model."
        )


def check_attention(model: PreTrainedModel) -> None:
    """Refuse flash attention on single precision: statistics are not taken under the Trainer's autocast.

    Raises:
        ConfigError: The model has float32 weights and flash attention.
    """
    kind = str(attention_implementation(model.config))
    if "flash" in kind and model.dtype == torch.float32:
        raise ConfigError(
            f"The model has float32 weights and attn_implementation={kind!r}, which takes half precision only: "
            f"pruning runs the model outside of the Trainer's autocast. Load it with dtype=torch.bfloat16, or with "
            f"attn_implementation='sdpa'."
        )


def check_reachable(model: PreTrainedModel, config: PrunerConfig, first: float) -> None:
    """Refuse, from shapes alone, a size that can't be reached, and uniform widths where they vary already.

    Args:
        model: The model before the training.
        config: What is asked for.
        first: Share of the whole removal that the first pruning does.

    Raises:
        BudgetError: Fewer parameters than the narrowest layers have, or too many at once.
        ConfigError: The widths vary.
    """
    view = ModelView.of(model)
    check_round_to(view.widths, config)
    if config.allocation == "uniform":
        if widths_vary(view.widths):
            raise ConfigError(
                "The model's widths vary from layer to layer; allocation='uniform' during training needs equal ones. "
                "Use allocation='adaptive' with pruning_ratio."
            )
        return
    remove = ParameterBudget.of(config, view.num_parameters).remove_params or 0
    narrowest = [
        replace(widths, neurons=min(config.round_to, widths.neurons), kv_groups=min(1, widths.kv_groups))
        for widths in view.widths
    ]
    most = removed_params(view.widths, narrowest, view.costs)
    if remove > most:
        raise BudgetError(
            f"Asked to remove {remove:,} of {view.num_parameters:,} parameters; neurons and KV groups can give at "
            f"most {most:,}. Ask for less."
        )
    try:
        check_adaptive(model, config, int(first * remove))
    except BudgetError as error:
        raise BudgetError(f"At the first pruning of the schedule: {error} Or prune in more steps.") from error


def check_output_dir(output_dir: str | None) -> None:
    """Refuse a folder whose files a training would replace though this package did not write them.

    Raises:
        ConfigError: The folder holds a plan or a modeling file of another program, or a link in the place of one.
        SaveError: The folder lies in one that this package saved.
    """
    refuse_inside_own(resolve_path(output_dir or ".", SaveError))
    for name in (PLAN_NAME, *MODELING_FILES):
        path = Path(output_dir or ".", name)
        if os.path.lexists(path) and not _is_ours(path):
            raise ConfigError(
                f"{path} was not written by this package (or is a link or damaged), and the training would replace it. "
                f"Move it, or train with another output_dir."
            )


def _is_ours(path: Path) -> bool:
    if path.is_symlink():
        return False
    if path.name != PLAN_NAME:
        return is_modeling_file(str(path))
    try:
        PruningPlan.load(path)
    except PlanError:
        return False
    return True


def check_arguments(args: TrainingArguments, state: TrainerState) -> None:
    """Refuse ways of training that hold on to the shapes of the weights, or replace the callback.

    Raises:
        ConfigError: Names the option.
    """
    reasons = {
        "fsdp": (args.fsdp, "its shards can't change their shape"),
        "deepspeed": (args.deepspeed, "its flat partitions can't change their shape"),
        "torch_compile (or accelerate's dynamo backend)": (
            args.torch_compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO",
            "the compiled graph has the old shapes",
        ),
        "FSDP or DeepSpeed of accelerate's environment": (
            parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"),
            "shards and flat partitions can't change their shape",
        ),
        "restore_callback_states_from_checkpoint": (
            args.restore_callback_states_from_checkpoint,
            "it replaces your callback by one with the config of the checkpoint; resuming works without it",
        ),
        "auto_find_batch_size": (
            args.auto_find_batch_size,
            "it begins the training again, with a model that is already pruned",
        ),
        "more than one GPU in one process (DataParallel)": (
            args.n_gpu > 1,
            "the replicas are made from a wrapper; use accelerate launch",
        ),
        "use_liger_kernel": (
            args.use_liger_kernel,
            "its modules are not the modules that a narrower model is built from",
        ),
        "hyperparameter_search": (state.is_hyper_param_search, "each trial needs a callback of its own"),
    }
    for name, (used, reason) in reasons.items():
        if used:
            raise ConfigError(
                f"ContextPruneCallback does not work with {name}: {reason}. Train without it, or use prune() before, "
                f"and train the smaller model."
            )
