"""Multiple-choice questions: read from a file or a Hub dataset, and written as prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from hf_context_prune.errors import ConfigError, DataError, unknown_name
from hf_context_prune.utils.temporary import scratch_folder

from .sources import open_source

FIELDS = ("question", "choices", "answer", "source", "split", "id", "context")
ALL = "all"
"""Name of the group of all questions; no source can be named so."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Attributes:
        id: Name of the question in results.
        question: Text of the question.
        choices: At least two.
        answer: Index of the right choice, from 0.
        source: Where the question comes from; results are grouped by source.
        split: ``"dev"`` rows are examples for the other questions of their source.
        context: Text before the question; may be empty.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    source: str
    split: str = "test"
    context: str = ""


@dataclass(frozen=True)
class QuestionSet:
    """Questions to answer, and examples by source.

    Attributes:
        questions: The questions to answer.
        examples: The ``dev`` rows by source.
        name: A file's base name or a Hub id.
        revision: Commit of a Hub dataset.
    """

    questions: tuple[Question, ...]
    examples: Mapping[str, tuple[Question, ...]]
    name: str
    revision: str | None

    def shots(self, question: Question, count: int) -> tuple[Question, ...]:
        """Return `count` examples of the question's own source, fewer where there are fewer, never the question."""
        own = _asked(question)
        return tuple(islice((row for row in self.examples.get(question.source, ()) if _asked(row) != own), count))

    @property
    def fingerprint(self) -> str:
        """sha256 of all questions and examples, 64 hexadecimal digits."""
        rows = [self.questions, *(self.examples[source] for source in sorted(self.examples))]
        text = json.dumps([[asdict(question) for question in some] for some in rows], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_questions(
    source: Any,  # noqa: ANN401 - whatever load_documents opens
    *,
    columns: Mapping[str, str] | None = None,
    splits: Sequence[str] = ("test",),
    max_questions: int | None = None,
) -> QuestionSet:
    """Read questions.

    Args:
        source: A ``.jsonl`` (or .json, .csv, .parquet) file, a Hub dataset id ``id[:config][@split]``, or rows.
        columns: Column in the data for each of `FIELDS`, where the names differ.
        splits: Splits whose rows are answered; ``dev`` rows are examples. Rows without a split count as ``test``.
        max_questions: Largest number of questions, evenly spread over the rows of every source; None takes all.

    Raises:
        DataError: The data has no question, or a row lacks a question, choices or a valid answer; names the row.
        ConfigError: `columns` has an unknown name, or `max_questions` is below 1.
    """
    for name in columns or {}:
        if name not in FIELDS:
            raise ConfigError(unknown_name("question column", name, FIELDS))
    if max_questions is not None and max_questions < 1:
        raise ConfigError(f"max_questions is {max_questions}; it must be at least 1.")
    with scratch_folder() as scratch:
        opened = open_source(source, text_column="question", seed=0, scratch=scratch)
        records = {
            f"{table.name}, record {number}": record
            for table in opened.tables
            for number, record in enumerate(table.records, start=1)
        }
    names = dict.fromkeys(name for record in records.values() for name in record)
    for field, column in (columns or {}).items():
        if records and column not in names:
            raise DataError(_no_column(opened.name, field, column, names))
    rows = [_question(record, columns or {}, where, opened.name) for where, record in records.items()]
    if not rows:
        raise DataError(f"{opened.name} holds no question.")
    examples: dict[str, list[Question]] = {}
    for row in rows:
        if row.split == "dev":
            examples.setdefault(row.source, []).append(row)
    chosen = [row for row in rows if row.split in splits]
    if not chosen:
        found = ", ".join(sorted({repr(row.split) for row in rows}))
        raise DataError(f"{opened.name}: no question of the splits {', '.join(map(repr, splits))}; there are {found}.")
    if max_questions is not None and max_questions < len(chosen):
        places = sorted(range(len(chosen)), key=lambda place: chosen[place].source)  # each source gives its share
        spread = sorted(places[index * len(places) // max_questions] for index in range(max_questions))
        chosen = [chosen[place] for place in spread]
    frozen = {source: tuple(some) for source, some in examples.items()}
    return QuestionSet(tuple(chosen), frozen, opened.name, opened.revision)


def _question(record: Mapping[str, Any], columns: Mapping[str, str], where: str, name: str) -> Question:
    for field in ("question", "choices", "answer"):
        if (column := columns.get(field, field)) not in record:
            raise DataError(_no_column(where, field, column, record))
    values = {field: record.get(columns.get(field, field)) for field in FIELDS}
    question, choices = values["question"], values["choices"]
    answer = values["answer"]
    if isinstance(choices, Mapping) and isinstance(choices.get("text"), Sequence):  # the form of ARC
        labels = choices.get("label")
        if isinstance(labels, list | tuple) and answer in labels:  # "1" to "4" are labels, not indices
            answer = list(labels).index(answer)
        choices = choices["text"]
    if not isinstance(question, str) or not question.strip():
        raise DataError(
            f"{where}: {columns.get('question', 'question')!r} is {question!r:.80}; it must be the text of a question."
        )
    if (
        not isinstance(choices, Sequence)
        or isinstance(choices, str)
        or not 2 <= len(choices) <= len(LETTERS)
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise DataError(
            f"{where}: {columns.get('choices', 'choices')!r} is {choices!r:.80}; it must be a list of 2 to "
            f"{len(LETTERS)} texts."
        )
    index = _index(answer, len(choices))
    if index is None:
        raise DataError(
            f"{where}: {columns.get('answer', 'answer')!r} is {values['answer']!r:.80}; it must be the index of one of "
            f"the {len(choices)} choices, from 0, or its letter."
        )
    source = name if values["source"] in (None, "") else str(values["source"])
    if source == ALL:
        whose = "" if values["source"] else " (the name of the file or folder, since the row has none)"
        raise DataError(f"{where}: the source is {ALL!r}{whose}, which names all sources together; rename it.")
    return Question(
        id=str(values["id"] if values["id"] not in (None, "") else where),
        question=question.strip(),
        choices=tuple(choice.strip() for choice in choices),
        answer=index,
        source=source,
        split="test" if values["split"] in (None, "") else str(values["split"]),
        context=str(values["context"] or "").strip(),
    )


def _asked(question: Question) -> tuple[str, str, frozenset[str]]:
    """Return what identifies a question: one instruction may be asked of many contexts or choices."""
    return question.context, question.question, frozenset(question.choices)


def _no_column(where: str, field: str, column: str, names: Iterable[str]) -> str:
    return (
        f"{where} has no column {column!r} for the {field}; there are {', '.join(map(repr, names)) or 'none'}. Name "
        f"it: columns, --question-columns {field}=NAME."
    )


def _index(answer: object, count: int) -> int | None:
    if isinstance(answer, str):
        text = answer.strip()
        if len(text) == 1 and text.upper() in LETTERS[:count]:
            return LETTERS.index(text.upper())
        answer = int(text) if text.isdecimal() and len(text) < len("1000") else None
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < count:
        return None
    return answer


def format_question(question: Question, *, letters: bool = False) -> str:
    """Return a question up to its answer: the context, "Question: ..." and "Answer:".

    Args:
        question: The question.
        letters: List the choices with letters.
    """
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
    context = f"{question.context}\n\n" if question.context else ""
    return f"{context}Question: {question.question}{listed if letters else ''}\nAnswer:"


def format_example(question: Question, *, letters: bool = False) -> str:
    """Return a question with its right answer: an example."""
    answer = LETTERS[question.answer] if letters else question.choices[question.answer]
    return f"{format_question(question, letters=letters)} {answer}"


def format_prompt(question: Question, examples: Iterable[Question] = (), *, letters: bool = False) -> str:
    """Return examples and then the question, separated by blank lines."""
    return "\n\n".join(
        [*(format_example(row, letters=letters) for row in examples), format_question(question, letters=letters)]
    )
