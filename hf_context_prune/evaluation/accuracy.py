"""Answers to multiple-choice questions: accuracies with Wilson intervals, and paired tests of two models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from hf_context_prune.data.questions import ALL, QuestionSet
from hf_context_prune.errors import ConfigError

from .bootstrap import CONFIDENCE, Estimate


@dataclass(frozen=True)
class Answer:
    """The answer of a model to a question.

    Attributes:
        id: Id of the question.
        source: Source of the question.
        scores: One per choice, higher is better.
        chosen: Index of the choice with the highest score.
        correct: Whether the chosen choice is the right one.
        shots: Number of examples before the question.
    """

    id: str
    source: str
    scores: tuple[float, ...]
    chosen: int
    correct: bool
    shots: int


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on a group of questions.

    Attributes:
        source: Source of the questions, or ``"all"``.
        num_questions: Number of questions.
        num_correct: Number of right answers.
        accuracy: Share of right answers, with its 95 % Wilson interval.
        chance: Share of right answers by guessing.
        shots: Fewest and most examples before a question.
    """

    source: str
    num_questions: int
    num_correct: int
    accuracy: Estimate
    chance: float
    shots: tuple[int, int]


@dataclass(frozen=True)
class PairedAccuracy:
    """A pruned model against its base on the same questions.

    Attributes:
        source: Source of the questions, or ``"all"``.
        difference: Accuracy of the pruned model minus that of the base, with Newcombe's 95 % interval for pairs.
        only_base: Questions that only the base answers rightly.
        only_pruned: Questions that only the pruned model answers rightly.
        p_value: p-value of the exact McNemar test.
    """

    source: str
    difference: Estimate
    only_base: int
    only_pruned: int
    p_value: float


def summarize_answers(questions: QuestionSet, answers: Sequence[Answer]) -> tuple[Accuracy, ...]:
    """Return the accuracy by source, in alphabetical order, and last on all questions.

    Args:
        questions: The questions.
        answers: One per question, in the same order.
    """
    pairs = list(zip(answers, questions.questions, strict=True))
    return tuple(
        _accuracy(source, [answers[i] for i in group], [1 / len(pairs[i][1].choices) for i in group])
        for source, group in _groups(answers)
    )


def _groups(answers: Sequence[Answer]) -> list[tuple[str, list[int]]]:
    """Return the indices of the answers by source, and of all answers."""
    sources = sorted({answer.source for answer in answers})
    groups = [(source, [i for i, answer in enumerate(answers) if answer.source == source]) for source in sources]
    return [*groups, (ALL, list(range(len(answers))))]


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of right answers (Wilson)."""
    interval = stats.binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _accuracy(source: str, answers: Sequence[Answer], chances: Sequence[float]) -> Accuracy:
    count, right = len(answers), sum(answer.correct for answer in answers)
    shots = [answer.shots for answer in answers]
    return Accuracy(
        source,
        count,
        right,
        Estimate(right / count, wilson_interval(right, count)),
        sum(chances) / count,
        (min(shots), max(shots)),
    )


def compare_answers(base: Sequence[Answer], pruned: Sequence[Answer]) -> tuple[PairedAccuracy, ...]:
    """Compare two models on the same questions, by source, and last on all questions.

    Args:
        base: Answers of the base.
        pruned: Answers of the pruned model, to the same questions in the same order.

    Raises:
        ConfigError: The questions differ.
    """
    if [answer.id for answer in base] != [answer.id for answer in pruned]:
        raise ConfigError("The two models answered different questions, so they can't be compared.")
    result = []
    for source, group in _groups(base):
        pairs = [(base[i].correct, pruned[i].correct) for i in group]
        only_base, only_pruned = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
        changed = only_base + only_pruned
        p_value = stats.binomtest(only_base, changed).pvalue if changed else 1.0
        difference = _difference(sum(a and b for a, b in pairs), only_base, only_pruned, len(pairs))
        result.append(PairedAccuracy(source, difference, only_base, only_pruned, float(p_value)))
    return tuple(result)


def _difference(both: int, only_base: int, only_pruned: int, count: int) -> Estimate:
    """Return the accuracy of the pruned model minus that of the base, with Newcombe's interval for pairs.

    The interval (1998, method 10) joins the two Wilson intervals by the correlation of the pairs. So a few questions
    that both models answer alike do not prove that there is no difference, as a bootstrap over them would.
    """
    neither = count - both - only_base - only_pruned
    first, second = ((both + only_base) / count, (both + only_pruned) / count)
    first_low, first_high = wilson_interval(both + only_base, count)
    second_low, second_high = wilson_interval(both + only_pruned, count)
    margins = [both + only_base, only_pruned + neither, both + only_pruned, only_base + neither]
    correlation = 0.0
    if all(margins):
        surplus = float(both * neither - only_base * only_pruned)
        surplus = max(surplus - count / 2, 0.0) if surplus > 0 else surplus
        correlation = surplus / math.sqrt(math.prod(margins))

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    value = (only_pruned - only_base) / count
    low = value - distance(second - second_low, first_high - first)
    high = value + distance(second_high - second, first - first_low)
    return Estimate(value, (max(-1.0, low), min(1.0, high)))
