"""Multiple choice: the answer that a model holds most likely, by several scorers."""

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import torch

from hf_context_prune.data.questions import LETTERS, Question, QuestionSet, format_prompt
from hf_context_prune.errors import ConfigError, DataError, NumericsError, PruningWarning, unknown_name
from hf_context_prune.modeling.inference import check_token_ids, max_positions
from hf_context_prune.utils.precision import overflow_remedy

from .accuracy import Answer
from .continuations import Alternatives, continuation_log_probs
from .options import Scorer
from .paper_scoring import score_as_paper

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer_questions(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: QuestionSet,
    *,
    scorer: Scorer = "likelihood_normalised",
    num_fewshot: int = 0,
    batch_tokens: int = 4096,
) -> list[Answer]:
    """Answer every question.

    The scorers:

    - ``likelihood`` sums the log-probabilities of the tokens of a choice after the question, "Answer:" and a space.
    - ``likelihood_normalised`` divides that sum by the bytes of the choice (lm-evaluation-harness: by its characters).
    - ``letter`` lists the choices and compares the letters as the next token.
    - ``paper`` answers as the paper's code does: see [`score_as_paper`][].

    Args:
        model: A causal LM, in any mode and dtype, on any device.
        tokenizer: Its tokenizer.
        questions: Questions with examples.
        scorer: See above.
        num_fewshot: Examples of the question's own source; fewer where there are fewer.
        batch_tokens: Tokens per batch, padding included.

    Raises:
        ConfigError: The scorer is unknown, or `num_fewshot` is below 0.
        DataError: A choice is longer than the model's positions, or the tokenizer has tokens that the model lacks.
        NumericsError: A score is not a number.
    """
    _check_scoring(scorer, num_fewshot)
    shots = [questions.shots(question, num_fewshot) for question in questions.questions]
    if scorer == "paper":
        scores = score_as_paper(model, tokenizer, questions.questions, shots, batch_tokens)
    else:
        scores = _score_continuations(model, tokenizer, questions.questions, shots, scorer == "letter", batch_tokens)
    if scorer == "likelihood_normalised":
        scores = [
            [score / len(choice.encode()) for score, choice in zip(row, question.choices, strict=True)]
            for row, question in zip(scores, questions.questions, strict=True)
        ]
    return [
        _answer(question, row, len(examples), model.dtype)
        for question, row, examples in zip(questions.questions, scores, shots, strict=True)
    ]


def _check_scoring(scorer: str, num_fewshot: int) -> None:
    if scorer not in get_args(Scorer):
        raise ConfigError(unknown_name("scorer", scorer, get_args(Scorer)))
    if isinstance(num_fewshot, bool) or not isinstance(num_fewshot, int) or num_fewshot < 0:
        raise ConfigError(f"num_fewshot is {num_fewshot!r}; it must be an integer of 0 or more.")


def _score_continuations(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    shots: Sequence[Sequence[Question]],
    letters: bool,
    batch_tokens: int,
) -> list[list[float]]:
    """Return the log-probability (nats) of each choice, or of its letter, after the prompt of its question."""
    items = [
        Alternatives.encode(
            tokenizer,
            format_prompt(question, examples, letters=letters),
            [f" {answer}" for answer in (LETTERS[: len(question.choices)] if letters else question.choices)],
        )
        for question, examples in zip(questions, shots, strict=True)
    ]
    check_token_ids(model, tokenizer, (row for item in items for row in item.sequences))
    _check_fit(model, questions, items)
    return continuation_log_probs(model, items, batch_tokens=batch_tokens)


def _answer(question: Question, scores: Sequence[float], shots: int, dtype: torch.dtype) -> Answer:
    if any(math.isnan(score) for score in scores):
        raise NumericsError(
            f"The model's scores of question {question.id} are not numbers: its weights or activations overflow. "
            f"{overflow_remedy(dtype)}"
        )
    chosen = max(range(len(scores)), key=lambda index: scores[index])  # the first of equals
    return Answer(question.id, question.source, tuple(scores), chosen, chosen == question.answer, shots)


def _check_fit(model: "PreTrainedModel", questions: Sequence[Question], items: Sequence[Alternatives]) -> None:
    """Refuse choices that do not fit, and warn of the questions that lose tokens at their begin."""
    limit, cut = max_positions(model), 0
    if limit is None:
        return
    for question, item in zip(questions, items, strict=True):
        longest = max(len(row) - start for row, start in zip(item.sequences, item.starts, strict=True))
        if longest > limit:
            raise DataError(
                f"A choice of question {question.id} has {longest:,} tokens, and the model has {limit:,} positions. "
                f"Leave that question out, or use a model with more positions."
            )
        cut += item.shortened(limit) is not item
    if cut:
        warnings.warn(
            f"{cut:,} of {len(items):,} questions are longer than the model's {limit:,} positions: the begin of their "
            f"examples or context is cut off.",
            PruningWarning,
            stacklevel=4,
        )
