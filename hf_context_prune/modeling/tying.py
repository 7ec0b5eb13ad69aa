"""Which weights of a model are one tensor in memory, whatever its config says."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from .configuration_context_pruned import has_tied_head

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


def first_names(model: nn.Module) -> dict[str, str]:
    """Return {every name of a weight: the first name of that weight}."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def head_weight_name(model: PreTrainedModel) -> str:
    """Return the state-dict name of the LM head's weight."""
    head = model.get_output_embeddings()
    return next(f"{path}.weight" for path, module in model.named_modules() if module is head)


def config_as_tied(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the model's config with ``tie_word_embeddings`` as it is in memory; a copy if it says otherwise.

    `transformers` loads a checkpoint with an LM head of its own untied, and leaves ``tie_word_embeddings=True`` in the
    config. A model that is built from that config would lose the head.
    """
    tied = has_tied_head(model)
    if model.config.tie_word_embeddings == tied:
        return model.config
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = tied
    return config
