"""Multiple choice as the code of the paper (Mini-GPTs, arXiv 2312.12682) answers it."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from huggingface_hub.utils import tqdm

from hf_context_prune.data.questions import LETTERS, Question
from hf_context_prune.modeling.generation import with_plain_generation
from hf_context_prune.modeling.inference import check_token_ids, evaluation_mode, max_positions

from .continuations import Alternatives, continuation_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ANSWER = re.compile(r"Answer: +([^ ])")
_NEW_TOKENS = 10


def score_as_paper(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    shots: Sequence[Sequence[Question]],
    batch_tokens: int,
) -> list[list[float]]:
    """Return the scores of the choices of every question, higher is better.

    The question is asked as the paper's code asks it, but for the running number before a question. The choice whose
    letter follows a generated "Answer: " has score 1, the others 0. Where no letter is generated, a choice has minus
    the log of a perplexity over a number of tokens, both of question + choice: the paper's code divides so, and thereby
    favours long choices. A generated character that names no choice counts as no letter; the paper's code counts it as
    a wrong answer.

    Args:
        model: A causal LM, in any mode and dtype, on any device.
        tokenizer: Its tokenizer.
        questions: Questions.
        shots: Examples of each question.
        batch_tokens: Tokens per batch, padding included.

    Raises:
        DataError: The tokenizer has tokens that the model lacks.
    """
    likelihoods = _length_divided_likelihoods(model, tokenizer, questions, batch_tokens)
    prompts = [format_paper_prompt(question, examples) for question, examples in zip(questions, shots, strict=True)]
    scores = []
    for question, row, text in zip(questions, likelihoods, _generate(model, tokenizer, prompts), strict=True):
        found, letters = _ANSWER.search(text), LETTERS[: len(question.choices)]
        if found and found.group(1).upper() in letters:
            row = [float(letter == found.group(1).upper()) for letter in letters]
        scores.append(row)
    return scores


def format_paper_prompt(question: Question, examples: Iterable[Question] = ()) -> str:
    """Return the question as the paper's code asks it, after examples (the paper's own runs have none)."""
    answered = [f"{_format_question(row)}\nAnswer: {LETTERS[row.answer]}" for row in examples]
    return "\n\n".join([*answered, _format_question(question)])


def _format_question(question: Question) -> str:
    """Return the question with small letters before its choices, and no "Answer:" after them."""
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS.lower(), question.choices, strict=False))
    context = f"{question.context}\n\n" if question.context else ""
    return f"{context}Answer the following question:\n{question.question}{listed}"


def _length_divided_likelihoods(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    batch_tokens: int,
) -> list[list[float]]:
    """Return, for each choice, minus the log of perplexity / number of tokens of question + choice."""
    items = []
    for question in questions:
        item = Alternatives.encode(tokenizer, question.question, [f" {choice}" for choice in question.choices])
        whole = Alternatives(item.sequences, tuple(1 for _ in item.sequences))  # scored from the second token on
        items.append(whole.shortened(max_positions(model)))
    check_token_ids(model, tokenizer, (row for item in items for row in item.sequences))
    sums = continuation_log_probs(model, items, batch_tokens=batch_tokens)
    return [
        [total / (len(ids) - 1) + math.log(len(ids)) for total, ids in zip(row, item.sequences, strict=True)]
        for row, item in zip(sums, items, strict=True)
    ]


def _generate(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> list[str]:
    """Return the greedy continuation of each prompt; a prompt beyond the model's positions loses its begin."""
    texts = []
    limit = max_positions(model)
    plain = with_plain_generation(model, new_tokens=_NEW_TOKENS)
    with evaluation_mode(model):
        for text in tqdm(prompts, desc="Generating", unit="question", name="hf_context_prune.evaluation"):
            ids = tokenizer.encode(text)[-(limit - _NEW_TOKENS) if limit else None :]
            check_token_ids(model, tokenizer, [ids])
            tensor = torch.tensor([ids], device=model.device)
            output = plain.generate(tensor, attention_mask=torch.ones_like(tensor))
            texts.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return texts
