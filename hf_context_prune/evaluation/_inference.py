"""Small helpers shared by the measurements: evaluation mode and the limits of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def evaluation_mode(model: "PreTrainedModel") -> Iterator[None]:
    """Put `model` in evaluation mode without gradients and give every submodule its old mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def max_positions(model: "PreTrainedModel") -> int | None:
    """Return the longest sequence (tokens) that the config allows, or None where it names no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def vocabulary_rows(model: "PreTrainedModel") -> int:
    """Return how many token ids `model` can both read and predict (rows of the smaller of embedding and head)."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(int(embedding.weight.shape[0]) for embedding in embeddings if embedding is not None)
