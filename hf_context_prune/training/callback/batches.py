"""A training batch -> the tokens of it that are text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_context_prune.errors import DataError

_IGNORED = -100
"""Label of what the loss passes over."""


def read_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any], pad_token_id: int | None) -> torch.Tensor:
    """The token ids that a model's forward pass was given, without padding, [tokens], int64, on the CPU.

    Padding is what a mask [batch, tokens] hides, what does not attend to itself in a mask [batch, 1 or heads, tokens,
    tokens], or without a mask, padding tokens that the labels leave out of the loss; without labels too (the Trainer
    takes them away for `label_smoothing_factor`), those at the beginning and the end of a row.

    Args:
        args: Positional arguments of the forward pass.
        kwargs: The others.
        pad_token_id: Of the model's config.

    Raises:
        DataError: There are no token ids.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
        raise DataError(
            f"The training batches have no input_ids (but {', '.join(sorted(kwargs)) or 'nothing'}), which are the "
            f"text that pruning goes by. Give token ids to the model."
        )
    mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        own = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        mask = own == 0 if mask.is_floating_point() else own  # floats are added to the scores
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        ids = ids[mask.bool()]
    elif mask is None and pad_token_id is not None:
        text = ids != pad_token_id
        if labels is None:
            ids = ids[(text.cumsum(-1) > 0) & (text.flip(-1).cumsum(-1).flip(-1) > 0)]
        elif isinstance(labels, torch.Tensor) and labels.shape == ids.shape:
            ids = ids[text | (labels != _IGNORED)]
    return ids.detach().reshape(-1).cpu()
