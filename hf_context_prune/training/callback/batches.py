"""Training batches -> the text that a pruning goes by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_context_prune.errors import DataError
from hf_context_prune.utils.distributed import all_gather

_IGNORED = -100
"""Label of a position that the loss leaves out."""


class BatchListener:
    """Collects the token ids that pass through a model's forward with gradients, as the Trainer feeds it.

    Args:
        most_tokens: Tokens to keep at most, the last ones.

    Attributes:
        seen: Token ids of every forward pass since the last `take`, each int64 [tokens].
    """

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.seen: list[torch.Tensor] = []
        self._hook: Any = None
        self._paused = False

    @property
    def is_listening(self) -> bool:
        """Whether it listens to a model."""
        return self._hook is not None

    def start(self, model: nn.Module) -> None:
        """Listen to a model from now on."""
        self._hook = model.register_forward_pre_hook(self.listen, with_kwargs=True)

    def stop(self) -> None:
        """Stop listening, and forget what was collected."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self.seen = None, []

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Collect nothing inside the context."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def listen(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Collect the text of one forward pass (a forward pre-hook)."""
        if not model.training or self._paused or not torch.is_grad_enabled():  # SFTTrainer may run a batch twice
            return
        self.seen.append(read_batch(args, kwargs, getattr(model.config, "pad_token_id", None)))
        while sum(map(len, self.seen[1:])) >= self.most_tokens:  # after an interrupted training, nobody takes them
            del self.seen[0]

    def take(self) -> list[int]:
        """Return the collected token ids of all processes, and begin again; every process has to call it."""
        own = [int(index) for tokens in self.seen for index in tokens.tolist()]
        self.seen = []
        return [index for tokens in all_gather(own) for index in tokens]


def read_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any], pad_token_id: int | None) -> torch.Tensor:
    """Return the token ids that a model's forward pass was given, without padding, int64 [tokens], on the CPU.

    Padding is what a mask [batch, tokens] hides, what does not attend to itself in a mask [batch, 1 or heads, tokens,
    tokens], or without a mask, padding tokens that the labels leave out of the loss; without labels too (the Trainer
    takes them away for `label_smoothing_factor`), padding tokens at the beginning and the end of a row.

    Args:
        args: Positional arguments of the forward pass.
        kwargs: Keyword arguments of the forward pass.
        pad_token_id: The padding token of the model's config.

    Raises:
        DataError: There are no token ids.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
        raise DataError(
            f"The training batches have no input_ids (but {', '.join(sorted(kwargs)) or 'nothing'}), and pruning goes "
            f"by their text. Give token ids to the model."
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


def pack_samples(tokens: list[int], model: PreTrainedModel, *, max_seq_length: int, at_least: int = 1) -> torch.Tensor:
    """Cut the last tokens into samples.

    Args:
        tokens: Token ids of the training, in their order.
        model: Its positions limit the length.
        max_seq_length: Tokens per sample, at most.
        at_least: Samples that are needed: little text gives shorter ones.

    Returns:
        int64 [samples, length].

    Raises:
        DataError: There are fewer than 2 tokens per sample.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or max_seq_length
    length = min(max_seq_length, positions, len(tokens) // at_least)
    if length < 2:
        raise DataError(
            f"The training batches up to the first pruning hold {len(tokens)} tokens, but {2 * at_least} are needed. "
            f"Prune later, or check the data."
        )
    count = len(tokens) // length
    return torch.tensor(tokens[-count * length :]).view(count, length)
