"""Log-probabilities of several continuations of one text: what they share is computed once, with a KV cache."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import tqdm
from transformers import DynamicCache

from ._inference import evaluation_mode, max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Alternatives:
    """Token sequences that begin alike, such as a question with each of its choices.

    Attributes:
        sequences: Token ids, each of at least two tokens.
        starts: From which token on each is scored, from 1.
    """

    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    @property
    def shared(self) -> int:
        """Tokens that all sequences begin with; at least one is left to every sequence."""
        most = min(len(sequence) for sequence in self.sequences) - 1
        first = self.sequences[0]
        for place in range(most):
            if any(sequence[place] != first[place] for sequence in self.sequences):
                return place
        return most

    def shortened(self, limit: int | None) -> "Alternatives":
        """Without as many tokens at the begin as makes the longest fit into `limit` positions."""
        over = 0 if limit is None else max(len(sequence) for sequence in self.sequences) - limit
        if over <= 0:
            return self
        starts = tuple(max(1, start - over) for start in self.starts)
        return Alternatives(tuple(sequence[over:] for sequence in self.sequences), starts)


def continuation_log_probs(
    model: "PreTrainedModel", items: Sequence[Alternatives], *, batch_tokens: int = _BATCH_TOKENS
) -> list[list[float]]:
    """Sum of log-probabilities (nats) of the scored tokens of every sequence.

    Items are batched by the length of what their sequences share. A batch's shared part runs once, padded on the left;
    the rests run on its repeated KV cache, padded on the right. Results do not depend on the batching.

    Args:
        model: A causal LM, in any mode and dtype, on any device.
        items: Longer ones than the model has positions lose tokens at their begin.
        batch_tokens: Tokens a batch, padding included.

    Returns:
        For each item, one value a sequence.
    """
    limit = max_positions(model)
    items = [item.shortened(limit) for item in items]
    order = sorted(range(len(items)), key=lambda index: -items[index].shared)
    results: list[list[float]] = [[] for _ in items]
    name = "hf_context_prune.evaluation"
    with evaluation_mode(model), tqdm(total=len(items), desc="Answering", unit="question", name=name) as bar:
        places = iter(order)
        for batch in _batches([items[index] for index in order], batch_tokens):
            for scores in _score(model, batch):
                results[next(places)] = scores
            bar.update(len(batch))
    return results


def _batches(items: Sequence[Alternatives], batch_tokens: int) -> list[list[Alternatives]]:
    batches: list[list[Alternatives]] = [[]]
    for item in items:
        rows = sum(len(other.sequences) for other in [*batches[-1], item])
        longest = max(len(sequence) for other in [*batches[-1], item] for sequence in other.sequences)
        # What shares nothing has no cache, so it does not go with what does.
        if batches[-1] and (rows * longest > batch_tokens or (not item.shared and batches[-1][0].shared)):
            batches.append([])
        batches[-1].append(item)
    return [batch for batch in batches if batch]


def _score(model: "PreTrainedModel", batch: Sequence[Alternatives]) -> list[list[float]]:
    shared = [item.shared for item in batch]
    prefixes = [item.sequences[0][:length] for item, length in zip(batch, shared, strict=True)]
    rests = [sequence[length:] for item, length in zip(batch, shared, strict=True) for sequence in item.sequences]
    owner = torch.tensor([index for index, item in enumerate(batch) for _ in item.sequences])
    # Logits of a prefix are needed from its last scored token on; its last position predicts every rest's first token.
    needed = max(max(length - min(item.starts), 0) for item, length in zip(batch, shared, strict=True)) + 1
    width = max(shared)
    ids, mask = _padded(prefixes, width, left=True)
    if width == 0:  # sequences that share nothing: no first token is ever scored
        log_probs, cache = torch.zeros(len(batch), 0, 0), None
    else:
        log_probs, cache = _forward(model, ids, mask, None, None, keep=min(needed, width))
    totals = [[0.0] * len(item.sequences) for item in batch]
    for index, (item, length) in enumerate(zip(batch, shared, strict=True)):
        for number, (sequence, start) in enumerate(zip(item.sequences, item.starts, strict=True)):
            for place in range(start, min(length + 1, len(sequence))):
                if length:  # the row of logits at position place - 1, counted from the end of the prefix
                    totals[index][number] += float(log_probs[index, place - 1 - length, sequence[place]])
    tail = max(len(rest) for rest in rests) - (1 if width else 0)
    if tail > 0:
        inputs = [rest[: len(rest) - 1] for rest in rests]
        more, rest_mask = _padded(inputs, max(len(rest) for rest in inputs), left=False)
        if cache is not None:
            cache.batch_select_indices(owner.to(model.device))
        before = mask[owner] if width else None
        rest_log_probs, _ = _forward(model, more, rest_mask, before, cache, keep=None)
        for row, (index, rest) in enumerate(zip(owner.tolist(), rests, strict=True)):
            number = row - int((owner < index).sum())
            start = batch[index].starts[number]
            for place in range(1, len(rest)):
                if shared[index] + place >= start:
                    totals[index][number] += float(rest_log_probs[row, place - 1, rest[place]])
    return totals


def _padded(rows: Sequence[Sequence[int]], width: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [rows, width] int64; padding is the token 0."""
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def _forward(
    model: "PreTrainedModel",
    ids: torch.Tensor,
    mask: torch.Tensor,
    before: torch.Tensor | None,
    cache: DynamicCache | None,
    *,
    keep: int | None,
) -> tuple[torch.Tensor, DynamicCache]:
    """Log-probabilities [rows, positions, vocabulary] float32 (the last `keep` positions), and the KV cache."""
    accepted = inspect.signature(model.forward).parameters
    whole = mask if before is None else torch.cat([before, mask], dim=1)
    positions = (whole.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    cache = DynamicCache(config=model.config) if cache is None else cache
    # transformers 5.24 renamed the argument, and warns about the old name where it knows the new one.
    arguments: dict[str, Any] = {"cache" if "cache" in accepted else "past_key_values": cache, "use_cache": True}
    if keep is not None and "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = keep
    if "position_ids" in accepted:
        arguments["position_ids"] = positions.to(model.device)
    output = model(input_ids=ids.to(model.device), attention_mask=whole.to(model.device), **arguments)
    logits = output.logits if keep is None else output.logits[:, -keep:]
    return logits.float().log_softmax(dim=-1).cpu(), cache
