"""A Modelfile for Ollama beside a GGUF file: ``ollama create NAME -f Modelfile``.

Ollama's templates are Go's. The chat template of the tokenizer (Jinja) is rendered for a few conversations, from which
the text around each turn is read; where that gives back other conversations exactly (but for blanks around a message,
which Go keeps and many templates drop), it is written as Go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_context_prune.data.chat_templates import ChatRefused, render_chats
from hf_context_prune.data.samples import leading_token
from hf_context_prune.utils.file_names import MODELFILE_NAME
from hf_context_prune.utils.files import write_file

_MARKS = {"system": "⟦s⟧", "user": "⟦u⟧", "assistant": "⟦a⟧"}
"""Contents that no template has."""
_QUOTES = '"""'


@dataclass(frozen=True)
class _Turns:
    """The text around the turns of a chat.

    Attributes:
        around: Text before and after the content of a turn, by role.
        prompt: Text after which the model answers.
        system: The system message that the template adds to a chat without one; None: none.
    """

    around: dict[str, tuple[str, str]]
    prompt: str
    system: str | None

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the prompt of a conversation."""
        given = list(messages)
        if self.system is not None and given[0]["role"] != "system":
            given.insert(0, {"role": "system", "content": self.system})
        turns = (self.around[one["role"]][0] + one["content"] + self.around[one["role"]][1] for one in given)
        return "".join(turns) + self.prompt

    def to_go(self) -> str:
        """Return the Go template."""
        cases: list[str] = []
        for role, (before, after) in self.around.items():
            word = "if" if not cases else "else if"
            cases.append(f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
        return f"{{{{- range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def write_modelfile(folder: Path, weights: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the Modelfile.

    Args:
        folder: The folder of the GGUF file.
        weights: Name of the GGUF file.
        tokenizer: With the chat template, if the model has one.

    Raises:
        LoadError: The chat template exceeds its limits.
    """
    lines = [f"FROM ./{weights}"]
    turns = _read_turns(tokenizer)
    if turns is not None:
        lines.append(f"TEMPLATE {_QUOTES}{turns.to_go()}{_QUOTES}")
        if turns.system is not None:
            lines.append(f"SYSTEM {_QUOTES}{turns.system}{_QUOTES}")
        if (stop := turns.around["assistant"][1].strip()) and '"' not in stop:
            lines.append(f'PARAMETER stop "{stop}"')
    elif tokenizer.chat_template:
        lines.append("# The chat template can't be written as a template of Ollama's: write one by hand.")
    write_file(folder / MODELFILE_NAME, "\n".join(lines) + "\n")


def _read_turns(tokenizer: PreTrainedTokenizerBase) -> _Turns | None:
    """Return the text around turns; None where there is no chat template, or one that does more than that."""
    if not tokenizer.chat_template:
        return None
    system, user, assistant = (_say(role, mark) for role, mark in _MARKS.items())
    try:
        refused = isinstance(render_chats(tokenizer, [([system, user], {})])[0], ChatRefused)
        begin = [] if refused else [system]
        chats = [
            [user],
            [*begin, user],
            [*begin, user, assistant, user],
            [user, assistant, user, assistant, user],
            [user, *(3 * [_say("assistant", "<think>why</think>so"), _say("user", "a\n\nb  c")])],
        ]
        jobs: list[tuple[Sequence[Any], dict[str, Any]]] = [(chat, {"add_generation_prompt": True}) for chat in chats]
        found = render_chats(tokenizer, [([*begin, user], {"add_generation_prompt": False}), *jobs])
    except ChatRefused:
        return None
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        return None
    # A token that the tokenizer puts before every text, llama.cpp puts there itself.
    first = "" if leading_token(tokenizer) is None else str(tokenizer.bos_token)
    closed, *rendered = (text.removeprefix(first) for text in texts)
    turns = _split(closed, *rendered[:3], has_system=not refused)
    if turns is None or _QUOTES in turns.to_go() + str(turns.system) or "{{" in str(turns.around) + turns.prompt:
        return None
    return turns if rendered == [turns.render(chat) for chat in chats] else None


def _say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _split(closed: str, alone: str, two: str, long: str, *, has_system: bool) -> _Turns | None:
    """Read the text around turns from conversations."""
    system, user, assistant = _MARKS.values()
    if closed.count(system) != has_system or closed.count(user) != 1 or long.count(assistant) != 1:
        return None
    if not (two.startswith(closed) and long.startswith(closed)):
        return None
    prompt = two[len(closed) :]
    before_system, rest = closed.split(system) if has_system else ("", closed)
    between, after_user = rest.split(user)
    answered, after = long.split(assistant)
    before_assistant, lead = answered[len(closed) :], alone.split(user)[0]
    found = []
    for cut in range(len(between) + 1 if has_system else 1):  # where the system's turn ends and the user's begins
        after_system, before_user = between[:cut], between[cut:]
        end = before_user + user + after_user + prompt
        if not (after.endswith(end) and lead.endswith(before_user)):
            continue
        added, default = lead[: len(lead) - len(before_user)], None
        if added:
            if not (added.startswith(before_system) and added.endswith(after_system)):
                continue
            default = added[len(before_system) : len(added) - len(after_system)]
        around = {"system": (before_system, after_system)} if has_system else {}
        around |= {
            "user": (before_user, after_user),
            "assistant": (before_assistant, after[: len(after) - len(end)]),
        }
        found.append(_Turns(around, prompt, default))
    alike = [turns for turns in found if has_system and turns.around["system"][1] == turns.around["user"][1]]
    return next(iter(alike or found), None)
