"""Every criterion against a brute force that shares no code with it."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from hf_context_prune.config import DEFAULT_RIDGE, CriterionName
from hf_context_prune.errors import ConfigError, DataError, NumericsError
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.calibrate import calibrate
from hf_context_prune.pruning.calibration.statistics import TargetStatistics, TargetWeights
from hf_context_prune.pruning.criteria import CRITERIA, criterion, get_criterion
from hf_context_prune.pruning.scoring import weights_of_layer
from hf_context_prune.utils.linalg import FLOOR
from tests.support.problems import inputs, statistics_of, weights
from tests.support.tiny import VOCABULARY, tiny_model

SHAPES = [(12, 1), (5, 4), (1, 6)]
"""(units, features a unit)"""


def score(name, w, stats, *, seed=0):
    return CRITERIA[name].function(w, stats, torch.Generator().manual_seed(seed))


def brute_force(name, w: TargetWeights, X: torch.Tensor) -> list[float]:
    """The formulas of DESIGN.md, one weight and one token at a time."""
    W, tokens = w.output.double().numpy(), X.double().numpy()
    result = []
    for unit in range(w.num_units):
        total = float(w.input_magnitude[unit]) if name == "magnitude" else 0.0
        for j in range(unit * w.unit_size, (unit + 1) * w.unit_size):
            x = tokens[:, j]
            norm = sum(float(value) ** 2 for value in W[:, j]) ** 0.5
            total += {
                "magnitude": sum(abs(float(value)) for value in W[:, j]),
                "l1": sum(abs(float(value)) for value in x) / len(x) / w.unit_size,
                "wanda": sum(float(value) ** 2 for value in x) ** 0.5 * norm,
                "flap": float(np.mean((x - x.mean()) ** 2)) * norm**2,
            }[name]
        result.append(total)
    return result


@pytest.mark.parametrize("name", ["magnitude", "l1", "wanda", "flap"])
def test_formula(name, subtests):
    for units, size in SHAPES:
        with subtests.test(units=units, size=size):
            w, X = weights(units, size), inputs(units * size)
            expected = torch.tensor(brute_force(name, w, X), dtype=torch.float64)
            torch.testing.assert_close(score(name, w, statistics_of(X)), expected)


def test_half_precision_weights_are_scored_in_float64(subtests):
    w, stats = weights(12), statistics_of(inputs(12))
    half = TargetWeights(w.output.bfloat16(), 1, w.input_magnitude)
    exact = TargetWeights(w.output.bfloat16().double(), 1, w.input_magnitude)
    for name in ("magnitude", "wanda", "flap", "obs"):
        with subtests.test(name):
            assert score(name, half, stats).dtype == torch.float64
            assert torch.equal(score(name, half, stats), score(name, exact, stats))


def test_flap_of_a_constant_input_is_not_negative():
    X = torch.full((100, 4), 1e4 / 3, dtype=torch.float64)  # sum x^2 / n - mean^2 is rounding noise here
    assert bool((score("flap", weights(4), statistics_of(X)) >= 0).all())


# Units by hand: weights and where in them one unit's numbers are, for each way of storing them.


def llama_parts(block, target, unit):
    if target == "mlp":
        yield block.mlp.gate_proj.weight, (unit,)
        yield block.mlp.up_proj.weight, (unit,)
        yield block.mlp.down_proj.weight, (slice(None), unit)
    else:  # three groups of two query heads of eight features
        query, value = slice(16 * unit, 16 * unit + 16), slice(8 * unit, 8 * unit + 8)
        yield block.self_attn.q_proj.weight, (query,)
        yield block.self_attn.k_proj.weight, (value,)
        yield block.self_attn.v_proj.weight, (value,)
        yield block.self_attn.o_proj.weight, (slice(None), query)


def gpt2_parts(block, target, unit):
    if target == "mlp":  # Conv1D: [in, out]
        yield block.mlp.c_fc.weight, (slice(None), unit)
        yield block.mlp.c_proj.weight, (unit,)
    else:  # all queries, then all keys, then all values
        for role in range(3):
            yield block.attn.c_attn.weight, (slice(None), slice(48 * role + 8 * unit, 48 * role + 8 * unit + 8))
        yield block.attn.c_proj.weight, (slice(8 * unit, 8 * unit + 8),)


def gpt_neox_parts(block, target, unit):
    if target == "mlp":
        yield block.mlp.dense_h_to_4h.weight, (unit,)
        yield block.mlp.dense_4h_to_h.weight, (slice(None), unit)
    else:  # query, key and value of a head lie together
        yield block.attention.query_key_value.weight, (slice(24 * unit, 24 * unit + 24),)
        yield block.attention.dense.weight, (slice(None), slice(8 * unit, 8 * unit + 8))


STORED = {
    "llama": (lambda model: model.model.layers, llama_parts, {"mlp": 40, "attention": 3}),
    "gpt2": (lambda model: model.transformer.h, gpt2_parts, {"mlp": 192, "attention": 6}),
    "gpt_neox": (lambda model: model.gpt_neox.layers, gpt_neox_parts, {"mlp": 40, "attention": 6}),
}


def summed_by_hand(family, model, value_of):
    """{(layer, target): sum of `value_of(weight)` over each unit's weights}."""
    layers, parts, units = STORED[family]
    return {
        (layer, target): torch.tensor(
            [
                sum(float(value_of(weight)[index].sum()) for weight, index in parts(block, target, unit))
                for unit in range(count)
            ],
            dtype=torch.float64,
        )
        for layer, block in enumerate(layers(model))
        for target, count in units.items()
    }


@pytest.mark.parametrize("family", STORED)
def test_magnitude_of_a_model(family):
    model = tiny_model(family)
    view = ModelView.of(model)
    expected = summed_by_hand(family, model, lambda weight: weight.detach().double().abs())
    for (layer, target), value in expected.items():
        got = score("magnitude", weights_of_layer(view, layer, target), None)
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_obs_ranks_by_what_reaches_the_residual_stream(family):
    model = tiny_model(family)
    view = ModelView.of(model)
    block = view.layers[0]
    with torch.no_grad():
        block.post_feedforward_layernorm.weight.copy_(torch.linspace(-1, 3, model.config.hidden_size))
    w = weights_of_layer(view, 0, "mlp")
    gamma = 1 + block.post_feedforward_layernorm.weight.detach()
    torch.testing.assert_close(w.channel_scale[:, 0], gamma, atol=1e-4, rtol=1e-4)
    stats = statistics_of(inputs(w.num_units))
    plain = replace(w, channel_scale=None)
    scaled = replace(plain, output=w.channel_scale * w.output)
    assert torch.equal(score("obs", w, stats), score("obs", scaled, stats))
    assert not torch.equal(score("obs", w, stats), score("obs", plain, stats))
    assert torch.equal(score("wanda", w, stats), score("wanda", plain, stats))


@pytest.mark.parametrize("family", STORED)
def test_taylor_of_a_model(family):
    model = tiny_model(family)
    ids = torch.randint(3, VOCABULARY, (5, 10), generator=torch.Generator().manual_seed(2))
    batches = [ids[:2], ids[2:]]
    stats = calibrate(model, [{"input_ids": chunk} for chunk in batches], statistics=frozenset({"taylor"}))

    parameters = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    gradients = {id(parameter): torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters}
    for chunk in batches:
        log_probabilities = model(input_ids=chunk).logits.log_softmax(dim=-1)
        losses = [
            -log_probabilities[row, position, chunk[row, position + 1]]
            for row in range(len(chunk))
            for position in range(chunk.shape[1] - 1)
        ]
        loss = torch.stack(losses).sum()  # every token weighs the same, whatever its batch
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            gradients[id(parameter)] += gradient.double()

    expected = summed_by_hand(family, model, lambda w: (w.detach().double() * gradients[id(w)]).abs())
    assert set(stats.targets) == set(expected)
    for key, value in expected.items():
        got = score("taylor", None, stats.targets[key])
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)


def greedy_surgeon(W, X, size, *, ridge=DEFAULT_RIDGE, batch=lambda alive: 1):
    """Optimal brain surgeon from its definition: at each step try every unit and refit from scratch.

    The loss of keeping K is the least of ||X W^T - X_K V^T||^2 + ||(W - V) sqrt(D)||^2 over all V (V is 0 outside K).
    """
    W, X = W.double().numpy(), X.double().numpy()
    squares = np.sum(X * X, axis=0)
    A = np.vstack([X, np.diag(np.sqrt(ridge * (squares + FLOOR * np.mean(squares))))])
    target = A @ W.T

    def loss(units):
        columns = [unit * size + feature for unit in units for feature in range(size)]
        if not columns:
            return float(np.sum(target**2))
        fit, *_ = np.linalg.lstsq(A[:, columns], target, rcond=None)
        return float(np.sum((target - A[:, columns] @ fit) ** 2))

    alive = list(range(W.shape[1] // size))
    order = []
    while alive:
        losses = {unit: loss([other for other in alive if other != unit]) for unit in alive}
        gone = sorted(alive, key=losses.get)[: batch(len(alive))]
        order += gone
        alive = [unit for unit in alive if unit not in gone]
    rank = np.empty(len(order))
    rank[order] = np.arange(len(order))
    return torch.tensor(rank)


def test_obs_is_the_greedy_surgeon(subtests):
    for seed, (units, size) in enumerate([(12, 1), (6, 3), (8, 2), (12, 1), (6, 3), (8, 2)]):
        with subtests.test(units=units, size=size, seed=seed):
            w, X = weights(units, size, seed=seed), inputs(units * size, seed=seed)
            assert torch.equal(score("obs", w, statistics_of(X)), greedy_surgeon(w.output, X, size))


@pytest.mark.parametrize("size", [1, 2])
def test_obs_takes_a_sixteenth_at_a_time_where_there_are_many(size):
    w, X = weights(36, size), inputs(36 * size)
    expected = greedy_surgeon(w.output, X, size, batch=lambda alive: max(1, alive // 16))
    assert torch.equal(score("obs", w, statistics_of(X)), expected)


def test_obs_is_a_permutation(subtests):
    for units, size in [*SHAPES, (70, 1), (33, 3)]:
        with subtests.test(units=units, size=size):
            rank = score("obs", weights(units, size), statistics_of(inputs(units * size, tokens=20)))  # fewer tokens
            assert sorted(rank.tolist()) == list(range(units))


def test_obs_removes_dead_inputs_first():
    X = inputs(8)
    X[:, [2, 5]] = 0
    rank = score("obs", weights(8), statistics_of(X))
    assert {int(rank[2]), int(rank[5])} == {0, 1}


def test_obs_without_any_input_is_refused():
    with pytest.raises(NumericsError, match="zero at every token"):
        score("obs", weights(4), statistics_of(torch.zeros(10, 4)))


def test_obs_does_not_hide_a_nan_behind_its_ranks():
    w = weights(6, 2)
    for bad in (float("nan"), float("inf")):
        w.output[0, 3] = bad
        with pytest.raises(NumericsError, match="NaN or Inf"):
            score("obs", w, statistics_of(inputs(12)))
        for name in ("magnitude", "wanda", "flap"):  # theirs shows, and `select_units` refuses it
            assert not torch.isfinite(score(name, w, statistics_of(inputs(12)))).all()


def test_random_is_reproducible_and_knows_nothing():
    w, stats = weights(50), statistics_of(inputs(50))
    first = score("random", w, stats, seed=3)
    assert torch.equal(first, score("random", weights(50, seed=9), statistics_of(inputs(50, seed=9)), seed=3))
    assert not torch.equal(first, score("random", w, stats, seed=4))
    assert first.shape == (50,)
    assert bool(((first >= 0) & (first < 1)).all())


def test_statistics_that_were_not_collected_are_asked_for():
    bare = TargetStatistics(10, *(torch.ones(4, dtype=torch.float64) for _ in range(3)))
    with pytest.raises(ConfigError, match=r"statistics=\{'taylor'\}"):
        score("taylor", weights(4), bare)
    with pytest.raises(DataError, match=r"statistics=\{'gram'\}"):
        score("obs", weights(4), bare)
    assert {name: set(CRITERIA[name].needs) for name in CRITERIA if CRITERIA[name].needs} == {
        "taylor": {"taylor"},
        "obs": {"gram"},
    }


def test_names():
    assert tuple(CRITERIA) == get_args(CriterionName)
    assert get_criterion("wanda").name == "wanda"
    with pytest.raises(ConfigError, match=r"'wandda'.*obs.*'wanda'\?"):
        get_criterion("wandda")
    with pytest.raises(ConfigError, match=r"'xyzzy'.*obs") as error:
        get_criterion("xyzzy")
    assert "?" not in str(error.value)  # nothing like it


def test_a_criterion_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr("hf_context_prune.pruning.criteria.CRITERIA", {})

    @criterion("first", needs=frozenset({"gram"}))
    def first(w, stats, generator):
        return -torch.arange(w.num_units, dtype=torch.float64)

    found = get_criterion("first")
    assert found.needs == {"gram"}
    assert found.function(weights(3), None, None).tolist() == [0.0, -1.0, -2.0]
