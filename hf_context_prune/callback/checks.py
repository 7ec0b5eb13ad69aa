"""What a pruning training can't be, told before the first step."""

from __future__ import annotations

from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..architectures import blocks, check_supported, output_projection
from ..config import PrunerConfig
from ..criteria import get_criterion
from ..errors import ConfigError
from ..planning import needed_targets
from ..sequential import check_walkable


def check_config(config: PrunerConfig) -> None:
    """Refuse options that need more than training batches.

    Raises:
        ConfigError: One of them.
    """
    if config.prunes_vocabulary:
        raise ConfigError(
            "Tokens can't go during training: the collator's tokenizer would no longer fit. Prune them before: "
            "trimmed = prune_vocabulary(model, tokenizer, text, vocab_size=...), then give trimmed.model and "
            "trimmed.tokenizer to the Trainer, and leave the vocab_* options out here."
        )
    if config.max_loss_increase is not None:
        raise ConfigError(
            "max_loss_increase finds the size on withheld text, which a training does not have. Give pruning_ratio "
            "here, or use prune(), and recover() after it."
        )
    if config.allocation == "adaptive" and (config.mlp_ratio is not None or config.attention_ratio is not None):
        raise ConfigError(
            "allocation='adaptive' during training needs one budget for all parameters: give pruning_ratio or "
            "target_params, without mlp_ratio and attention_ratio."
        )
    if config.criterion == "taylor" and config.reconstruction == "sequential":
        raise ConfigError("criterion='taylor' needs reconstruction='least_squares' or 'none'.")


def check_repair(model: PreTrainedModel, config: PrunerConfig) -> None:
    """Refuse a repair that the architecture can't have or save.

    Raises:
        ConfigError: It adds biases that vanish on reload, or can't walk the blocks.
    """
    spec = check_supported(model)
    if config.reconstruction == "sequential":
        check_walkable(model, get_criterion(config.criterion))
    if config.reconstruction == "bias":
        for target in needed_targets(config):
            if output_projection(blocks(model, spec)[0], spec, target).bias is None:
                raise ConfigError(
                    f"reconstruction='bias' adds biases that a {spec.model_type} model can't save. Use "
                    f"'least_squares' or 'sequential'."
                )


def check_arguments(args: TrainingArguments, state: TrainerState) -> None:
    """Refuse ways of training that hold on to the shapes of the weights.

    Raises:
        ConfigError: One of them.
    """
    reasons = {
        "fsdp": (args.fsdp, "its shards can't change their shape"),
        "deepspeed": (args.deepspeed, "its flat partitions can't change their shape"),
        "torch_compile": (args.torch_compile, "the compiled graph has the old shapes"),
        "auto_find_batch_size": (args.auto_find_batch_size, "it begins the training again with a model pruned already"),
        "more than one GPU in one process (DataParallel)": (
            args.n_gpu > 1,
            "the replicas are made from a wrapper; use accelerate launch",
        ),
        "hyperparameter_search": (state.is_hyper_param_search, "each trial needs a callback of its own"),
    }
    for name, (used, reason) in reasons.items():
        if used:
            raise ConfigError(
                f"ContextPruneCallback does not work with {name}: {reason}. Train without it, or use prune() before, "
                f"and train the smaller model."
            )
