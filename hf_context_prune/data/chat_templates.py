"""Chat templates, rendered in another process.

A chat template is a program of whoever made the tokenizer. Jinja's sandbox keeps it from the system, but bounds neither
its time nor its memory, and a thread that is busy in native code can't be stopped. So one child process, started for
the first conversation, renders them all. It may take a second of processor time and 128 MB for a request, and more for
long conversations; then it is ended. Memory is bounded on Linux alone, and the wait everywhere.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_context_prune.errors import LoadError
from hf_context_prune.utils.child_processes import child_environment

_WORKER = Path(__file__).with_name("_template_worker.py")
_START_SECONDS = 120.0
_WAIT_SECONDS, _WAIT_SECONDS_PER_BYTE = 20.0, 2e-6
"""The longest wait for an answer, where the child's own limit of processor time does not end it."""


class ChatRefused(Exception):  # noqa: N818 - a refusal of the template, which is no fault of this package
    """A chat template refuses the messages, as one that wants alternating roles does; the message is its own."""


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], **options: Any) -> str:  # noqa: ANN401
    """Render one conversation as `tokenizer.apply_chat_template(messages, tokenize=False, **options)` does.

    Args:
        tokenizer: The tokenizer with the template.
        messages: Turns, JSON values: anything else in them is replaced by the name of its type.
        options: Arguments of `apply_chat_template`, JSON values.

    Raises:
        ChatRefused: The template refuses the messages, or fails on them.
        LoadError: As [`render_chats`][].
    """
    (result,) = render_chats(tokenizer, [(messages, options)])
    if isinstance(result, ChatRefused):
        raise result
    return result


def render_chats(
    tokenizer: PreTrainedTokenizerBase, jobs: Sequence[tuple[Sequence[Any], Mapping[str, Any]]]
) -> list[str | ChatRefused]:
    """Render several conversations under one limit.

    Args:
        tokenizer: The tokenizer with the template.
        jobs: Pairs of messages and options, as for [`render_chat`][].

    Returns:
        The text of each, or why the template refuses it.

    Raises:
        ChatRefused: The messages can't be handed to a template: they hold themselves, say, or are nested too deeply.
        LoadError: The template exceeds the limits, or the child process can't be started.
    """
    request = {
        "chat_template": tokenizer.chat_template,
        "special_tokens_map": tokenizer.special_tokens_map,
        "jobs": [{"messages": list(messages), "options": options} for messages, options in jobs],
    }
    try:
        line = json.dumps(request, default=_plain).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatRefused(f"they can't be written as JSON: {error}") from error
    answer = _ask(line)
    if "limit" in answer:
        name = str(getattr(tokenizer, "name_or_path", "") or "this tokenizer")
        raise LoadError(
            f"The chat template of {name} {answer['limit']}, so it was stopped. Use a tokenizer with another template; "
            f"for plain text, remove this one (chat_template.jinja, or chat_template in tokenizer_config.json)."
        )
    return [ChatRefused(item["refusal"]) if "refusal" in item else item["text"] for item in answer["results"]]


def _plain(value: object) -> object:
    """Return what a template sees of a value that JSON does not know, as transformers shows it."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    return f"<{type(value).__name__}>"


class _Worker:
    """The child process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        try:
            self._process = subprocess.Popen(
                # -P: the worker's folder has modules with the names of libraries.
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=child_environment(),
            )
        except OSError as error:
            self._log.close()
            raise LoadError(f"{_CANT_START} {error}.") from error
        if not self._read_line(_START_SECONDS):
            self._log.seek(0)
            said = self._log.read()[-1000:].decode(errors="replace").strip() or "it said nothing"
            self.close()
            raise LoadError(f"{_CANT_START} {said}")

    def ask(self, request: bytes) -> bytes:
        """Return the answer to a request; empty if the child ended."""
        assert self._process.stdin is not None
        with suppress(OSError):  # the child ended: reading says so
            self._process.stdin.write(request)
            self._process.stdin.flush()
        return self._read_line(_WAIT_SECONDS + _WAIT_SECONDS_PER_BYTE * len(request))

    def _read_line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        limit = threading.Timer(seconds, self._process.kill)
        limit.daemon = True
        limit.start()
        line = self._process.stdout.readline()
        limit.cancel()
        return line

    def close(self) -> None:
        """End the child."""
        self._process.kill()  # it has nothing to save
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with suppress(OSError):  # a request that the child did not read
                    stream.close()


_CANT_START = "The process that renders chat templates can't be started:"
_lock = threading.Lock()
_worker: _Worker | None = None


def _ask(request: bytes) -> dict[str, Any]:
    """Let the child answer a request; a child that was ended is replaced for the next one."""
    global _worker
    with _lock:
        if _worker is None or _worker.owner != os.getpid():  # a fork has the pipes of its parent
            _worker = _Worker()
        answer = b""
        try:
            answer = _worker.ask(request)
        finally:
            if not answer or b'"limit"' in answer[:20]:
                _close()
    return json.loads(answer) if answer else {"limit": "takes longer than a second, or makes its process fail"}


def _close() -> None:
    global _worker
    if _worker is not None and _worker.owner == os.getpid():
        _worker.close()
    _worker = None


atexit.register(_close)
