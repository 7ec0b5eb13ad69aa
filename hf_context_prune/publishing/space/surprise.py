"""How much more every piece of a text surprises the pruned model than the base, in bits.

The surprise of a token is minus log2 of its probability: one bit more means half as probable. The two models may cut a
text into other tokens, so pieces end where tokens of both end, and the bits of the tokens in a piece are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.inference import evaluation_mode, max_positions
from hf_context_prune.storage.loading import LoadedModel

_ROWS = 64  # of logits in float32 at once


@dataclass(frozen=True)
class Span:
    """A piece of a text.

    Attributes:
        text: The piece.
        base: Its surprise for the base, in bits.
        pruned: Its surprise for the pruned model.
    """

    text: str
    base: float
    pruned: float

    @property
    def lost(self) -> float:
        """Bits by which the pruned model is more surprised; below 0 where it is less so."""
        return self.pruned - self.base


def compare_surprise(
    base: LoadedModel, pruned: LoadedModel, text: str, lead: Callable[[LoadedModel], Sequence[int]]
) -> tuple[Span, ...]:
    """Return the surprise of both models at a text, piece by piece.

    Args:
        base: The base.
        pruned: The pruned model; its vocabulary may be smaller.
        text: The text. What lies beyond the positions of a model is left out.
        lead: Returns the tokens, at least one, that a model reads before the text.

    Raises:
        ConfigError: A tokenizer can't tell where its tokens lie in the text.
    """
    ours, theirs = (_bits_to(loaded, text, lead(loaded)) for loaded in (base, pruned))
    spans, start, before = [], 0, (0.0, 0.0)
    for end in sorted(ours.keys() & theirs.keys()):
        if end > start:
            spans.append(Span(text[start:end], ours[end] - before[0], theirs[end] - before[1]))
            start, before = end, (ours[end], theirs[end])
    return tuple(spans)


def join_words(spans: Sequence[Span]) -> list[Span]:
    """Return whole words: pieces are joined until one begins with white space or follows it."""
    words: list[Span] = []
    for span in spans:
        if words and not span.text[:1].isspace() and not words[-1].text[-1:].isspace():
            last = words.pop()
            span = Span(last.text + span.text, last.base + span.base, last.pruned + span.pruned)
        words.append(span)
    return words


def bits_per_byte(spans: Sequence[Span]) -> tuple[float, float]:
    """Return the mean surprise of the base and of the pruned model per byte of text."""
    size = max(1, sum(len(span.text.encode("utf-8", "replace")) for span in spans))
    return sum(span.base for span in spans) / size, sum(span.pruned for span in spans) / size


def _bits_to(loaded: LoadedModel, text: str, lead: Sequence[int]) -> dict[int, float]:
    """Return the bits of the text up to each end of a token, by the position of that end."""
    tokenizer: Any = loaded.tokenizer
    if not tokenizer.is_fast:
        raise ConfigError(f"The tokenizer of {loaded.name} does not tell where its tokens lie in a text.")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    room = max_positions(loaded.model)
    ids = encoded["input_ids"][: None if room is None else max(0, room - len(lead))]
    total, last, found = 0.0, 0, {}
    for bits, (_, end) in zip(_token_bits(loaded, lead, ids), encoded["offset_mapping"], strict=False):
        total, last = total + bits, max(last, end)
        found[last] = total  # tokens that are parts of one character end together: the last one counts
    return found


def _token_bits(loaded: LoadedModel, lead: Sequence[int], ids: Sequence[int]) -> list[float]:
    if not ids:
        return []
    inputs = torch.tensor([[*lead, *ids[:-1]]], device=loaded.model.device)
    targets = torch.tensor(ids, device=inputs.device)
    with evaluation_mode(loaded.model):
        logits = loaded.model(input_ids=inputs, use_cache=False).logits[0, len(lead) - 1 :]
        nats = [
            torch.nn.functional.cross_entropy(rows.float(), wanted, reduction="none")
            for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
        ]
    return [value / math.log(2) for value in torch.cat(nats).tolist()]
