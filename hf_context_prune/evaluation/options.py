"""What is measured, and how much."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_context_prune.errors import PruningWarning
from hf_context_prune.utils.options import EVALUATION, QUESTIONS, TEXT, at_least, check_options, option

if TYPE_CHECKING:
    from hf_context_prune.data.questions import QuestionSet

Scorer = Literal["likelihood_normalised", "likelihood", "letter", "paper"]


MAX_TEST_TOKENS = 50_000
"""Test tokens of a text by default: a window each of about a hundred documents."""


@dataclass(frozen=True)
class EvalOptions:
    """How much is measured, always on text that was not used to calibrate.

    Attributes:
        max_tokens: Largest number of test tokens, in passages of many documents; None takes the whole text.
        benchmark: Measure prefill and decode speed of base and pruned model, interleaved.
        memory: Measure peak memory in a fresh process. It needs a saved folder, so `prune` leaves it to saving.
        example: Show in report and card what the model writes after a prompt of its domain.
        general_data: General text, as [`load_documents`][] reads it, to measure what the model forgot. None leaves that
            open, and the model card says so.

    Raises:
        ConfigError: A value out of range.
    """

    max_tokens: int | None = option(
        MAX_TEST_TOKENS,
        "Largest number of test tokens to measure on: a passage of about 2,000 characters of each of many documents.",
        panel=EVALUATION,
        allowed=at_least(1),
        flag="max-eval-tokens",
    )
    benchmark: bool = option(True, "Measure speed and peak memory.", panel=EVALUATION)
    memory: bool = True
    example: bool = option(
        True,
        "Show in report and card what the pruned model writes after a prompt of its domain. The prompt is not taken "
        "from your text; the answer is the model's own.",
        panel=EVALUATION,
    )
    general_data: Any = option(
        None,
        "General text, to measure what the model forgets outside the domain. The model card says if it is missing.",
        panel=TEXT,
    )

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)


@dataclass(frozen=True)
class QuestionOptions:
    """Multiple-choice questions to answer.

    Attributes:
        source: As [`load_questions`][] reads it.
        columns: Names of its columns, where they differ.
        splits: The splits whose rows are asked.
        scorer: See [`answer_questions`][].
        num_fewshot: Largest number of examples before a question.
        max_questions: Largest number of questions; None takes all.
        harness_task: Folder to write the questions to as a task of lm-evaluation-harness; None writes none.

    Raises:
        ConfigError: An unknown scorer, or a number out of range.
    """

    source: Any = option(
        MISSING,
        "Multiple-choice questions: a .jsonl file or Hub dataset with question, choices, answer (index from 0, or "
        "letter), optionally context, source, split (test rows are asked, dev rows are examples) and id.",
        panel=QUESTIONS,
        flag="questions",
    )
    columns: Mapping[str, str] | None = option(
        None,
        "Names of the columns of the questions, where they differ: question=query,choices=options.",
        panel=QUESTIONS,
        flag="question-columns",
    )
    splits: tuple[str, ...] = option(
        ("test",),
        "Split of the questions that are asked; rows without a split count as test. Default test.",
        panel=QUESTIONS,
        flag="question-split",
    )
    scorer: Scorer = option(
        "likelihood_normalised",
        "How an answer is chosen. likelihood_normalised: by likelihood per byte of the choice; likelihood: by its sum; "
        "letter: by the likelihood of the choice's letter; paper: as in arXiv 2312.12682.",
        panel=QUESTIONS,
        flag="question-scorer",
    )
    num_fewshot: int = option(
        0,
        "Number of examples before a question, from the dev rows of its source.",
        panel=QUESTIONS,
        allowed=at_least(0),
    )
    max_questions: int | None = option(
        None,
        "Largest number of questions, evenly spread over all of them; all by default.",
        panel=QUESTIONS,
        allowed=at_least(1),
    )
    harness_task: str | Path | None = option(
        None, "Also write the questions to this folder, as a task of lm-evaluation-harness.", panel=QUESTIONS
    )

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)

    def load(self) -> QuestionSet:
        """Read the questions.

        Raises:
            ContextPruneError: See [`load_questions`][].

        Warns:
            PruningWarning: There is no example for any question, although some are asked for.
        """
        from hf_context_prune.data.questions import load_questions

        found = load_questions(self.source, columns=self.columns, splits=self.splits, max_questions=self.max_questions)
        if self.num_fewshot and not any(found.shots(question, 1) for question in found.questions):
            warnings.warn(
                f"num_fewshot={self.num_fewshot} has no effect: {found.name} has no rows of the split dev for the "
                f"sources of its questions, so they are asked without examples.",
                PruningWarning,
                stacklevel=2,
            )
        return found
