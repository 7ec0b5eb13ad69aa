"""Two models write after the same prompt, in turns on one processor, one token per turn.

Each model runs `generate` in a thread of its own, which waits after every token for its next turn. So generation stops
where its caller stops asking (a visitor who left), the deadline holds between any two tokens, and the time of a model
is the time of its own steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopPLogitsWarper,
)

from hf_context_prune.data.chat_templates import ChatRefused, render_chat
from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.generation import get_end_token_ids, with_plain_generation
from hf_context_prune.modeling.inference import max_positions
from hf_context_prune.storage.loading import LoadedModel

from .settings import Limits

CONTINUE, CHAT, COLOUR = "Continue the text", "Chat", "Only compare my text"
"""What the models do with the text of a visitor; both show afterwards what the pruned one has lost."""
MAX_TEMPERATURE = 1.5
_REPETITION_PENALTY = 1.15  # without it, small models repeat themselves; the same for both
_TOP_P = 0.95
_SEED = 0


@dataclass(frozen=True)
class Turn:
    """An earlier question of a conversation, with the answers of both models.

    Attributes:
        question: The question.
        dense: The answer of the dense model.
        pruned: The answer of the pruned model.
    """

    question: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class Request:
    """A visitor's request.

    Attributes:
        prompt: The text.
        mode: `CONTINUE`, `CHAT` (through the chat template), or `COLOUR` (nothing is written).
        new_tokens: Upper limit of tokens to write.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn with the same seed for both models.
        turns: The conversation so far; each model reads its own answers. Only in the mode `CHAT`.
    """

    prompt: str
    mode: str = CONTINUE
    new_tokens: int = 96
    temperature: float = 0.0
    turns: tuple[Turn, ...] = ()

    def checked(self, limits: Limits) -> Request:
        """Return this request with plain numbers, after checking it against the limits.

        Raises:
            ConfigError: The prompt is empty or too long, or the page can't send such a value.
        """
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ConfigError("There is no text. Write some, or choose an example.")
        if len(self.prompt) > limits.prompt_characters:
            raise ConfigError(
                f"The text has {len(self.prompt):,} characters; this page takes at most {limits.prompt_characters:,}."
            )
        if self.mode not in (CONTINUE, CHAT, COLOUR):
            raise ConfigError(f"The mode must be {CONTINUE!r}, {CHAT!r} or {COLOUR!r}.")
        new_tokens = _check_number(self.new_tokens, "The number of tokens", 1, limits.new_tokens)
        temperature = _check_number(self.temperature, "The temperature", 0, MAX_TEMPERATURE)
        turns = self.turns if self.mode == CHAT else ()
        return Request(self.prompt, self.mode, int(new_tokens), float(temperature), turns)


def _check_number(value: object, what: str, low: float, high: float) -> float:
    # The comparison is false for NaN too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{what} must be a number from {low} to {high}.")
    return value


@dataclass(frozen=True)
class Progress:
    """The text that one model has written so far.

    Attributes:
        text: Without the prompt; the last few characters may still be missing while the model writes.
        tokens: Number of new tokens.
        first_seconds: Seconds for reading the prompt and writing the first token; None before the first token.
        seconds: Seconds of all steps of this model.
        stopped: Why it stopped: "" while it writes, else "end" (of its text), "length", or "time".
    """

    text: str = ""
    tokens: int = 0
    first_seconds: float | None = None
    seconds: float = 0.0
    stopped: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None before the second token."""
        if self.first_seconds is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / max(self.seconds - self.first_seconds, 1e-9)


class Runner:
    """One model on one prompt."""

    def __init__(self, loaded: LoadedModel, request: Request, limits: Limits, kind: str = "dense") -> None:
        """Tokenize the prompt; nothing runs yet.

        Args:
            loaded: The model, shared with other requests: its weights are only read.
            request: As `Request.checked` returned it.
            limits: The limits of the page, for the tokens of the prompt and the wait for a turn.
            kind: ``"dense"`` or ``"pruned"``: whose earlier answers it reads.

        Raises:
            ConfigError: The prompt is too long for the model or the limits, or the model has no chat template.
        """
        ids = encode_prompt(loaded, request, kind)
        room = max_positions(loaded.model)
        most = min(limits.prompt_tokens, (room - request.new_tokens) if room else limits.prompt_tokens)
        if not 0 < ids.shape[1] <= most:
            raise ConfigError(
                f"The text has {ids.shape[1]:,} tokens for {loaded.name}; this page takes at most {max(most, 0):,}."
                + (" Begin a new chat." if request.turns else "")
            )
        self._ids = ids.to(loaded.model.device)
        self._ends = get_end_token_ids(loaded.model)
        self._model = with_plain_generation(
            loaded.model, new_tokens=request.new_tokens, repetition_penalty=_REPETITION_PENALTY
        )
        self._request = request
        self._streamer = TextIteratorStreamer(loaded.tokenizer, skip_prompt=True, timeout=0, skip_special_tokens=True)
        self._turns = _Turns(limits.seconds)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.progress = Progress()

    def step(self) -> None:
        """Write one token.

        Raises:
            Exception: As the model raised it.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._generate, name="space-generation", daemon=True)
            self._thread.start()
        else:
            self._turns.begin.release()
        self._turns.over.acquire()
        if self._error is not None:
            raise self._error
        before, tokens, elapsed = self.progress, self._turns.tokens, self._turns.seconds
        ended = self._turns.last_token in self._ends
        stopped = "end" if ended else "length" if tokens >= self._request.new_tokens else ""
        first = elapsed if before.first_seconds is None else before.first_seconds
        self.progress = Progress(before.text, tokens, first, before.seconds + elapsed, stopped)
        if stopped:
            self.close()
        self._read_text()

    def stop(self) -> None:
        """End with the text so far: the time is up."""
        self.close()
        self.progress = replace(self.progress, stopped="time")

    def close(self) -> None:
        """End the thread; there are no further steps. Does nothing if it has ended."""
        if self._thread is None:
            return
        self._turns.ending = True
        self._turns.begin.release()
        self._thread.join()
        self._read_text()

    def _read_text(self) -> None:
        with suppress(Empty):  # there is no more text yet
            for part in self._streamer:
                self.progress = replace(self.progress, text=self.progress.text + part)

    def _generate(self) -> None:
        try:
            self._turns.start()
            with torch.inference_mode():
                self._model.generate(
                    input_ids=self._ids,
                    attention_mask=torch.ones_like(self._ids),
                    logits_processor=_draw_processors(self._request, self._ids.device),
                    stopping_criteria=StoppingCriteriaList([self._turns]),
                    streamer=self._streamer,
                )
        except BaseException as error:  # raised again by `step`, in the thread of the request
            self._error = error
        finally:
            self._turns.over.release()


class _Turns(StoppingCriteria):  # type: ignore[misc]
    """Hold `generate` after every token until its next turn, or end it.

    Attributes:
        begin: Released by the caller for every turn after the first.
        over: Released when a token is written, or generation has ended.
        ending: Set by the caller before the last `begin`: generation ends there.
        tokens: Number of new tokens.
        last_token: Id of the last one.
        seconds: Time of the last turn, without the hand-over between the threads.
    """

    def __init__(self, limit: float) -> None:
        self.begin, self.over = threading.Semaphore(0), threading.Semaphore(0)
        self.ending = False
        self.tokens, self.last_token, self.seconds = 0, -1, 0.0
        self._limit, self._start = limit, 0.0

    def start(self) -> None:
        """Begin the time of a turn."""
        self._start = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: Any) -> torch.Tensor:  # noqa: ANN401
        self.last_token = int(input_ids[0, -1])  # waits for an accelerator
        self.tokens += 1
        self.seconds = time.perf_counter() - self._start
        self.over.release()
        in_time = self.begin.acquire(timeout=self._limit)  # of the page: later, nobody asks any more
        self.start()
        return torch.tensor([self.ending or not in_time], device=input_ids.device)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Add Gumbel noise, so that the argmax is a draw from the softmax, by a generator of its own.

    The sampling of `generate` uses torch's global generator, which two models in turns would share.
    """

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(_SEED)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - torch.empty_like(scores).exponential_(generator=self._generator).log()


def _draw_processors(request: Request, device: torch.device) -> LogitsProcessorList:
    if not request.temperature:
        return LogitsProcessorList()
    return LogitsProcessorList([TemperatureLogitsWarper(request.temperature), TopPLogitsWarper(_TOP_P), _Draw(device)])


def race(
    runners: Sequence[Runner], seconds: float, *, clock: Callable[[], float] = time.perf_counter
) -> Generator[tuple[Progress, ...], None, None]:
    """Let models write in turns; the one that has used less time goes next, so that the faster one is seen to lead.

    Closing the iterator ends all of them.

    Args:
        runners: One per model.
        seconds: From now to the last token; looked at before every token.
        clock: Returns seconds.

    Yields:
        The progress of each model, after every token and at the end.
    """
    deadline = clock() + seconds
    try:
        while running := [runner for runner in runners if not runner.progress.stopped]:
            if clock() >= deadline:
                for runner in running:
                    runner.stop()
            else:
                min(running, key=lambda runner: runner.progress.seconds).step()
            yield tuple(runner.progress for runner in runners)
    finally:
        for runner in runners:
            runner.close()


def encode_prompt(loaded: LoadedModel, request: Request, kind: str) -> torch.Tensor:
    """Return the tokens of a prompt, int64 [1, length], after the conversation with the model of this kind.

    Raises:
        ConfigError: The model has no chat template, or it refuses the text.
    """
    tokenizer: Any = loaded.tokenizer
    if request.mode != CHAT:
        return torch.tensor([tokenizer(request.prompt)["input_ids"]])
    if not tokenizer.chat_template:
        raise ConfigError(f"{loaded.name} can't answer: it has no chat template. Let it continue the text.")
    messages = []
    for turn in request.turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": getattr(turn, kind)}]
    messages.append({"role": "user", "content": request.prompt})
    try:
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
    except ChatRefused as error:
        raise ConfigError(f"{loaded.name} can't answer: its chat template refuses the text ({error}).") from error
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
