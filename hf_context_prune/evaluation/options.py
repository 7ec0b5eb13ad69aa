"""What is measured, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_context_prune.data.questions import QuestionSet, load_questions

from .multiple_choice import Scorer, check_scoring


@dataclass(frozen=True)
class EvalOptions:
    """How much is measured; the figures always come from text that was not used to calibrate.

    Attributes:
        max_tokens: Held-out tokens at most, whole documents; None takes all.
        speed: Measure prefill and decode speed of base and pruned, interleaved.
        memory: Measure peak memory in a fresh process (`evaluate`); `prune` has no folder yet, so there it is asked for
            when the result is saved.
        general_data: Text of no domain, as `load_documents` reads it: what the model forgot is measured on it. None
            leaves that open, and the model card says so.
    """

    max_tokens: int | None = 20_000
    speed: bool = True
    memory: bool = True
    general_data: Any = None


@dataclass(frozen=True)
class QuestionOptions:
    """Multiple-choice questions to answer.

    Attributes:
        source: What [`load_questions`][] reads.
        columns: Names of its columns, where they differ.
        splits: Rows of these splits are asked.
        scorer: See [`answer_questions`][].
        num_fewshot: Examples, at most.
        max_questions: Questions at most; None takes all.
        harness_task: Folder to write them to as a task of lm-evaluation-harness; None writes none.

    Raises:
        ConfigError: An unknown scorer, or a number out of range.
    """

    source: Any
    columns: Mapping[str, str] | None = None
    splits: tuple[str, ...] = ("test",)
    scorer: Scorer = "likelihood_normalised"
    num_fewshot: int = 0
    max_questions: int | None = None
    harness_task: str | Path | None = None

    def __post_init__(self) -> None:
        """Check what would else be found after long work."""
        check_scoring(self.scorer, self.num_fewshot)

    def load(self) -> QuestionSet:
        """Read the questions.

        Raises:
            ContextPruneError: See [`load_questions`][].
        """
        return load_questions(self.source, columns=self.columns, splits=self.splits, max_questions=self.max_questions)
