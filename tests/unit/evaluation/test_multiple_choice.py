"""Multiple choice: scorers against brute force, intervals, and paired comparison."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from hf_context_prune.data.questions import ALL, format_prompt, load_questions
from hf_context_prune.errors import ConfigError, DataError, NumericsError, PruningWarning
from hf_context_prune.evaluation import accuracy, paper_scoring
from hf_context_prune.evaluation.accuracy import Answer, compare_answers, summarize_answers
from hf_context_prune.evaluation.multiple_choice import answer_questions
from tests.support.tiny import TEXT, tiny_model, tiny_tokenizer

WORDS = TEXT.split()


def questions(count=12, *, dev=3):
    draw = random.Random(0)

    def words(number):
        return " ".join(draw.choices(WORDS, k=number))

    rows = []
    for index in range(count):
        for split in ("test", "dev") if index < dev else ("test",):
            choices = [words(draw.randint(1, 4)) + f" {letter}" for letter in "abcd"[: draw.randint(2, 4)]]
            rows.append(
                {
                    "id": f"{split}-{index}",
                    "question": words(draw.randint(3, 9)),
                    "choices": choices,
                    "answer": draw.randrange(len(choices)),
                    "source": "abc"[index % 3],
                    "split": split,
                }
            )
    return load_questions(rows)


def test_scores_that_are_no_numbers_are_no_answers():
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"scores of question test-0 are not numbers"):
        answer_questions(model, tiny_tokenizer(), questions())


@pytest.mark.parametrize("scorer", ["likelihood", "paper"])
def test_questions_that_are_too_long(scorer):
    model, tokenizer = tiny_model("gpt2", max_position_embeddings=24), tiny_tokenizer()
    row = {"id": "long", "question": " ".join(WORDS[:12] * 2), "choices": ["a b", " ".join(WORDS[:3])], "answer": 0}
    asked = load_questions([row])
    if scorer == "paper":
        (answer,) = answer_questions(model, tokenizer, asked, scorer=scorer)
        assert all(math.isfinite(score) for score in answer.scores)
        return
    with pytest.warns(PruningWarning, match="1 of 1 questions are longer than the model's 24 positions"):
        (answer,) = answer_questions(model, tokenizer, asked, scorer=scorer)
    text = format_prompt(asked.questions[0])
    start = len(tokenizer.encode(text, add_special_tokens=False))
    for choice, score in zip(row["choices"], answer.scores, strict=True):
        whole = tokenizer.encode(f"{text} {choice}", add_special_tokens=False)
        ids, gone = whole[-25:], len(whole) - 25
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(dim=-1)
        expected = sum(float(logits[place - 1, ids[place]]) for place in range(start - gone, 25))
        assert score == pytest.approx(expected, abs=1e-4)
    never = load_questions([row | {"choices": ["b", " ".join(WORDS * 9)]}])
    with pytest.raises(DataError, match=r"A choice of question long has [\d,]+ tokens, and the model has 24 positions"):
        answer_questions(model, tokenizer, never, scorer=scorer)


def test_a_tokenizer_of_another_model(subtests):
    for scorer in ["likelihood", "letter", "paper"]:
        with subtests.test(scorer=scorer):
            tokenizer = tiny_tokenizer()
            model = tiny_model("llama", vocab_size=len(tokenizer) - 3)
            with pytest.raises(DataError, match=r"the model has only \d+ token rows .* Use the tokenizer that belongs"):
                answer_questions(model, tokenizer, questions(), scorer=scorer)


def log_prob(model, ids, start):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))


@pytest.mark.parametrize("scorer", ["likelihood", "likelihood_normalised", "letter"])
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_scores_by_brute_force(scorer, num_fewshot):
    model, tokenizer, asked = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer(), questions()
    answers = answer_questions(model, tokenizer, asked, scorer=scorer, num_fewshot=num_fewshot)
    letters = scorer == "letter"
    for question, answer in zip(asked.questions, answers, strict=True):
        examples = asked.examples.get(question.source, ())[:num_fewshot]
        text = format_prompt(question, examples, letters=letters)
        expected = []
        for letter, choice in zip("ABCD", question.choices, strict=False):
            own = letter if letters else choice
            ids, start = tokenizer.encode(f"{text} {own}"), len(tokenizer.encode(text))
            score = log_prob(model, ids, start)
            expected.append(score / len(choice.encode()) if scorer == "likelihood_normalised" else score)
        assert answer.scores == pytest.approx(expected, abs=1e-3)
        assert answer.chosen == expected.index(max(expected))
        assert answer.correct == (answer.chosen == question.answer)
        assert answer.shots == len(examples)


def test_the_papers_two_ways(monkeypatch):
    model, tokenizer, asked = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer(), questions(5)
    texts = ["\nAnswer: b because", "nothing", " so. Answer:  A", "Answer: Z", "(A) it is"]
    prompts = []
    monkeypatch.setattr(paper_scoring, "_generate", lambda *given: prompts.extend(given[2]) or texts)
    answers = answer_questions(model, tokenizer, asked, scorer="paper")
    first = asked.questions[0]
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip("abcd", first.choices, strict=False))
    assert prompts[0] == f"Answer the following question:\n{first.question}{listed}"
    assert [answers[0].chosen, answers[2].chosen] == [1, 0]
    for index in (1, 3, 4):  # no "Answer: ", or no choice behind it: question + choice, as the paper's code computes it
        question = asked.questions[index]
        perplexities = []
        for choice in question.choices:
            ids = tokenizer.encode(f"{question.question} {choice}")
            with torch.no_grad():
                loss = float(model(input_ids=(x := torch.tensor([ids])), labels=x).loss)
            perplexities.append(math.exp(loss) / len(ids))
        assert [math.exp(-score) for score in answers[index].scores] == pytest.approx(perplexities, rel=1e-3)
        assert answers[index].chosen == perplexities.index(min(perplexities))


def test_what_is_generated():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = ["the court finds", "the patient was given the dose. " * 40]
    texts = paper_scoring._generate(model, tokenizer, prompts)
    ids = torch.tensor([tokenizer.encode(prompts[0])])
    expected = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert texts[0] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(texts) == 2  # what is longer than the model's positions loses its begin


def answer(number, source, correct):
    return Answer(str(number), source, (0.0, 1.0), int(correct), correct, 0)


def test_accuracy_by_source():
    asked = questions(12)
    answers = answer_questions(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer(), asked, num_fewshot=2)
    summary = summarize_answers(asked, answers)
    assert [row.source for row in summary] == ["a", "b", "c", ALL]
    assert sum(row.num_questions for row in summary[:-1]) == summary[-1].num_questions == 12
    assert sum(row.num_correct for row in summary[:-1]) == summary[-1].num_correct
    assert summary[-1].shots == (1, 1)  # one example a source, though two were asked for
    for row in summary:
        interval = stats.binomtest(row.num_correct, row.num_questions).proportion_ci(0.95, method="wilson")
        assert row.accuracy.interval == pytest.approx((interval.low, interval.high))
    chances = [1 / len(question.choices) for question in asked.questions]
    assert summary[-1].chance == pytest.approx(sum(chances) / 12)


def test_paired_comparison():
    base = [answer(number, "ab"[number % 2], number < 14) for number in range(20)]
    pruned = [answer(number, "ab"[number % 2], number < 10 or number == 19) for number in range(20)]
    rows = compare_answers(base, pruned)
    assert [row.source for row in rows] == ["a", "b", ALL]
    assert (rows[-1].only_base, rows[-1].only_pruned) == (4, 1)
    assert rows[-1].difference.value == pytest.approx(-0.15)
    low, high = rows[-1].difference.interval
    assert low < -0.15 < high
    assert rows[-1].p_value == pytest.approx(stats.binomtest(4, 5).pvalue)
    same = compare_answers(base, base)[-1]
    assert (same.p_value, same.difference.value) == (1.0, 0.0)
    assert same.difference.interval[0] < 0 < same.difference.interval[1]  # twenty questions don't prove "no loss"
    with pytest.raises(ConfigError, match="different questions"):
        compare_answers(base, pruned[::-1])


def test_the_interval_of_the_difference_covers_the_truth(subtests):
    """Of shares of questions that both, only the base, only the pruned model, and neither answer rightly."""
    for shares in [(0.4, 0.2, 0.1, 0.3), (0.3, 0.02, 0.02, 0.66), (0.1, 0.3, 0.3, 0.3)]:
        with subtests.test(shares=shares):
            draws = np.random.default_rng(0).multinomial(60, shares, size=300).tolist()
            covered = 0
            for both, only_base, only_pruned, _ in draws:
                low, high = accuracy._difference(both, only_base, only_pruned, 60).interval
                covered += low <= shares[2] - shares[1] <= high
            assert covered / len(draws) >= 0.93


def test_the_interval_where_nothing_differs():
    # Wilson's lower end for 54 of 54 is 54 / (54 + 1.96^2)
    assert accuracy._difference(54, 0, 0, 54).interval == pytest.approx((-0.0664, 0.0664), abs=1e-4)
    assert accuracy._difference(0, 0, 0, 1).interval == pytest.approx((-0.7935, 0.7935), abs=1e-3)


REFUSED_OPTIONS = [
    ({"scorer": "likelyhood"}, "Did you mean 'likelihood'"),
    ({"num_fewshot": -1}, "num_fewshot is -1"),
    ({"num_fewshot": 1.5}, "num_fewshot is 1.5"),
]


def test_options_that_are_refused(subtests):
    for options, said in REFUSED_OPTIONS:
        with subtests.test(options=options, said=said), pytest.raises(ConfigError, match=said):
            answer_questions(tiny_model("llama"), tiny_tokenizer(), questions(2), **options)
