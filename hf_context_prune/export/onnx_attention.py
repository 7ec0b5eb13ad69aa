"""Attention for ONNX graphs: a key/value head serves its query heads as it lies in the cache, without copies of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from hf_context_prune.utils.compat import attention_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "context_pruned_grouped"


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Compute the attention of a model by [`attend`][] within the block, then as before.

    The attention of transformers repeats every key/value head for its query heads. As a graph, that copies the whole
    cache several times per token.
    """
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    before = attention_implementation(model.config)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,  # noqa: ANN401
) -> tuple[torch.Tensor, None]:
    """Attend as an attention function of transformers does, with the query heads of a group as rows of one product.

    Args:
        module: The attention module (unused).
        query: [batch, query heads, tokens, features].
        key: [batch, KV heads, cached and new tokens, features].
        value: Like `key`.
        attention_mask: Additive mask [batch, 1, tokens, cached and new tokens]; None: every token sees all.
        scaling: Factor of the scores; None: 1 / sqrt(features).
        softcap: Limit of the scores, as in Gemma 2.
        s_aux: Score of a sink for each query head, whose share of the attention goes nowhere; None: no sinks.

    Returns:
        Output [batch, tokens, query heads, features]; no attention weights.
    """
    batch, heads, tokens, features = query.shape
    groups = key.shape[1]
    rows = (heads // groups, tokens)
    query = query * (features**-0.5 if scaling is None else scaling)
    scores = query.reshape(batch, groups, rows[0] * tokens, features) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = (scores.unflatten(2, rows) + attention_mask.unsqueeze(2)).flatten(2, 3)
    if s_aux is not None:
        sinks = s_aux.to(scores).view(groups, rows[0], 1).expand(-1, -1, tokens).reshape(1, groups, -1, 1)
        scores = torch.cat([scores, sinks.expand(batch, -1, -1, -1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    output = (weights if s_aux is None else weights[..., :-1]) @ value
    return output.reshape(batch, heads, tokens, features).transpose(1, 2).contiguous(), None
