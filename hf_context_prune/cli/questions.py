"""Options for multiple-choice questions, which several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from hf_context_prune import QuestionOptions
from hf_context_prune.errors import ConfigError
from hf_context_prune.utils.options import QUESTIONS

from .options import Given, flag_of, shared

PAPER = {"scorer": "paper", "max_questions": 100}
"""Defaults of the paper's protocol."""
QuestionSources = Annotated[
    list[str] | None,
    shared(
        "Multiple-choice questions of a domain, as for evaluate. Repeat it for more domains.",
        QUESTIONS,
        "--questions",
        metavar="NAME=SOURCE",
    ),
]


def question_options(
    sources: Mapping[str, str], given: Given, defaults: Mapping[str, Any] | None = None
) -> dict[str, QuestionOptions]:
    """Build the options for the questions of ``--questions``, by domain.

    Args:
        sources: The questions, by domain; empty without ``--questions``.
        given: Fields of `QuestionOptions` that were given on the command line, as it holds them.
        defaults: Defaults in place of the fields'.

    Raises:
        ConfigError: An option without questions, or a value out of range.
    """
    if given and not sources:
        flag = flag_of(QuestionOptions, next(iter(given)))
        raise ConfigError(f"{flag} is about the questions of --questions; give --questions too.")
    chosen = {**(defaults or {}), **given}
    if "columns" in given:
        chosen["columns"] = _columns(given["columns"])
    if "splits" in given:
        chosen["splits"] = (given["splits"],)
    return {domain: QuestionOptions(source, **chosen) for domain, source in sources.items()}


def single_question_options(given: Given, defaults: Mapping[str, Any] | None = None) -> QuestionOptions | None:
    """Build the options for the questions of one source; None without ``--questions``.

    Raises:
        ConfigError: As [`question_options`][].
    """
    rest = dict(given)
    sources = {"": rest.pop("source")} if "source" in rest else {}
    return question_options(sources, rest, defaults).get("")


def _columns(text: str) -> dict[str, str]:
    """Read ``field=column,...`` as a mapping."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    for name, _, column in pairs:
        if not name.strip() or not column.strip():
            raise ConfigError(
                f"--question-columns is {text!r}; it must be pairs, as in question=query,choices=options."
            )
    found = {name.strip(): column.strip() for name, _, column in pairs}
    if len(found) < len(pairs):
        raise ConfigError(f"--question-columns is {text!r}; name the column of each field once.")
    return found
