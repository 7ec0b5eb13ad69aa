"""The refit lowers the loss on text of the domain, on text that it does not fit, or changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from hf_context_prune.modeling.architectures import layers_of, spec_of
from hf_context_prune.pruning.calibration.samples import VALIDATION_EVERY
from hf_context_prune.pruning.vocabulary import refit, row_regression
from hf_context_prune.pruning.vocabulary.refit import (
    KnownStates,
    _validation_last,
    _vertex,
    num_refit_samples,
    refit_rows,
)
from hf_context_prune.pruning.vocabulary.row_regression import RowRegression
from tests.support.tiny import VOCABULARY, case


def domain(blocks=36, *, first=3, tokens=12, seed=0):
    """Blocks that use a few tokens, which a random model does not expect."""
    return torch.randint(first, first + tokens, (blocks, 32), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def loss_of(model, samples):
    logits = model(input_ids=samples).logits[:, :-1].float()
    return float(functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()))


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


HEADS = {
    "llama": {"lm_head.weight"},
    "llama-mqa-tied": {"lm_head.weight", "model.embed_tokens.weight"},
    "gpt2": {"lm_head.weight", "transformer.wte.weight"},
    "gpt_neox": {"lm_head.weight"},
    "phi": {"lm_head.weight"},
    "opt": {"lm_head.weight", "model.decoder.embed_tokens.weight"},
}


@pytest.mark.parametrize("name", HEADS)
def test_it_lowers_the_loss_on_text_that_is_not_fitted(name):
    model, samples = case(name), domain()
    count = len(samples) // VALIDATION_EVERY
    before, probe = copied(model), samples[_validation_last(samples, count)[-count:]]
    dense = loss_of(model, probe), loss_of(model, domain(seed=1))
    result = refit_rows(model, samples)
    assert result["before"] == pytest.approx(dense[0], abs=1e-4)
    assert result["after"] == pytest.approx(loss_of(model, probe), abs=1e-4)
    assert result["after"] < result["before"] - 0.02
    assert loss_of(model, domain(seed=1)) < dense[1] - 0.02  # nor is it that text alone
    assert 0 < result["share"] <= 1
    assert changed(model, before) == HEADS[name]


def test_validation_samples_repeat_no_others():
    samples = domain(32, tokens=200)
    for index in (25, 26, 28, 30, 31):  # of the last quarter, 24 to 31
        samples[index, :20] = samples[index - 20, 4:24]
    order = _validation_last(samples, 3)
    assert order.tolist() == [*range(24), 25, 26, 28, 30, 31, 24, 27, 29]
    assert _validation_last(samples[:, :4], 8).tolist() == list(range(32))  # as many as there are to choose from


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ((3.0, 2.0, 2.0), 0.75),  # as (x - 0.75)^2, up to a factor and a sum
        ((2.0, 1.9, 2.4), 0.333),
        ((3.0, 2.0, 1.0), None),  # a line
        ((3.0, 2.2, 1.8), None),  # lowest beyond 1
        ((2.0, 2.5, 3.5), None),  # lowest below 0
        ((3.0, 2.0, math.inf), None),
        ((3.0, 2.0, 3.0), None),  # in the middle, which is known
    ],
)
def test_the_lowest_point_of_a_parabola(losses, share):
    assert _vertex(*losses) == share


def states_of(model, samples):
    """Hidden states behind the last layer, as an earlier stage leaves them."""
    seen = []
    last = layers_of(model, spec_of(model.config))[-1]
    handle = last.register_forward_hook(
        lambda _, args, found: seen.append(found if torch.is_tensor(found) else found[0])
    )
    with torch.no_grad():
        model(input_ids=samples)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["llama-mqa-tied", "gpt2", "phi"])
def test_known_states_give_the_same_rows_without_a_forward_pass(name, monkeypatch):
    samples, read, forward = domain(), [], refit.forward_in_turns

    def counted(model, batches, *, head=True):
        batches = list(batches)
        for batch, output in zip(batches, forward(model, batches, head=head), strict=True):
            read.append(0 if head else len(batch["input_ids"]))
            yield output

    monkeypatch.setattr(refit, "forward_in_turns", counted)
    heads, results = [], []
    for known, forwards in ((None, 36), (24, 12), ("others", 36)):
        model = case(name)
        if known is not None:
            states = states_of(model, samples[:24])
            known = KnownStates(samples[:24], states) if known == 24 else KnownStates(samples[:24].flip(0), 0 * states)
        read.clear()
        results.append(refit_rows(model, samples, known))
        heads.append(model.get_output_embeddings().weight)
        assert sum(read) == forwards
    torch.testing.assert_close(heads[1], heads[0], atol=1e-4, rtol=1e-4)
    assert results[1] == pytest.approx(results[0], abs=1e-4)
    assert torch.equal(heads[2], heads[0])  # states of other samples are left alone
    assert results[2] == results[0]


def test_text_that_misleads_leaves_all_as_it_was():
    model = case("llama")
    before = copied(model)
    torch.manual_seed(0)  # text of the model's own, which it predicts as well as can be
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 31, "min_new_tokens": 31}
    probe = model.generate(torch.ones(3, 1, dtype=torch.long), **options)
    result = refit_rows(model, torch.cat([domain(33), probe]))
    assert result == {"before": result["before"], "after": result["before"], "share": 0.0}
    assert result["before"] == pytest.approx(loss_of(model, probe), abs=1e-4)
    assert not changed(model, before)


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 300), ("llama-mqa-tied", 1), ("phi", 12), ("gpt2", 300), ("llama", 12), ("phi", 1)]
)
def test_never_worse_on_the_held_out_samples(name, count):
    model = case(name)
    samples = torch.cat([domain(tokens=count), domain(3, first=5, tokens=200)])
    before = loss_of(model, samples[-3:])
    result = refit_rows(model, samples)
    assert result["after"] <= result["before"]
    assert loss_of(model, samples[-3:]) <= before + 1e-5


@pytest.mark.parametrize(
    ("name", "overrides", "refitted"),
    [
        ("gemma2", {}, False),
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("granite", {}, False),
        ("granite", {"logits_scaling": 1.0}, True),
    ],
)
def test_only_where_the_head_alone_gives_the_logits(name, overrides, refitted):
    model = case(name, **overrides)
    before = copied(model)
    result = refit_rows(model, domain())
    assert (result is not None) == refitted
    assert bool(changed(model, before)) == refitted


def test_too_little_text():
    model = case("llama")
    before = copied(model)
    assert refit_rows(model, domain(VALIDATION_EVERY - 1)) is None
    assert not changed(model, before)
    assert refit_rows(model, domain(VALIDATION_EVERY)) is not None


def test_text_is_read_as_far_as_it_pays(monkeypatch):
    model = case("llama")
    assert num_refit_samples(model, 30, 32) == 120
    monkeypatch.setattr(refit, "_MOST_LOGITS", 48 * 32 * VOCABULARY)
    assert num_refit_samples(model, 30, 32) == 48
    monkeypatch.setattr(refit, "_MOST_LOGITS", 1)  # the samples of the layers' reconstruction
    assert num_refit_samples(model, 30, 32) == 30
    monkeypatch.setattr(refit, "_MOST_STATES", 20 * 32 * model.config.hidden_size)
    assert num_refit_samples(model, 30, 32) == 20
    monkeypatch.setattr(refit, "_MOST_STATES", 1)  # never fewer than can be split
    assert num_refit_samples(model, 30, 32) == VALIDATION_EVERY


def test_more_text_generalises_better():
    """Rare continuations that a little text shows by chance alone are not learnt by heart."""
    other = domain(200, seed=1, tokens=60)
    losses = []
    for blocks in (24, 240):
        model = case("llama")
        refit_rows(model, domain(blocks, tokens=60))
        losses.append(loss_of(model, other))
    assert losses[1] < losses[0] < loss_of(case("llama"), other)


def test_rows_that_the_text_has_no_use_for_stay_and_count():
    """Tokens that are neither there nor expected keep their rows, and their part of the probability is counted."""
    model, samples = case("llama"), domain(60)
    with torch.no_grad():
        bias = model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY), requires_grad=False)
        bias[100:] = -9.0
    old, before = model.lm_head.weight.clone(), loss_of(model, samples[-5:])
    result = refit_rows(model, samples)
    moved = (model.lm_head.weight != old).any(dim=1)
    assert moved[3:15].all()  # the domain's
    assert moved[:100].all()  # a random model expects them all
    assert not moved[100:].any()
    assert result["before"] == pytest.approx(before, abs=1e-4)
    assert result["after"] == pytest.approx(loss_of(model, samples[-5:]), abs=1e-4)
    assert result["after"] < before - 0.02


def test_validation_loss_is_the_same_with_rows_that_stay():
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(64, 48, generator=generator), torch.randn(VOCABULARY, 48, generator=generator)
    weight[200:] *= 0.01
    bias = torch.full((VOCABULARY,), -9.0)
    bias[:200] = 0.0
    targets = torch.randint(0, 200, (64,), generator=generator)
    targets[-1] = 300  # of the withheld text alone
    text = (states[:32], targets[:32]), (states[32:], targets[32:])
    problem = RowRegression(weight, bias, *text)
    assert set(range(200, VOCABULARY)) - set(problem.rows.tolist())
    assert 300 in problem.rows
    expected = float(functional.cross_entropy(functional.linear(states[32:], weight, bias), targets[32:]))
    assert problem._validation_loss(weight[problem.rows]) == pytest.approx(expected, rel=1e-5)


def test_steps_on_parts_of_the_text(monkeypatch):
    whole, parts = case("llama"), case("llama")
    first = refit_rows(whole, domain(60))
    monkeypatch.setattr(row_regression, "_STEP_LOGITS", 256 * VOCABULARY)
    second = refit_rows(parts, domain(60))
    assert second["before"] == first["before"]
    assert second["after"] != first["after"]
    assert second["before"] - second["after"] > 0.7 * (first["before"] - first["after"])


@pytest.mark.parametrize("name", ["llama", "llama-mqa-tied"])
def test_the_dtype_stays(name):
    model = case(name).bfloat16()
    before = copied(model)
    result = refit_rows(model, domain())
    assert result["after"] < result["before"]
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert changed(model, before) == HEADS[name]


@pytest.mark.parametrize(("biased", "elements"), [(False, 5 * VOCABULARY), (True, 2**25), (True, 5 * VOCABULARY)])
def test_the_gradient_is_that_of_the_loss(biased, elements, monkeypatch):
    monkeypatch.setattr(row_regression, "_ELEMENTS", elements)  # all positions at once, or five
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(37, 48, generator=generator), torch.randn(VOCABULARY, 48, generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator) if biased else None
    targets = torch.randint(0, VOCABULARY, (37,), generator=generator)
    weight.requires_grad_(True)
    logits = functional.linear(states, weight, bias)
    (expected,) = torch.autograd.grad(functional.cross_entropy(logits, targets), weight)
    with torch.no_grad():
        problem = RowRegression(weight.detach(), bias, (states, targets), (states, targets))
        gradient, predicted = problem._gradient(weight.detach()[problem.rows], *problem.fitted)
    torch.testing.assert_close(gradient, expected[problem.rows])
    torch.testing.assert_close(predicted, logits.detach().softmax(dim=-1).mean(dim=0)[problem.rows])
