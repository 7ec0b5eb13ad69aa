"""Tokens that a tokenizer adds to a text by itself."""

from __future__ import annotations

from typing import Any


def leading_token(tokenizer: Any) -> int | None:  # noqa: ANN401
    """The token that a tokenizer itself puts before a text: Gemma's and Llama's do, SmolLM2's and GPT-2's don't.

    Models that never read without it give other activations without it (whatever comes first becomes the attention
    sink), so statistics and losses are then those of another model.
    """
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[:1] == [bos] else None
