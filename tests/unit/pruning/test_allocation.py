"""Budget -> widths -> kept units: property tests, and brute force where the cases are small."""

from __future__ import annotations

import itertools
import math
import random
import re
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError, NumericsError, UnsupportedArchitectureError
from hf_context_prune.modeling.geometry import Geometry, LayerWidths
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.adaptive import adaptive_widths, loss_on_hull, most_removable, predicted_loss
from hf_context_prune.pruning.allocation.budget import ParameterBudget, removed_params
from hf_context_prune.pruning.allocation.uniform import round_half_up, uniform_widths
from hf_context_prune.pruning.allocation.widths import check_adaptive
from hf_context_prune.pruning.scoring import select_units
from tests.support.tiny import case

COSTS = {"mlp": 3, "attention": 100}
quick = settings(max_examples=75, deadline=None)


def geometry(*layers):
    """Of (neurons, KV groups) pairs."""
    return Geometry(hidden_size=16, head_dim=4, queries_per_group=2, layers=tuple(LayerWidths(*x) for x in layers))


def total_params(shape, costs, *, rest=1000):
    """Units and what can't be pruned."""
    return rest + removed_params(shape.layers, [LayerWidths(0, 0)] * len(shape.layers), costs)


def uniform(shape, costs, total, *, native_groups=(), **options):
    config = PrunerConfig(**options)
    return uniform_widths(shape, costs, ParameterBudget.of(config, total), config, native_groups=native_groups)


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=4).map(lambda x: geometry(*x))
equal_shapes = st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 6)).map(
    lambda x: geometry(*[x[1:]] * x[0])
)
all_costs = st.fixed_dictionaries({"mlp": st.integers(1, 50), "attention": st.integers(1, 500)})
ratios = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)
multiples = st.integers(1, 12)


def allowed_neurons(width, multiple):
    """The whole width and the multiples below it, widest first."""
    return [width, *(n for n in range(width - 1, 0, -1) if n % multiple == 0)]


# Uniform widths


@quick
@given(equal_shapes, all_costs, ratios, multiples)
def test_a_share_is_met_by_the_widest_allowed_widths(shape, costs, ratio, multiple):
    total = total_params(shape, costs)
    asked = math.ceil(Fraction(str(ratio)) * total)
    dense = shape.layers[0]
    expected = next(
        (
            n
            for n in allowed_neurons(dense.neurons, multiple)
            if len(shape.layers) * costs["mlp"] * (dense.neurons - n) >= asked
        ),
        None,
    )
    if expected is None:
        with pytest.raises(BudgetError):
            uniform(shape, costs, total, pruning_ratio=ratio, round_to=multiple)
        return
    widths = uniform(shape, costs, total, pruning_ratio=ratio, round_to=multiple)
    assert set(widths) == {LayerWidths(expected, dense.kv_groups)}


@quick
@given(shapes, all_costs, ratios, multiples)
def test_layers_of_different_widths_share_alike(shape, costs, ratio, multiple):
    total = total_params(shape, costs)
    asked = math.ceil(Fraction(str(ratio)) * total)
    try:
        widths = uniform(shape, costs, total, pruning_ratio=ratio, round_to=multiple)
    except BudgetError:
        assume(False)
    removed = removed_params(shape.layers, widths, costs)
    assert removed >= asked
    assert removed - asked < len(widths) * costs["mlp"] * multiple  # one step: at most a multiple in every layer
    for dense, width in zip(shape.layers, widths, strict=True):
        assert width.kv_groups == dense.kv_groups
        assert width.neurons in allowed_neurons(dense.neurons, multiple)


@quick
@given(shapes, ratios, multiples)
def test_mlp_ratio_is_exact(shape, ratio, multiple):
    expected = []
    for dense in shape.layers:
        left = dense.neurons - math.floor(dense.neurons * Fraction(str(ratio)) + Fraction(1, 2))
        allowed = allowed_neurons(dense.neurons, multiple)
        expected.append(next((n for n in allowed if n <= left), allowed[-1]))
    dense = [layer.neurons for layer in shape.layers]
    if ratio > 0 and expected == dense:
        with pytest.raises(BudgetError, match=f"mlp_ratio is {ratio}.*{max(dense)}"):
            uniform(shape, COSTS, 10_000, mlp_ratio=ratio, round_to=multiple)
        return
    widths = uniform(shape, COSTS, 10_000, mlp_ratio=ratio, round_to=multiple)
    assert [width.neurons for width in widths] == expected
    assert [width.kv_groups for width in widths] == [layer.kv_groups for layer in shape.layers]


def test_a_quarter_is_a_quarter():
    for neurons in (4, 40, 1536, 8192):
        (width,) = uniform(geometry((neurons, 3)), COSTS, 10**6, mlp_ratio=0.25)
        assert width == LayerWidths(neurons * 3 // 4, 3)


def test_round_half_up():
    assert [round_half_up(value) for value in (0.0, 0.49, 0.5, 1.5, 2.5, 2.4999)] == [0, 0, 1, 2, 3, 2]
    assert round_half_up(0.35 * 10) == 4  # 3.5 in decimal
    assert round_half_up(0.145 * 100) == 15  # 14.499999999999998 in binary


def test_mlp_ratio_that_removes_nothing_names_one_that_does():
    shape = geometry((41, 2), (30, 2))
    with pytest.raises(BudgetError, match=r"mlp_ratio is 0\.001") as error:
        uniform(shape, COSTS, 10_000, mlp_ratio=0.001)
    least = float(re.search(r"at least ([\d.]+)", str(error.value))[1])
    assert uniform(shape, COSTS, 10_000, mlp_ratio=least)[0].neurons == 40
    with pytest.raises(BudgetError, match=r"round_to is 64.*\b41\b"):
        uniform(shape, COSTS, 10_000, mlp_ratio=0.5, round_to=64)


@quick
@given(shapes, ratios)
def test_attention_ratio_rounds_half_up_and_keeps_one_group(shape, ratio):
    expected = [
        max(1, dense.kv_groups - math.floor(dense.kv_groups * Fraction(str(ratio)) + Fraction(1, 2)))
        for dense in shape.layers
    ]
    counts = [dense.kv_groups for dense in shape.layers]
    stuck = any(kept == count > 1 for count, kept in zip(counts, expected, strict=True))
    if ratio > 0 and (stuck or max(counts) == 1):
        with pytest.raises(BudgetError, match=f"attention_ratio is {ratio},"):
            uniform(shape, COSTS, 10_000, attention_ratio=ratio)
        return
    widths = uniform(shape, COSTS, 10_000, attention_ratio=ratio)
    assert [width.kv_groups for width in widths] == expected
    assert [width.neurons for width in widths] == [dense.neurons for dense in shape.layers]


def test_attention_ratio_that_removes_nothing_names_those_that_do():
    for groups in (2, 3, 8):
        shape = geometry((10, groups))
        with pytest.raises(BudgetError, match=rf"attention_ratio is 0\.01.*\b{groups}\b") as error:
            uniform(shape, COSTS, 10_000, attention_ratio=0.01)
        named = [float(x) for x in re.findall(r"\d\.\d{3}", str(error.value))]
        kept = [uniform(shape, COSTS, 10_000, attention_ratio=ratio)[0].kv_groups for ratio in named]
        assert kept == list(range(groups, 0, -1))


@quick
@given(equal_shapes, all_costs, ratios, ratios)
def test_share_with_a_fixed_attention_ratio(shape, costs, ratio, attention_ratio):
    total = total_params(shape, costs)
    try:
        (alone, *_) = uniform(shape, costs, total, attention_ratio=attention_ratio)
        widths = uniform(shape, costs, total, pruning_ratio=ratio, attention_ratio=attention_ratio)
    except BudgetError:
        assume(False)
    assert {width.kv_groups for width in widths} == {alone.kv_groups}
    removed, asked = removed_params(shape.layers, widths, costs), ratio * total
    assert removed >= asked - 1e-6
    if widths[0].neurons < shape.layers[0].neurons:
        assert removed - asked < len(widths) * costs["mlp"]
    else:  # the attention alone gave enough
        assert removed == removed_params(shape.layers, [alone] * len(widths), costs)


@quick
@given(equal_shapes, all_costs, ratios, ratios, multiples)
def test_share_with_a_fixed_mlp_ratio(shape, costs, ratio, mlp_ratio, multiple):
    total = total_params(shape, costs)
    try:
        (alone, *_) = uniform(shape, costs, total, mlp_ratio=mlp_ratio, round_to=multiple)
        widths = uniform(shape, costs, total, pruning_ratio=ratio, mlp_ratio=mlp_ratio, round_to=multiple)
    except BudgetError:
        assume(False)
    assert {width.neurons for width in widths} == {alone.neurons}
    assert min(width.kv_groups for width in widths) >= 1
    removed, asked = removed_params(shape.layers, widths, costs), ratio * total
    assert removed >= asked - 1e-6
    if widths[0].kv_groups < shape.layers[0].kv_groups:
        assert removed - asked < len(widths) * costs["attention"]


@quick
@given(equal_shapes, all_costs, st.data())
def test_target_params(shape, costs, data):
    total = total_params(shape, costs)
    target = data.draw(st.integers(1, total))
    try:
        widths = uniform(shape, costs, total, target_params=target)
    except BudgetError:
        assert total - target > len(shape.layers) * costs["mlp"] * (shape.layers[0].neurons - 1)
        return
    left = total - removed_params(shape.layers, widths, costs)
    assert target - len(widths) * costs["mlp"] < left <= target


def test_budget():
    assert ParameterBudget.of(PrunerConfig(pruning_ratio=0.2), 5) == ParameterBudget(
        5, 1, 0.2
    )  # 0.2 * 5 is a little above 1 in binary
    assert ParameterBudget.of(PrunerConfig(pruning_ratio=0.2), 11) == ParameterBudget(11, 3, 0.2)
    assert ParameterBudget.of(PrunerConfig(pruning_ratio=0), 11) == ParameterBudget(11, 0, 0)
    assert ParameterBudget.of(PrunerConfig(target_params=8), 10) == ParameterBudget(10, 2, 0.2)
    assert ParameterBudget.of(PrunerConfig(mlp_ratio=0.5), 10) == ParameterBudget(10, None, None)
    for total in (70_553_706_496, 405_853_388_800, 10**13 + 7):  # doubles are coarse there
        for gone in (1, 12_345_678_901, total // 3, total - 1):
            assert ParameterBudget.of(PrunerConfig(pruning_ratio=gone / total), total).remove_params == gone
    with pytest.raises(BudgetError, match=r"target_params is 2,000.*1,000"):
        ParameterBudget.of(PrunerConfig(target_params=2000), 1000)


def named_maximum(error):
    count, share = re.search(r"at most ([\d,]+) \((\d\.\d{4})\)", str(error)).groups()
    return int(count.replace(",", "")), float(share)


unreachable = st.sampled_from(
    [{}, {"attention_ratio": 0.5}, {"mlp_ratio": 0.5}, {"round_to": 7}, {"attention_ratio": 0.9, "round_to": 3}]
)


@quick
@given(equal_shapes, all_costs, unreachable)
def test_the_named_maximum_can_be_reached(shape, costs, options):
    total = total_params(shape, costs)
    with pytest.raises(BudgetError) as error:
        uniform(shape, costs, total, target_params=1, **options)
    assume(
        "removes no" not in str(error.value) and "single KV group" not in str(error.value)
    )  # the unit's own ratio was refused
    most, share = named_maximum(error.value)
    widths = uniform(shape, costs, total, target_params=total - most, **options)
    assert removed_params(shape.layers, widths, costs) == most
    assert removed_params(shape.layers, uniform(shape, costs, total, pruning_ratio=share, **options), costs) <= most
    with pytest.raises(BudgetError):
        uniform(shape, costs, total, target_params=total - most - 1, **options)


@quick
@given(equal_shapes, all_costs, st.sampled_from([(), (2, 4)]))
def test_the_hint_at_attention_can_be_reached(shape, costs, stock):
    groups = shape.layers[0].kv_groups
    stock = [n for n in {*stock, groups} if n <= groups] if stock else []
    total = total_params(shape, costs, rest=10)
    with pytest.raises(BudgetError) as error:
        uniform(shape, costs, total, target_params=1, native_groups=stock)
    hint = re.search(r"With --attention-ratio as well, up to (\d\.\d{4}) can", str(error.value))
    if min(stock, default=1) == groups:
        assert hint is None
        return
    most = 1 - min(stock, default=1) / groups
    uniform(shape, costs, total, pruning_ratio=float(hint[1]), attention_ratio=most, native_groups=stock)


def test_native_groups():
    shape, stock = geometry((20, 8), (20, 8)), [2, 4, 8]
    total = total_params(shape, COSTS)

    def groups(**options):
        return [width.kv_groups for width in uniform(shape, COSTS, total, native_groups=stock, **options)]

    assert groups(attention_ratio=0.25) == [4, 4]  # six would do; four is the next that the native architecture holds
    assert groups(attention_ratio=0.5) == [4, 4]
    assert groups(attention_ratio=0) == [8, 8]
    with pytest.raises(BudgetError, match=r"1 of 8 KV groups.*2, 4, 8"):
        groups(attention_ratio=0.9)
    # removing `n` groups in two layers is 200 n parameters
    for removed, expected in ((0, 8), (1, 4), (800, 4), (801, 2), (1200, 2)):
        assert groups(mlp_ratio=0, target_params=total - removed) == [expected] * 2
    with pytest.raises(BudgetError, match="1,200"):
        groups(mlp_ratio=0, target_params=total - 1201)


# Adaptive widths


def at(curve, kept):
    """The surrogate between a curve's points: the optimum is checked against it, its shape has a test of its own."""
    return loss_on_hull(curve, [curve[0][0] - kept])[0]


def test_between_measured_widths_stands_the_power_law_through_them():
    curve = ((100, 0.0), (75, 0.02), (50, 0.08), (25, 0.18))  # loss = 0.02 (gone / 25)^2
    losses = loss_on_hull(curve, list(range(76)))
    assert losses[::25] == pytest.approx([0.0, 0.02, 0.08, 0.18])  # the measured ones as they are
    assert losses == pytest.approx([0.02 * (gone / 25) ** 2 for gone in range(76)], abs=2e-4)
    flat = ((100, 0.0), (75, 0.0), (50, 0.1))  # no power law through zero: a straight line
    assert loss_on_hull(flat, [0, 10, 25, 30, 50]) == pytest.approx([0, 0, 0, 0.02, 0.1])


@st.composite
def convex_problems(draw):
    """(geometry, convex curves, costs)."""
    layers, curves = [], {}
    for layer in range(draw(st.integers(1, 3))):
        widths = {}
        for target, most in (("mlp", 9), ("attention", 4)):
            total = draw(st.integers(2, most))
            widths[target] = total
            below = draw(st.sets(st.integers(1, total - 1), min_size=1))
            points = [total, *sorted(below, reverse=True)]
            slopes = sorted(draw(st.lists(st.integers(0, 20), min_size=len(below), max_size=len(below))))
            curve = [(total, 0.0)]
            for (wide, narrow), slope in zip(itertools.pairwise(points), slopes, strict=True):
                curve.append((narrow, curve[-1][1] + slope * (wide - narrow)))
            if draw(st.booleans()) or target == "mlp":
                curves[layer, target] = tuple(curve)
        layers.append((widths["mlp"], widths["attention"]))
    costs = {"mlp": draw(st.integers(1, 4)), "attention": draw(st.integers(1, 9))}
    return geometry(*layers), curves, costs


def loss_of(curves, widths):
    kept = {"mlp": lambda w: w.neurons, "attention": lambda w: w.kv_groups}
    return sum(at(curve, kept[target](widths[layer])) for (layer, target), curve in curves.items())


@quick
@given(convex_problems(), st.integers(1, 4), st.data())
def test_adaptive_widths_are_optimal(problem, multiple, data):
    shape, curves, costs = problem
    allowed = {
        key: sorted(set(allowed_neurons(curve[0][0], multiple if key[1] == "mlp" else 1)) - set(range(curve[-1][0])))
        for key, curve in curves.items()
    }
    # Every choice of widths; states are (parameters, least loss), since the sum is additive.
    best = {0: 0.0}
    for (layer, target), curve in curves.items():
        states: dict[int, float] = {}
        for kept in allowed[layer, target]:
            for params, sofar in best.items():
                key = params + (curve[0][0] - kept) * costs[target]
                states[key] = min(states.get(key, math.inf), sofar + at(curve, kept))
        best = states
    assert most_removable(curves, costs, {"mlp": multiple}) == max(best)
    asked = data.draw(st.integers(0, max(best)))
    widths = adaptive_widths(curves, shape, costs, asked, round_to=multiple)
    removed = removed_params(shape.layers, widths, costs)
    assert asked <= removed < asked + max(costs["mlp"] * multiple, costs["attention"])
    assert loss_of(curves, widths) == pytest.approx(min(loss for params, loss in best.items() if params >= asked))
    assert predicted_loss(curves, widths) == pytest.approx(loss_of(curves, widths))
    assert adaptive_widths(curves, shape, costs, asked, round_to=multiple) == widths


def test_a_real_model_is_solved_at_once():
    """30 layers of 1536 neurons and 3 KV groups, sizes of SmolLM2-135M."""
    draw = random.Random(0)
    curves, costs = {}, {"mlp": 1728, "attention": 294_912}
    for layer in range(30):
        curves[layer, "mlp"] = ((1536, 0.0), *((1152 - 384 * i, draw.random() * 4**i) for i in range(3)))
        curves[layer, "attention"] = ((3, 0.0), (2, draw.random()), (1, 2 * draw.random()))
    shape = geometry(*[(1536, 3)] * 30)
    start = time.perf_counter()
    for asked in (1, 6_725_700, 26_902_801, 50_000_001):
        widths = adaptive_widths(curves, shape, costs, asked)
        assert asked <= removed_params(shape.layers, widths, costs) < asked + costs["mlp"]
    assert time.perf_counter() - start < 4 * 2


@quick
@given(convex_problems(), st.integers(1, 4), st.data())
def test_adaptive_widths_are_rounded(problem, multiple, data):
    shape, curves, costs = problem
    try:
        adaptive_widths(curves, shape, costs, 10**6, round_to=multiple)
    except BudgetError as error:
        most = int(re.search(r"at most ([\d,]+)", str(error))[1].replace(",", ""))
    asked = data.draw(st.integers(0, most))
    widths = adaptive_widths(curves, shape, costs, asked, round_to=multiple)
    removed = removed_params(shape.layers, widths, costs)
    assert asked <= removed < asked + max(costs["mlp"] * multiple, costs["attention"])
    for dense, width in zip(shape.layers, widths, strict=True):
        assert width.neurons in allowed_neurons(dense.neurons, multiple)
        assert 1 <= width.kv_groups <= dense.kv_groups
    with pytest.raises(BudgetError, match=f"at most {most:,}"):
        adaptive_widths(curves, shape, costs, most + 1, round_to=multiple)


def test_curves_that_are_not_convex_are_hulled():
    curves = {(0, "mlp"): ((8, 0.0), (6, 5.0), (4, 1.0)), (1, "mlp"): ((8, 0.0), (4, 1.2))}
    shape, costs = geometry((8, 1), (8, 1)), {"mlp": 1, "attention": 1}
    # The first layer's way to 4 costs 0.25 a neuron, whatever 6 was measured at; the second's costs 0.3.
    assert [w.neurons for w in adaptive_widths(curves, shape, costs, 4)] == [4, 8]
    assert [w.neurons for w in adaptive_widths(curves, shape, costs, 6)] == [4, 6]


def test_losses_that_fall_are_free_and_not_a_credit():
    curves = {(0, "mlp"): ((8, 0.0), (6, -3.0), (4, 1.0)), (1, "mlp"): ((8, 0.0), (4, 3.2))}
    shape, costs = geometry((8, 1), (8, 1)), {"mlp": 1, "attention": 1}
    assert [w.neurons for w in adaptive_widths(curves, shape, costs, 2)] == [6, 8]
    # From 6 to 4 it counts from 0 to 1 (0.5 a neuron, before the other's 0.8), not from -3 to 1 (2 a neuron).
    assert [w.neurons for w in adaptive_widths(curves, shape, costs, 4)] == [4, 8]


def test_the_cheaper_unit_by_parameters_goes_first():
    curves = {(0, "mlp"): ((8, 0.0), (4, 4.0)), (0, "attention"): ((4, 0.0), (2, 4.0))}
    shape = geometry((8, 4))
    assert adaptive_widths(curves, shape, {"mlp": 1, "attention": 10}, 10) == (LayerWidths(8, 3),)
    assert adaptive_widths(curves, shape, {"mlp": 4, "attention": 4}, 4) == (LayerWidths(7, 4),)


def test_adaptive_layers_without_a_curve_stay_whole():
    curves = {(1, "mlp"): ((8, 0.0), (2, 1.0))}
    shape = geometry((8, 3), (8, 3))
    assert adaptive_widths(curves, shape, COSTS, 6) == (LayerWidths(8, 3), LayerWidths(6, 3))
    with pytest.raises(BudgetError, match=r"\b19\b.*\b18\b.*--allocation uniform"):
        adaptive_widths(curves, shape, COSTS, 19)


# Selection


def select(scores, keep, *, total=None):
    total = total or len(scores)
    shape = geometry((total, 1))
    plan = select_units({(0, "mlp"): torch.tensor(scores, dtype=torch.float64)}, shape, [LayerWidths(keep, 1)])
    return plan[0].neurons


def test_the_most_important_are_kept_and_of_equals_the_first():
    assert select([0.1, 3.0, 2.0, 5.0], 2) == (1, 3)
    assert select([1.0, 1.0, 1.0, 1.0], 2) == (0, 1)
    assert select([2.0, 1.0, 2.0, 1.0, 1.0], 3) == (0, 1, 2)
    assert select([0.0, -0.0, 0.0], 1) == (0,)
    assert select([1.0] * 5000, 7) == tuple(range(7))  # long enough for an unstable sort to show


@quick
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30), st.data())
def test_selection_equals_sorting_by_hand(scores, data):
    keep = data.draw(st.integers(1, len(scores) - 1))
    expected = sorted(sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))[:keep])
    assert select([float(x) for x in scores], keep) == tuple(expected)
    assert select([float(x) for x in scores], keep) == select([float(x) for x in scores], keep)


def test_importance_that_is_not_finite_is_refused():
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(NumericsError, match=r"layer 0 \(mlp\)"):
            select([1.0, bad, 2.0], 2)


def test_targets_that_lose_nothing_need_no_importance():
    shape = geometry((3, 2), (3, 2))
    widths = [LayerWidths(3, 1), LayerWidths(3, 2)]
    plan = select_units({(0, "attention"): torch.tensor([1.0, 2.0])}, shape, widths)
    assert [(layer.neurons, layer.kv_groups) for layer in plan] == [((0, 1, 2), (1,)), ((0, 1, 2), (0, 1))]


def test_a_budget_of_heads_that_must_stay_says_why():
    config = PrunerConfig(pruning_ratio=0.1, units="kv_groups")
    with pytest.raises(BudgetError, match=r"No attention head can be removed: a norm over all heads.*--units"):
        check_adaptive(case("olmo2"), config, 1000)


def test_a_family_s_models_with_experts_are_refused_from_shapes_alone():
    config = case("granitemoehybrid").config
    config.num_local_experts = 4
    with pytest.raises(UnsupportedArchitectureError, match="num_local_experts=4: its layers have experts"):
        ModelView.of_shapes(SimpleNamespace(config=config))
