"""``hf-context-prune chat``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hf_context_prune.errors import ContextPruneError
from hf_context_prune.pipelines.sampling import Sampling
from hf_context_prune.utils.options import GENERATION, MODEL

from .options import (
    NONE,
    DeviceOption,
    Dtype,
    DtypeOption,
    FormatOption,
    Given,
    ModelArgument,
    OutputFormat,
    RevisionOption,
    options_of,
    shared,
)
from .output import out, show_error

if TYPE_CHECKING:
    from hf_context_prune.pipelines.chat import Conversation

NEW = "/new"


@options_of(Sampling, into="options")
def chat(
    model: ModelArgument,
    base: Annotated[
        str | None, shared("Another model, such as the base of MODEL: both answer, side by side.", MODEL)
    ] = None,
    plain: Annotated[
        bool, shared("Continue the text, even if the tokenizer has a chat template.", GENERATION, "--plain")
    ] = False,
    options: Given = NONE,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Talk to MODEL in the terminal, or to MODEL and its base side by side.

    A model with a chat template answers and remembers the conversation; any other one continues your text. Type /new
    to begin again, and press Ctrl-D or Ctrl-C to end.

    From a pipe, every line is a prompt of its own, and the answers go to stdout; --format json writes one object per
    line.
    """
    sampling = Sampling(**options)
    from hf_context_prune.pipelines.chat import open_conversations

    conversations = open_conversations(
        model, base, sampling, plain=plain, dtype=dtype.value, revision=revision, device=device
    )
    if sys.stdin.isatty():
        _talk(conversations)
    else:
        _answer_lines(conversations, sys.stdin, format)


def _answer_lines(conversations: Sequence[Conversation], lines: Iterable[str], format: OutputFormat) -> None:
    """Answer every line by itself."""
    from hf_context_prune.pipelines.chat import answer_side_by_side

    failed = False
    for line in lines:
        if not (prompt := _readable(line)):
            continue
        try:
            *_, texts = answer_side_by_side(conversations, prompt)
        except ContextPruneError as error:  # of this line alone
            show_error(str(error))
            failed = True
            continue
        finally:
            _forget(conversations)
        if format is OutputFormat.json:
            names = ("base_answer", "answer")[-len(texts) :]
            out(json.dumps({"prompt": prompt, **dict(zip(names, texts, strict=True))}, ensure_ascii=False))
        elif len(texts) == 1:
            out(texts[0].strip())
        else:
            for name, text in zip(_names(conversations), texts, strict=True):
                out(f"{name}: {text.strip()}")
    if failed:
        raise typer.Exit(1)


def _forget(conversations: Sequence[Conversation]) -> None:
    for conversation in conversations:
        conversation.forget()


def _readable(line: str) -> str:
    """Return a line without blanks around it; bytes that are no UTF-8 become replacement characters."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()


def _talk(conversations: Sequence[Conversation]) -> None:
    """Answer what is typed, until it ends with Ctrl-D or Ctrl-C."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - `input` then edits lines and knows those before
    console = Console(highlight=False)
    kind = "answers" if conversations[-1].answers else "continues your text"
    console.print(
        f"{escape(_names(conversations)[-1])} {kind}. {NEW} begins again, Ctrl-D ends.", style="dim", soft_wrap=True
    )
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            prompt = _readable(input("> "))  # with the prompt, so that readline knows the width of the line
            if prompt == NEW:
                _forget(conversations)
            elif prompt:
                try:
                    _show_answer(console, conversations, prompt)
                except ContextPruneError as error:  # of this prompt alone
                    show_error(str(error), console)
    console.print()


def _show_answer(console: Console, conversations: Sequence[Conversation], prompt: str) -> None:
    """Show the answer while it is written."""
    from hf_context_prune.pipelines.chat import answer_side_by_side

    if len(conversations) == 1:
        shown = ""
        for text in conversations[0].answer(prompt):
            console.print(Text(text[len(shown) :]), end="", soft_wrap=True)
            shown = text
        console.print()
        return
    names, table = _names(conversations), Table()
    with Live(console=console, transient=True, vertical_overflow="ellipsis") as live:
        for texts in answer_side_by_side(conversations, prompt):
            table = _side_by_side(names, texts)
            live.update(table)
    console.print(table)


def _side_by_side(names: Sequence[str], texts: Sequence[str]) -> Table:
    table = Table(expand=True)
    for name in names:
        table.add_column(escape(name), ratio=1, overflow="fold")
    table.add_row(*(Text(text.strip()) for text in texts))
    return table


def _names(conversations: Sequence[Conversation]) -> list[str]:
    """Return how the models are called: the base says what it is."""
    names = [conversation.name for conversation in conversations]
    return [f"base: {names[0]}", names[1]] if len(names) == 2 else names
