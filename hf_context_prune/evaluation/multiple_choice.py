"""Multiple choice: which answer a model holds most likely, by several scorers, with intervals and paired tests."""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from huggingface_hub.utils import tqdm
from scipy import stats

from hf_context_prune.data.questions import ALL, LETTERS, Question, QuestionSet, format_paper_prompt, prompt
from hf_context_prune.data.samples import leading_token
from hf_context_prune.errors import ConfigError, DataError, NumericsError, PruningWarning, unknown_name
from hf_context_prune.modeling.inference import check_token_ids, evaluation_mode, max_positions

from .bootstrap import CONFIDENCE, Estimate
from .continuations import Alternatives, continuation_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Scorer = Literal["likelihood_normalised", "likelihood", "letter", "paper"]
_GENERATED = re.compile(r"Answer: +([^ ])")
_GENERATED_TOKENS = 10


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        id: Of the question.
        source: Of the question.
        scores: One a choice, higher is better.
        chosen: Index of the choice with the highest.
        correct: Whether it is the right one.
        shots: Examples that were shown.
    """

    id: str
    source: str
    scores: tuple[float, ...]
    chosen: int
    correct: bool
    shots: int


@dataclass(frozen=True)
class Accuracy:
    """Answers of a group of questions.

    Attributes:
        source: The group, or ``"all"``.
        num_questions: Questions.
        num_correct: Right answers.
        accuracy: Their share, with its 95 % Wilson interval.
        chance: Share that guessing gives.
        shots: Fewest and most examples that a question was shown.
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
        source: The group, or ``"all"``.
        difference: Accuracy, pruned less base, with Newcombe's 95 % interval for pairs.
        only_base: Questions that only the base answers rightly.
        only_pruned: Questions that only the pruned model answers rightly.
        p_value: Of the exact McNemar test: how often chance alone would set them apart as much.
    """

    source: str
    difference: Estimate
    only_base: int
    only_pruned: int
    p_value: float


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

    Scorers: ``likelihood`` sums the log-probabilities of a choice's tokens after the question, "Answer:" and a space;
    ``likelihood_normalised`` divides that by the bytes of the choice (lm-evaluation-harness: by its characters);
    ``letter`` lists the choices and compares the letters as the next token; ``paper`` (arXiv 2312.12682) asks as the
    paper's code does (but for the running number before a question), and takes the letter behind a generated
    "Answer: ", else the choice whose question + choice has the lowest perplexity over its number of tokens: that code
    divides so, and thereby favours long choices.

    Args:
        model: A causal LM, in any mode and dtype, on any device.
        tokenizer: Its tokenizer.
        questions: With examples.
        scorer: See above.
        num_fewshot: Examples of the question's own source; fewer where there are fewer.
        batch_tokens: Tokens a batch, padding included.

    Raises:
        ConfigError: An unknown scorer, or `num_fewshot` below 0.
        DataError: A choice is longer than the model has positions, or the tokenizer has tokens that it has not.
        NumericsError: A score is not a number.
    """
    check_scoring(scorer, num_fewshot)
    shots = [questions.shots(question, num_fewshot) for question in questions.questions]
    pairs = list(zip(questions.questions, shots, strict=True))
    if scorer == "paper":
        prompts = [format_paper_prompt(question, examples) for question, examples in pairs]
        scores = _paper_scores(model, tokenizer, questions.questions, prompts, batch_tokens)
    else:
        letters = scorer == "letter"
        items = [
            _alternatives(
                tokenizer,
                prompt(question, examples, letters=letters),
                [f" {answer}" for answer in (_letters(question) if letters else question.choices)],
            )
            for question, examples in pairs
        ]
        check_token_ids(model, tokenizer, (row for item in items for row in item.sequences))
        _check_fit(model, questions.questions, items)
        scores = continuation_log_probs(model, items, batch_tokens=batch_tokens)
    if scorer == "likelihood_normalised":
        scores = [
            [score / len(choice.encode()) for score, choice in zip(row, question.choices, strict=True)]
            for row, question in zip(scores, questions.questions, strict=True)
        ]
    return [
        _answer(question, row, len(examples))
        for question, row, examples in zip(questions.questions, scores, shots, strict=True)
    ]


def check_scoring(scorer: str, num_fewshot: int) -> None:
    """Refuse what [`answer_questions`][] would, before any work.

    Raises:
        ConfigError: An unknown scorer, or `num_fewshot` below 0.
    """
    if scorer not in get_args(Scorer):
        raise ConfigError(unknown_name("scorer", scorer, get_args(Scorer)))
    if isinstance(num_fewshot, bool) or not isinstance(num_fewshot, int) or num_fewshot < 0:
        raise ConfigError(f"num_fewshot is {num_fewshot!r}; it must be an integer of 0 or more.")


def _letters(question: Question) -> Sequence[str]:
    return LETTERS[: len(question.choices)]


def _answer(question: Question, scores: Sequence[float], shots: int) -> Answer:
    if any(math.isnan(score) for score in scores):
        raise NumericsError(
            f"The model's scores of question {question.id} are not numbers: its weights or activations overflow. Load "
            f"it in float32."
        )
    chosen = max(range(len(scores)), key=lambda index: scores[index])  # the first of equals
    return Answer(question.id, question.source, tuple(scores), chosen, chosen == question.answer, shots)


def _alternatives(tokenizer: Any, text: str, answers: Sequence[str]) -> Alternatives:  # noqa: ANN401
    """A text with several continuations, cut as lm-evaluation-harness does: where the tokens of the text alone end."""
    start = len(tokenizer.encode(text, add_special_tokens=False))
    bos = leading_token(tokenizer)
    lead = [] if bos is None else [bos]
    sequences = [[*lead, *tokenizer.encode(text + answer, add_special_tokens=False)] for answer in answers]
    start += len(lead)
    return Alternatives(
        tuple(tuple(sequence) for sequence in sequences),
        tuple(max(1, min(start, len(sequence) - 1)) for sequence in sequences),
    )


def _check_fit(model: "PreTrainedModel", questions: Sequence[Question], items: Sequence[Alternatives]) -> None:
    """Refuse choices that do not fit, and say how many questions lose something at their begin."""
    limit, cut = max_positions(model), 0
    if limit is None:
        return
    for question, item in zip(questions, items, strict=True):
        longest = max(len(row) - start for row, start in zip(item.sequences, item.starts, strict=True))
        if longest > limit:
            raise DataError(
                f"A choice of question {question.id} has {longest:,} tokens, and the model has {limit:,} positions. "
                f"Leave that question out, or take a model that reads more."
            )
        cut += item.shortened(limit) is not item
    if cut:
        warnings.warn(
            f"{cut:,} of {len(items):,} questions are longer than the model's {limit:,} positions, and lose the begin "
            f"of their examples or context.",
            PruningWarning,
            stacklevel=4,
        )


def _paper_scores(
    model: "PreTrainedModel",
    tokenizer: Any,  # noqa: ANN401
    questions: Sequence[Question],
    prompts: Sequence[str],
    batch_tokens: int,
) -> list[list[float]]:
    """1 for the letter that is generated, else minus the log of the paper's perplexity over tokens.

    A generated character that names no choice counts as none; the paper's code counts it as a wrong answer.
    """
    items = [
        _whole(_alternatives(tokenizer, question.question, [f" {choice}" for choice in question.choices])).shortened(
            max_positions(model)
        )
        for question in questions
    ]
    check_token_ids(model, tokenizer, (row for item in items for row in item.sequences))
    sums = continuation_log_probs(model, items, batch_tokens=batch_tokens)
    scores = []
    generated = _generated(model, tokenizer, prompts)
    for question, item, row, text in zip(questions, items, sums, generated, strict=True):
        match, letters = _GENERATED.search(text), _letters(question)
        if match and match.group(1).upper() in letters:
            scores.append([float(letter == match.group(1).upper()) for letter in letters])
        else:
            lengths = [len(sequence) for sequence in item.sequences]
            scores.append([x / (length - 1) + math.log(length) for x, length in zip(row, lengths, strict=True)])
    return scores


def _whole(item: Alternatives) -> Alternatives:
    """The same, scored from the second token on."""
    return Alternatives(item.sequences, tuple(1 for _ in item.sequences))


def _generated(model: "PreTrainedModel", tokenizer: Any, prompts: Sequence[str]) -> list[str]:  # noqa: ANN401
    """What a model goes on with, greedily, after each prompt."""
    texts = []
    limit = max_positions(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with evaluation_mode(model):
        for text in tqdm(prompts, desc="Generating", unit="question", name="hf_context_prune.evaluation"):
            ids = tokenizer.encode(text)[-(limit - _GENERATED_TOKENS) if limit else None :]
            check_token_ids(model, tokenizer, [ids])
            tensor = torch.tensor([ids], device=model.device)
            output = model.generate(
                tensor,
                attention_mask=torch.ones_like(tensor),
                max_new_tokens=_GENERATED_TOKENS,
                do_sample=False,
                pad_token_id=pad,
            )
            texts.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return texts


def summarize_answers(questions: QuestionSet, answers: Sequence[Answer]) -> tuple[Accuracy, ...]:
    """Accuracy by source, in alphabetical order, and last of all questions.

    Args:
        questions: What was asked.
        answers: One a question, in the same order.
    """
    pairs = list(zip(answers, questions.questions, strict=True))
    return tuple(
        _accuracy(source, [answers[i] for i in group], [1 / len(pairs[i][1].choices) for i in group])
        for source, group in _groups(answers)
    )


def _groups(answers: Sequence[Answer]) -> list[tuple[str, list[int]]]:
    """Indices of the answers by source, and of all."""
    sources = sorted({answer.source for answer in answers})
    groups = [(source, [i for i, answer in enumerate(answers) if answer.source == source]) for source in sources]
    return [*groups, (ALL, list(range(len(answers))))]


def _wilson(right: int, count: int) -> tuple[float, float]:
    interval = stats.binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _accuracy(source: str, answers: Sequence[Answer], chances: Sequence[float]) -> Accuracy:
    count, right = len(answers), sum(answer.correct for answer in answers)
    shots = [answer.shots for answer in answers]
    return Accuracy(
        source,
        count,
        right,
        Estimate(right / count, _wilson(right, count)),
        sum(chances) / count,
        (min(shots), max(shots)),
    )


def compare_answers(base: Sequence[Answer], pruned: Sequence[Answer]) -> tuple[PairedAccuracy, ...]:
    """The same questions answered by two models, by source, and last all of them.

    Args:
        base: Answers of the base.
        pruned: Answers of the pruned model, to the same questions in the same order.

    Raises:
        ConfigError: Other questions.
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
    """Accuracy of the pruned model less the base's, with Newcombe's interval for pairs (1998, method 10).

    It joins the two Wilson intervals by the correlation of the pairs; so a few questions that both models answer alike
    are no proof that there is no difference, as a bootstrap over them would have it.
    """
    neither = count - both - only_base - only_pruned
    first, second = ((both + only_base) / count, (both + only_pruned) / count)
    first_low, first_high = _wilson(both + only_base, count)
    second_low, second_high = _wilson(both + only_pruned, count)
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
