"""Evaluation mode, and the facts of a model that every measurement needs: dtype, positions, token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from hf_context_prune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def evaluation_mode(model: PreTrainedModel, *, inference: bool = True) -> Iterator[None]:
    """Put `model` in evaluation mode, and give every submodule its previous mode back afterwards.

    Args:
        model: The model.
        inference: Also enter `torch.inference_mode`; False keeps the caller's gradient mode, for code that needs
            gradients or makes tensors that become weights.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode() if inference else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True


def dtype_name(model: PreTrainedModel) -> str:
    """Return the dtype of the weights, such as "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the longest sequence (tokens) that the config allows, or None if the config gives no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Return how many token ids `model` can both read and predict (rows of the smaller of embedding and head)."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(int(embedding.weight.shape[0]) for embedding in embeddings if embedding is not None)


def check_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Sequence[int]]
) -> None:
    """Refuse token ids that `model` has no row for.

    Raises:
        DataError: The tokenizer belongs to another model; the message names a token.
    """
    rows = vocabulary_rows(model)
    highest = max((max(ids) for ids in sequences if len(ids)), default=0)
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise DataError(
            f"The tokenizer gives the id {highest} ({token!r}), but the model has only {rows} token rows (ids 0 to "
            f"{rows - 1}). Use the tokenizer that belongs to the model."
        )
