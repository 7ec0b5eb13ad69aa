"""`evaluate()`: one model, or a model against its base, on text and on multiple-choice questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_context_prune.data.documents import load_documents
from hf_context_prune.data.questions import QuestionSet, load_questions
from hf_context_prune.evaluation.general_text import Pair, general_losses, losses_on, read_general
from hf_context_prune.evaluation.harness import write_harness_task
from hf_context_prune.evaluation.multiple_choice import (
    Answer,
    Scorer,
    answer_questions,
    check_scoring,
    compare_answers,
    summarize_answers,
)
from hf_context_prune.evaluation.reports.report import (
    DatasetFacts,
    Environment,
    EvalReport,
    MemoryFacts,
    MultipleChoiceFacts,
    SizeFacts,
    SpeedFacts,
)
from hf_context_prune.evaluation.speed import count_parameters, measure_peak_memory, measure_speed, weight_bytes
from hf_context_prune.storage.loading import LoadedModel, copy_notes

from .prune import EvalOptions, as_loaded


@dataclass(frozen=True)
class QuestionOptions:
    """Multiple-choice questions to answer.

    Attributes:
        source: What [`load_questions`][] reads.
        columns: Names of its columns, where they differ.
        splits: Rows of these splits are asked.
        scorer: See [`answer_questions`][].
        num_shots: Examples, at most.
        max_questions: Questions at most; None takes all.
        harness_task: Folder to write them to as a task of lm-evaluation-harness; None writes none.

    Raises:
        ConfigError: An unknown scorer, or a number out of range.
    """

    source: Any
    columns: Mapping[str, str] | None = None
    splits: tuple[str, ...] = ("test",)
    scorer: Scorer = "likelihood_normalised"
    num_shots: int = 0
    max_questions: int | None = None
    harness_task: str | Path | None = None

    def __post_init__(self) -> None:
        """Check what would else be found after long work."""
        check_scoring(self.scorer, self.num_shots)

    def load(self) -> QuestionSet:
        """Read the questions.

        Raises:
            ContextPruneError: See [`load_questions`][].
        """
        return load_questions(self.source, columns=self.columns, splits=self.splits, max_questions=self.max_questions)


def evaluate(
    model: PreTrainedModel | LoadedModel | str | Path,
    data: Any,  # noqa: ANN401 - whatever load_documents reads
    *,
    base: PreTrainedModel | LoadedModel | str | Path | None = None,
    tokenizer: Any = None,  # noqa: ANN401
    text_column: str | None = None,
    max_seq_length: int = 512,
    seed: int = 0,
    options: EvalOptions | None = None,
    questions: QuestionOptions | None = None,
) -> EvalReport:
    """Measure a model on text: bits per byte and perplexity, size and speed; and its answers to questions.

    Args:
        model: A `PreTrainedModel`, or what [`load_model`][] reads.
        data: What [`load_documents`][] reads; whether the model saw it before, only the caller knows.
        base: The model that it was pruned from: both are measured, on the same documents and questions.
        tokenizer: Of `model`, as for [`prune`][].
        text_column: Column with the text.
        max_seq_length: Tokens a window.
        seed: Of the bootstrap and of the choice of documents.
        options: How much is measured.
        questions: Multiple-choice questions, if any.

    Raises:
        ContextPruneError: See `hf_context_prune.errors`.
    """
    options = options or EvalOptions()
    own = as_loaded(model, tokenizer)
    first = own if base is None else as_loaded(base, None)
    asked = None
    if questions is not None:  # read before anything long
        asked = questions.load()
    text = load_documents(data, text_column=text_column, tokenizer=first.tokenizer, seed=seed)
    general = read_general(options.general_data, apart_from=None, tokenizer=first.tokenizer, seed=seed)
    how_long: dict[str, Any] = {"max_seq_length": max_seq_length, "max_tokens": options.max_tokens, "seed": seed}
    dense, pair = (first.model, first.tokenizer), None if base is None else (own.model, own.tokenizer)
    if questions is not None and asked is not None and questions.harness_task is not None:
        write_harness_task(asked, questions.harness_task, num_shots=questions.num_shots)
    losses = losses_on(text, dense, pruned=pair, **how_long)
    general_facts = general_losses(general, dense, pruned=pair, **how_long)
    choice = None
    if questions is not None and asked is not None:
        choice = answered(asked, questions, dense, pair)
    both = {"base": first.model} if base is None else {"base": first.model, "pruned": own.model}
    speed = measure_speed(both) if options.speed else None
    return EvalReport(
        base_model=first.name,
        dataset=DatasetFacts(text.name, text.revision, text.fingerprint, "The text that was given, as it is."),
        size=SizeFacts.measured(
            count_parameters(first.model),
            None if base is None else count_parameters(own.model),
            base_weight_bytes=weight_bytes(first.folder) if first.folder else None,
            pruned_weight_bytes=weight_bytes(own.folder) if base is not None and own.folder else None,
        ),
        loss=losses,
        environment=Environment.current(str(own.model.dtype).removeprefix("torch.")),
        speed=SpeedFacts(speed["base"], speed.get("pruned")) if speed else None,
        memory=_memory(first, None if base is None else own) if options.memory else None,
        multiple_choice=choice,
        general=general_facts,
        notes=copy_notes(*((own,) if base is None else (first, own))),
    )


def answered(
    asked: QuestionSet, options: QuestionOptions, base: Pair, pruned: Pair | None = None
) -> MultipleChoiceFacts:
    """Answers of one model, or of a base and what was pruned from it, to the same questions.

    Args:
        asked: The questions, as [`load_questions`][] gave them.
        options: How they are answered; its `source` is not read again.
        base: Model and tokenizer.
        pruned: The same of the pruned model.
    """
    how: dict[str, Any] = {"scorer": options.scorer, "num_shots": options.num_shots}
    answers = answer_questions(*base, asked, **how)
    return choice_facts(asked, answers, None if pruned is None else answer_questions(*pruned, asked, **how), **how)


def choice_facts(
    asked: QuestionSet,
    answers: Sequence[Answer],
    others: Sequence[Answer] | None,
    *,
    scorer: Scorer,
    num_shots: int,
) -> MultipleChoiceFacts:
    """Answers of a base, and of what was pruned from it if they are given, as facts of a report."""
    return MultipleChoiceFacts(
        asked.name,
        asked.revision,
        scorer,
        num_shots,
        summarize_answers(asked, answers),
        None if others is None else summarize_answers(asked, others),
        None if others is None else compare_answers(answers, others),
    )


def _memory(base: LoadedModel, pruned: LoadedModel | None) -> MemoryFacts | None:
    peaks = [
        None if model is None or not model.folder else measure_peak_memory(model.folder) for model in (base, pruned)
    ]
    return MemoryFacts(*peaks) if any(peaks) else None
