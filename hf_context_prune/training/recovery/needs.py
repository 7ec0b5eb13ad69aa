"""What a recovery needs: memory, and room for the state of the training."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.token_rows import num_rows
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.utils.memory import free_memory

from .checkpoint import state_bytes
from .config import RecoveryConfig
from .training import MICRO_BATCH_TOKENS

USE_ADAPTERS = "train low-rank adapters (method 'lora' of the recovery), which take far less"
_WEIGHT_BYTES = {"full": 22, "lora": 6}
"""Bytes of a parameter: the weight in float32 and its copy in bfloat16; where all are trained, also the gradient, two
moments of AdamW and the best weight so far."""
_FEATURE_BYTES = {"full": 2, "lora": 3}
"""Bytes of a number that is kept for the backward pass; adapters keep their own, too."""
_LOGIT_BYTES = 14
"""Bytes of a logit: in bfloat16, in float32, its logarithm and its gradient."""


def training_bytes(model: PreTrainedModel, config: RecoveryConfig, parameters: int) -> int:
    """Return about how many bytes of memory a training takes beside the model that is trained.

    Args:
        model: The model, or the base that it will be pruned from; its weights may be on the meta device.
        config: All choices.
        parameters: Parameters of the model that is trained.
    """
    view = ModelView.of_shapes(model)
    hidden = int(model.get_input_embeddings().weight.shape[1])
    features = sum(10 * hidden + 5 * widths.neurons for widths in view.widths)  # kept for the backward pass
    tokens = max(MICRO_BATCH_TOKENS, config.max_seq_length)
    kept = _LOGIT_BYTES * num_rows(model) + _FEATURE_BYTES[config.method] * features
    return _WEIGHT_BYTES[config.method] * parameters + tokens * kept


def kept_bytes(config: RecoveryConfig, parameters: int) -> int:
    """Return the bytes of disk that the states of a training may take: the last one, and one that takes its place."""
    return state_bytes(parameters) if config.method == "full" else 0  # adapters are few


def check_memory(model: PreTrainedModel, config: RecoveryConfig) -> None:
    """Refuse a training that does not fit into the memory that is free.

    Raises:
        ConfigError: The message says how much it takes, and what takes less.
    """
    needed, free = training_bytes(model, config, model.num_parameters()), free_memory(model.device)
    if needed > free:
        what = "all weights" if config.method == "full" else "adapters"
        other = USE_ADAPTERS if config.method == "full" else "take shorter samples (max_seq_length)"
        raise ConfigError(
            f"Training {what} of {model.num_parameters():,} parameters takes about {needed / 2**30:.1f} GiB of memory "
            f"beside the model, and {free / 2**30:.1f} GiB are free. Take a machine with more memory, or {other}."
        )
