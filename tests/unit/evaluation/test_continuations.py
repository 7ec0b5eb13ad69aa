"""Continuations on a shared cache are scored as whole sequences are, one by one."""

from __future__ import annotations

import random

import pytest
import torch

from hf_context_prune.evaluation.continuations import Alternatives, continuation_log_probs
from tests.support.tiny import COVERING, case, tiny_model


def alternatives(generator, shared, rests, *, back=0):
    """A text of `shared` tokens with continuations of these lengths; scored from `back` tokens before they differ."""

    def draw(count):
        return torch.randint(3, 300, (count,), generator=generator).tolist()

    prefix = draw(shared)
    sequences = [(*prefix, 303 + number, *draw(length - 1)) for number, length in enumerate(rests)]
    return Alternatives(tuple(sequences), tuple(max(1, shared - back) for _ in rests))


def one_by_one(model, items):
    result = []
    for item in items:
        scores = []
        for sequence, start in zip(item.sequences, item.starts, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sequence[:-1]])).logits[0].log_softmax(dim=-1)
            scores.append(sum(float(logits[place - 1, sequence[place]]) for place in range(start, len(sequence))))
        result.append(scores)
    return result


def items_for(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        alternatives(generator, 9, [1, 1, 1, 1]),
        alternatives(generator, 17, [3, 1, 5], back=4),
        alternatives(generator, 24, [2, 6]),
        alternatives(generator, 5, [4, 4, 4, 4, 9], back=20),
        alternatives(generator, 1, [2, 3]),
        alternatives(generator, 30, [7, 2], back=2),
    ]


@pytest.mark.parametrize("name", COVERING)
def test_scores_are_those_of_whole_sequences(name):
    model, items = case(name), items_for()
    expected = one_by_one(model, items)
    for batch_tokens in (1, 150, 4096):
        got = continuation_log_probs(model, items, batch_tokens=batch_tokens)
        for scores, exact in zip(got, expected, strict=True):
            assert scores == pytest.approx(exact, abs=2e-3)


def test_sequences_that_share_nothing():
    model = tiny_model("llama")
    items = [Alternatives(((5, 6, 7), (8, 9)), (1, 1)), Alternatives(((5, 6), (8, 9, 11, 12)), (1, 2))]
    expected = one_by_one(model, items)
    for batch_tokens in (1, 4096):
        got = continuation_log_probs(model, items, batch_tokens=batch_tokens)
        assert [score for scores in got for score in scores] == pytest.approx(
            [score for scores in expected for score in scores], abs=1e-4
        )


def test_what_does_not_fit_loses_its_begin():
    model = tiny_model("gpt2", max_position_embeddings=16)
    item = alternatives(torch.Generator().manual_seed(0), 20, [3, 2])
    short = item.shortened(16)
    assert [len(sequence) for sequence in short.sequences] == [17, 17]  # the last one is not read
    assert short.starts == (14, 15)
    assert [row[-3:] for row in short.sequences] == [row[-3:] for row in item.sequences]
    expected = one_by_one(model, [short])
    assert continuation_log_probs(model, [item])[0] == pytest.approx(expected[0], abs=1e-4)
    mixed = Alternatives((item.sequences[0], (5, 6)), (20, 1))  # the short one stays whole
    assert mixed.shortened(16).sequences[1] == (5, 6)
    assert continuation_log_probs(model, [item]) == continuation_log_probs(model, [short])
    assert item.shortened(None) is item.shortened(40) is item.shortened(22) is item


def run_tokens(model, items, **options):
    """How many tokens went through the model, padding included."""
    tokens = []
    handle = model.model.register_forward_pre_hook(
        lambda _, __, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    continuation_log_probs(model, items, **options)
    handle.remove()
    return tokens


def test_the_shared_part_runs_once():
    item = alternatives(torch.Generator().manual_seed(0), 60, [5, 4, 6, 5, 1])
    assert run_tokens(tiny_model("llama"), [item]) == [60, 4 * 5]  # the last token of a choice predicts nothing


@pytest.mark.parametrize("lengths", [(1, 90), (1, 8), (60, 61)])
def test_a_question_costs_little_more_than_its_tokens(lengths):
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    items = [
        alternatives(generator, draw.randint(*lengths), [draw.randint(1, 30) for _ in range(draw.randint(2, 6))])
        for _ in range(60)
    ]
    there = sum(item.shared + sum(len(sequence) - item.shared for sequence in item.sequences) for item in items)
    for batch_tokens in (400, 4096):
        ran = run_tokens(tiny_model("llama"), items, batch_tokens=batch_tokens)
        assert sum(ran) <= 1.3 * there
        assert len(ran) < 4 * len(items)  # and still in batches


def test_the_mode_is_given_back_and_nothing_has_a_gradient():
    model = tiny_model("llama").train()
    continuation_log_probs(model, items_for())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
