"""Conversations with one model, or with a pruned model and its base, answered token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from hf_context_prune.data.chat_templates import ChatRefused, render_chat
from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.generation import build_cache_arguments, get_end_token_ids
from hf_context_prune.modeling.inference import check_token_ids, max_positions
from hf_context_prune.storage.loading import LoadedModel, load_model

from .sampling import Sampling

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the bytes of a character decode to while some of them are missing."""


class Conversation:
    """A conversation with one model.

    A model whose tokenizer has a chat template answers, and remembers the turns. Any other model continues each text,
    and remembers nothing.

    Attributes:
        name: Name of the model.
        answers: Whether the model answers; False if it continues the text.
    """

    def __init__(self, loaded: LoadedModel, sampling: Sampling | None = None, *, plain: bool = False) -> None:
        """Begin without any turns.

        Args:
            loaded: The model.
            sampling: How tokens are chosen.
            plain: Continue the text, even if there is a chat template.
        """
        self.name = loaded.name
        self.answers = bool(loaded.tokenizer.chat_template) and not plain
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._sampling = sampling or Sampling()
        self._turns: list[dict[str, str]] = []

    def forget(self) -> None:
        """Begin a new conversation."""
        self._turns.clear()

    def answer(self, prompt: str) -> Iterator[str]:
        """Yield the answer so far, after every token.

        Raises:
            ConfigError: The prompt has more tokens than the model has positions, or the chat template refuses it.
            DataError: The tokenizer belongs to another model.
            LoadError: The chat template takes too long.
        """
        turns = [*self._turns, {"role": "user", "content": prompt}]
        ids, turns = self._fit(prompt, turns)
        check_token_ids(self._model, self._tokenizer, [ids])
        text, written = "", []
        for token in generate_tokens(self._model, ids, self._sampling, ends=self._ends()):
            written.append(token)
            text = self._decode(written)
            if not text.endswith(_UNFINISHED):
                yield text
        if text.endswith(_UNFINISHED):
            yield text
        if self.answers:
            self._turns = [*turns, {"role": "assistant", "content": text}]

    def _fit(self, prompt: str, turns: list[dict[str, str]]) -> tuple[list[int], list[dict[str, str]]]:
        """Return the token ids of the prompt with its turns, without the oldest turns that leave no room to answer."""
        positions = max_positions(self._model)
        ids = self._encode(prompt, turns)
        while positions is not None and len(turns) > 1 and len(ids) + self._sampling.max_new_tokens > positions:
            turns = turns[2:]
            ids = self._encode(prompt, turns)
        if not ids or (positions is not None and len(ids) >= positions):
            raise ConfigError(
                f"The text has {len(ids):,} tokens, and {self.name} takes from 1 to {(positions or 2) - 1:,}. Write a "
                f"{'shorter' if ids else 'longer'} text."
            )
        return ids, turns

    def _encode(self, prompt: str, turns: Sequence[Any]) -> list[int]:
        tokenizer: Any = self._tokenizer
        if not self.answers:
            return list(tokenizer(prompt)["input_ids"])
        try:
            text = render_chat(tokenizer, turns, add_generation_prompt=True)
        except ChatRefused as error:
            raise ConfigError(
                f"The chat template of {self.name} refuses the text ({error}). Try --plain, which continues the text."
            ) from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        tokenizer: Any = self._tokenizer
        text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _ends(self) -> set[int]:
        """Return the token ids that end an answer."""
        end = self._tokenizer.eos_token_id
        return {*get_end_token_ids(self._model), *([] if end is None else [end])}


def generate_tokens(
    model: PreTrainedModel, prompt: Sequence[int], sampling: Sampling, *, ends: set[int]
) -> Iterator[int]:
    """Yield new token ids, one per step, with a KV cache and a random generator of their own.

    `generate` of transformers runs to its end or needs a thread, and draws with torch's global generator, which two
    models side by side would share.

    Args:
        model: The model.
        prompt: Token ids of the prompt, fewer than the model has positions.
        sampling: How tokens are chosen.
        ends: Token ids that end the text; they are not yielded.
    """
    arguments = build_cache_arguments(model)
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    choose = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))])
    if sampling.temperature > 0:
        choose += [TemperatureLogitsWarper(float(sampling.temperature)), TopPLogitsWarper(float(sampling.top_p))]
    positions = max_positions(model)
    room = sampling.max_new_tokens if positions is None else min(sampling.max_new_tokens, positions - len(prompt))
    seen = step = torch.tensor([list(prompt)], device=model.device)
    for _ in range(room):
        with torch.inference_mode():
            scores = choose(seen, model(input_ids=step, **arguments).logits[:, -1].float())
            if sampling.temperature > 0:
                step = torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)
            else:
                step = scores.argmax(dim=-1, keepdim=True)
            seen = torch.cat([seen, step], dim=-1)
        token = int(step)
        if token in ends:
            return
        yield token


def answer_side_by_side(conversations: Sequence[Conversation], prompt: str) -> Iterator[tuple[str, ...]]:
    """Yield the answers of all models so far, after one token of each that still writes.

    Raises:
        ContextPruneError: As [`Conversation.answer`][].
    """
    running = {index: conversation.answer(prompt) for index, conversation in enumerate(conversations)}
    texts = [""] * len(conversations)
    while running:
        for index, answer in list(running.items()):
            text = next(answer, None)
            if text is None:
                del running[index]
            else:
                texts[index] = text
        yield tuple(texts)


def open_conversations(
    model: str | Path,
    base: str | Path | None = None,
    sampling: Sampling | None = None,
    *,
    plain: bool = False,
    dtype: str = "auto",
    revision: str | None = None,
    device: str | None = None,
) -> tuple[Conversation, ...]:
    """Load a model, and a base to compare it with, and begin a conversation with each.

    Args:
        model: What [`load_model`][] reads.
        base: The same, for the base; None for none.
        sampling: How tokens are chosen.
        plain: Continue the text, even if there is a chat template.
        dtype: Floating-point type to load the weights in.
        revision: Branch, tag or commit of `model` on the Hub.
        device: As for [`load_model`][].

    Returns:
        The conversation with the base, if there is one, and that with the model.

    Raises:
        ContextPruneError: As [`load_model`][].
    """
    loaded = [load_model(model, dtype=dtype, revision=revision, device=device)]
    if base is not None:
        loaded.insert(0, load_model(base, dtype=dtype, device=device))
    return tuple(Conversation(one, sampling, plain=plain) for one in loaded)
