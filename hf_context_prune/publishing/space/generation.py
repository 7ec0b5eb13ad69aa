"""Two models write after the same prompt, in turns on one processor, a token a step.

A plain loop over the model's forward, not `generate`: it stops where its caller stops asking (a visitor who left), its
deadline holds between any two tokens, and the time of a model is that of its own steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.generation import build_cache_arguments, get_end_token_ids
from hf_context_prune.modeling.inference import max_positions
from hf_context_prune.storage.loading import LoadedModel

from .settings import Limits

CONTINUE, ANSWER = "Continue the text", "Answer"
MAX_TEMPERATURE = 1.5
_REPETITION_PENALTY = 1.15  # small models repeat themselves without; the same for both
_TOP_P = 0.95
_SEED = 0


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for.

    Attributes:
        prompt: The text.
        mode: `CONTINUE` or `ANSWER` (through the chat template).
        new_tokens: Tokens to write at most.
        temperature: 0 takes the likeliest token; above it tokens are drawn, with the same seed for both models.
    """

    prompt: str
    mode: str = CONTINUE
    new_tokens: int = 96
    temperature: float = 0.0

    def checked(self, limits: Limits) -> Wish:
        """This, within the limits.

        Raises:
            ConfigError: The prompt is empty or too long, or a value is not one that the page can send.
        """
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ConfigError("There is no text. Write some, or choose an example.")
        if len(self.prompt) > limits.prompt_characters:
            raise ConfigError(
                f"The text has {len(self.prompt):,} characters; at most {limits.prompt_characters:,} are taken here."
            )
        if self.mode not in (CONTINUE, ANSWER):
            raise ConfigError(f"The mode must be {CONTINUE!r} or {ANSWER!r}.")
        new_tokens = _number(self.new_tokens, "The number of tokens", 1, limits.new_tokens)
        temperature = _number(self.temperature, "The temperature", 0, MAX_TEMPERATURE)
        return Wish(self.prompt, self.mode, int(new_tokens), float(temperature))


def _number(value: object, what: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN is not either
        raise ConfigError(f"{what} must be a number from {low} to {high}.")
    return value


@dataclass(frozen=True)
class Progress:
    """What one model has written so far.

    Attributes:
        text: Without the prompt.
        tokens: Number of new tokens.
        first_seconds: Reading the prompt and writing the first token; None before it.
        seconds: All steps of this model.
        stopped: Why it stopped: "" while it has not, else "end" (of its text), "length", or "time".
    """

    text: str = ""
    tokens: int = 0
    first_seconds: float | None = None
    seconds: float = 0.0
    stopped: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None before there is one."""
        if self.first_seconds is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / max(self.seconds - self.first_seconds, 1e-9)


class Runner:
    """One model on one prompt."""

    def __init__(self, loaded: LoadedModel, wish: Wish, limits: Limits) -> None:
        """Tokenize the prompt.

        Args:
            loaded: Shared with others: its weights are only read.
            wish: As `Wish.checked` gave it.
            limits: For the tokens of the prompt.

        Raises:
            ConfigError: The prompt is too long for the model or the limits, or the model has no chat template.
        """
        self._model, self._tokenizer, self._wish = loaded.model, loaded.tokenizer, wish
        ids = _encoded(loaded, wish)
        room = max_positions(loaded.model)
        most = min(limits.prompt_tokens, (room - wish.new_tokens) if room else limits.prompt_tokens)
        if not 0 < ids.shape[1] <= most:
            raise ConfigError(
                f"The text has {ids.shape[1]:,} tokens for {loaded.name}; at most {max(most, 0):,} are taken here."
            )
        self._ids = ids.to(loaded.model.device)
        self._unread = self._ids
        self._prompt_length = ids.shape[1]
        self._arguments = build_cache_arguments(loaded.model)
        self._ends = set(get_end_token_ids(loaded.model))
        self._processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(_REPETITION_PENALTY)])
        if wish.temperature:
            self._processors += [TemperatureLogitsWarper(wish.temperature), TopPLogitsWarper(_TOP_P)]
        self._draw = torch.Generator(loaded.model.device).manual_seed(_SEED)
        self.progress = Progress()

    def step(self) -> None:
        """Write one token."""
        start = time.perf_counter()
        with torch.inference_mode():
            logits = self._model(input_ids=self._unread, **self._arguments).logits[:, -1].float()
            scores = self._processors(self._ids, logits)
            if self._wish.temperature:
                token = torch.multinomial(scores.softmax(-1), 1, generator=self._draw)
            else:
                token = scores.argmax(-1, keepdim=True)
            value = int(token)  # waits for an accelerator
            self._ids, self._unread = torch.cat([self._ids, token], dim=1), token
        before, elapsed = self.progress, time.perf_counter() - start
        ended = value in self._ends
        tokens = self._ids.shape[1] - self._prompt_length
        stopped = "end" if ended else "length" if tokens >= self._wish.new_tokens else ""
        text = self._tokenizer.decode(self._ids[0, self._prompt_length :], skip_special_tokens=True)
        self.progress = Progress(
            text if stopped else text.rstrip("\ufffd"),  # a character whose other bytes are still to come
            tokens,
            before.first_seconds if before.first_seconds is not None else elapsed,
            before.seconds + elapsed,
            stopped,
        )

    def stop(self) -> None:
        """End with what there is: the time is up."""
        before = self.progress
        self.progress = Progress(before.text, before.tokens, before.first_seconds, before.seconds, "time")


def race(
    runners: Sequence[Runner], seconds: float, *, clock: Callable[[], float] = time.perf_counter
) -> Iterator[tuple[Progress, ...]]:
    """Let models write in turns; the one that has used less time goes next, so that the faster one is seen to lead.

    Args:
        runners: One a model.
        seconds: From now to the last token; looked at before every token.
        clock: Tells seconds.

    Yields:
        The progress of each, after every token and at the end.
    """
    deadline = clock() + seconds
    while running := [runner for runner in runners if not runner.progress.stopped]:
        if clock() >= deadline:
            for runner in running:
                runner.stop()
        else:
            min(running, key=lambda runner: runner.progress.seconds).step()
        yield tuple(runner.progress for runner in runners)


def _encoded(loaded: LoadedModel, wish: Wish) -> torch.Tensor:
    tokenizer: Any = loaded.tokenizer
    if wish.mode == CONTINUE:
        return torch.tensor([tokenizer(wish.prompt)["input_ids"]])
    if not tokenizer.chat_template:
        raise ConfigError(f"{loaded.name} can't answer: it has no chat template. Let it continue the text.")
    messages = [{"role": "user", "content": wish.prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
