"""Small helpers shared by the measurements: evaluation mode and the limits of a model."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hf_context_prune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def check_token_ids(model: "PreTrainedModel", tokenizer: Any, sequences: Iterable[Sequence[int]]) -> None:  # noqa: ANN401
    """Refuse token ids that `model` has no row for.

    Raises:
        DataError: The tokenizer is another model's; names the token.
    """
    rows = vocabulary_rows(model)
    highest = max((max(ids) for ids in sequences if len(ids)), default=0)
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise DataError(
            f"The tokenizer gives the id {highest} ({token!r}), but the model has only {rows} token rows (ids 0 to "
            f"{rows - 1}). Use the tokenizer that belongs to the model."
        )
