"""Find the tokens that a chat template writes itself: they must stay, even if the domain's text lacks them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_context_prune.data.chat_templates import render_chats

_PROPERTIES = {"a": {"type": "string", "description": "a", "enum": ["a"]}}
_FUNCTION = {
    "name": "a",
    "description": "a",
    "parameters": {"type": "object", "properties": _PROPERTIES, "required": ["a"]},
    "return": {"type": "string", "description": "a"},
}
_CALL = {"type": "function", "id": "a", "function": {"name": "a", "arguments": {"a": "a"}}}
_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"tools": [{"type": "function", "function": _FUNCTION}]},
    {"documents": [{"title": "a", "text": "a"}]},
    {"enable_thinking": True},
    {"enable_thinking": False},
)
"""Options, beside the turns, that templates on the Hub read."""


def template_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens of conversations that hold little but the text of the chat template (or of each of several).

    Empty conversations are not enough: spaces around a turn's content would be merged, and some templates refuse them.

    Raises:
        LoadError: The template exceeds its limits; see [`render_chats`][].
    """
    templates = getattr(tokenizer, "chat_template", None)
    found: set[int] = set()
    for template in templates.values() if isinstance(templates, Mapping) else [templates] if templates else ():
        texts = list(_dates()) if "strftime_now" in template else []
        jobs = [
            (turns, {"add_generation_prompt": turns[-1]["role"] != "assistant", "chat_template": template, **options})
            for turns, options in itertools.product(_conversations(), _OPTIONS)
        ]
        # A template is a program: it may refuse a system turn, or need tools.
        texts += [text for text in render_chats(tokenizer, jobs) if isinstance(text, str)]
        for text in texts:
            found.update(tokenizer.encode(text, add_special_tokens=False))
    return found


def _conversations() -> Iterator[list[dict[str, Any]]]:
    for content in ("", "a"):
        turns: list[dict[str, Any]] = [{"role": role, "content": content} for role in ("system", "user", "assistant")]
        called: list[dict[str, Any]] = [turns[1], {"role": "assistant", "content": content, "tool_calls": [_CALL]}]
        answer = {"role": "tool", "content": content, "name": "a", "tool_call_id": "a"}
        yield from (turns, turns[1:], turns[1:2], [*called, answer], [*called, answer, turns[2]])
        thought = {"role": "assistant", "content": content, "reasoning_content": "a"}
        yield [turns[1], thought]


def _dates() -> Iterator[str]:
    """Yield every day and month that a template may write, since the date changes."""
    for month in range(1, 13):
        yield date(2024, month, 1).strftime("%B %B %b %b")
    for day in range(1, 32):
        yield date(2024, 1, day).strftime(f"%d {day} %A %A %a %a")
