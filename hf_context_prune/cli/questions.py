"""Options for multiple-choice questions, which several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_context_prune.errors import ConfigError

if TYPE_CHECKING:
    from hf_context_prune.evaluation.options import QuestionOptions

_QUESTIONS = (
    "a .jsonl file or Hub dataset with question, choices, answer (index from 0, or letter), optionally context, "
    "source, split (test rows are asked, dev rows are examples) and id."
)
McqSource = Annotated[str | None, typer.Option("--mcq", help=f"Multiple-choice questions: {_QUESTIONS}")]
McqSources = Annotated[
    list[str] | None,
    typer.Option("--mcq", metavar="NAME=SOURCE", help=f"Multiple-choice questions of a domain: {_QUESTIONS}"),
]
McqColumns = Annotated[
    str | None, typer.Option(help="Names of their columns, where they differ: question=query,choices=options.")
]
McqSplit = Annotated[
    str | None, typer.Option(help="Split of the rows that are asked; those without one are test. Default test.")
]
McqScorer = Annotated[
    str | None,
    typer.Option(
        help="likelihood_normalised (a byte), likelihood, letter, or paper (arXiv 2312.12682). "
        "Default likelihood_normalised; paper for sweep."
    ),
]
FewShot = Annotated[
    int | None, typer.Option(min=0, help="Examples from the dev rows of a question's source. Default 0.")
]
MaxQuestions = Annotated[
    int | None, typer.Option(min=1, help="Questions at most, evenly spread. Default all; 100 for sweep.")
]


def question_options(
    sources: Mapping[str, str], options: Mapping[str, Any], **defaults: object
) -> dict[str, QuestionOptions]:
    """Options for the questions of ``--mcq``, by domain.

    Args:
        sources: Of the questions, by domain; empty where there is no ``--mcq``.
        options: Values by the name of the parameter that took them; None was not given.
        defaults: Of `QuestionOptions`, in place of its own.

    Raises:
        ConfigError: An option without questions, or one that is out of range.
    """
    from hf_context_prune.evaluation.options import QuestionOptions

    fields: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "mcq_columns": ("columns", _columns),
        "mcq_split": ("splits", lambda name: (name,)),
        "mcq_scorer": ("scorer", str),
        "few_shot": ("num_fewshot", int),
        "max_questions": ("max_questions", int),
        "harness_task": ("harness_task", lambda path: path),
    }
    chosen: dict[str, Any] = dict(defaults)
    for name, (field, convert) in fields.items():
        if options.get(name) is None:
            continue
        if not sources:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} says what to do with the questions of --mcq; give --mcq too.")
        chosen[field] = convert(options[name])
    return {domain: QuestionOptions(source, **chosen) for domain, source in sources.items()}


def _columns(text: str) -> dict[str, str]:
    """``ours=theirs,...`` as a mapping."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    for ours, _, theirs in pairs:
        if not ours.strip() or not theirs.strip():
            raise ConfigError(f"--mcq-columns is {text!r}; it must be pairs, as in question=query,choices=options.")
    found = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if len(found) < len(pairs):
        raise ConfigError(f"--mcq-columns is {text!r}; name the column of each field once.")
    return found
