"""One budget for tokens, neurons and KV groups: the cheapest sizes, against all sizes that there are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_context_prune.config import NATIVE_TOLERANCE
from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.specs import LayerWidths
from hf_context_prune.pruning.allocation.adaptive import loss_on_hull
from hf_context_prune.pruning.allocation.sizes import TOKENS, UnitCurves
from tests.unit.pruning.test_allocation import geometry, quick


def draw_curve(draw, total, least=1):
    """A convex curve from `total` kept units down to `least` or more."""
    below = sorted(draw(st.sets(st.integers(least, total - 1), min_size=1, max_size=3)), reverse=True)
    slopes = sorted(draw(st.lists(st.integers(0, 20), min_size=len(below), max_size=len(below))))
    curve = [(total, 0.0)]
    for kept, slope in zip(below, slopes, strict=True):
        curve.append((kept, curve[-1][1] + slope * (curve[-1][0] - kept)))
    return tuple(curve)


@st.composite
def unit_curves(draw):
    """Curves of a small model whose layers are alike."""
    neurons, groups, rows = draw(st.integers(2, 7)), draw(st.integers(2, 4)), draw(st.integers(3, 20))
    curves, layers = {}, draw(st.integers(1, 3))
    for layer in range(layers):
        if draw(st.booleans()):
            curves[layer, "mlp"] = draw_curve(draw, neurons)
        if draw(st.booleans()):
            curves[layer, "attention"] = draw_curve(draw, groups)
    if draw(st.booleans()) or not curves:
        curves[TOKENS] = draw_curve(draw, rows)
    costs = {"mlp": draw(st.integers(1, 4)), "attention": draw(st.integers(1, 9)), "tokens": draw(st.integers(1, 5))}
    multiples = {"mlp": draw(st.integers(1, 3)), "tokens": draw(st.integers(1, 4))}
    return UnitCurves(curves, geometry(*[(neurons, groups)] * layers), rows, costs, multiples)


def allowed(curves, key, total):
    """Every number of units of one curve that may stay."""
    if key not in curves.curves:
        return [total]
    multiple, fewest = curves.multiples.get(key[1], 1), max(curves.curves[key][-1][0], 1)
    return [total, *(kept for kept in range(fewest, total) if kept % multiple == 0)]


def all_sizes(curves):
    """(tokens, widths) of every choice."""
    keys = [(layer, target) for layer in range(len(curves.geometry.layers)) for target in ("mlp", "attention")]
    first = curves.geometry.layers[0]
    counts = [allowed(curves, TOKENS, curves.rows), *(allowed(curves, key, first.of(key[1])) for key in keys)]
    for tokens, *kept in itertools.product(*counts):
        yield tokens, tuple(LayerWidths(*pair) for pair in zip(kept[::2], kept[1::2], strict=True))


def removed_of(curves, tokens, widths):
    first = curves.geometry.layers[0]
    gone = sum(
        (first.neurons - own.neurons) * curves.costs["mlp"]
        + (first.kv_groups - own.kv_groups) * curves.costs["attention"]
        for own in widths
    )
    return gone + (curves.rows - tokens) * curves.costs["tokens"]


def loss_of(curves, tokens, widths):
    kept = {key: tokens if key == TOKENS else widths[key[0]].of(key[1]) for key in curves.curves}
    return sum(loss_on_hull(curve, [curve[0][0] - kept[key]])[0] for key, curve in curves.curves.items())


@quick
@given(unit_curves(), st.data())
def test_the_cheapest_sizes_are_those_of_all(curves, data):
    every = [(removed_of(curves, *sizes), loss_of(curves, *sizes)) for sizes in all_sizes(curves)]
    assert curves.most_removable == max(gone for gone, _ in every)
    asked = data.draw(st.integers(0, curves.most_removable))
    found = curves.cheapest(asked)
    assert asked <= curves.removed(found) == removed_of(curves, found.tokens, found.widths)
    assert found.loss == pytest.approx(loss_of(curves, found.tokens, found.widths))
    assert found.loss == pytest.approx(min(loss for gone, loss in every if gone >= asked))
    with pytest.raises(BudgetError, match=f"at most {curves.most_removable:,}"):
        curves.cheapest(curves.most_removable + 1)


@quick
@given(unit_curves(), st.sets(st.integers(1, 4)), st.data())
def test_the_cheapest_width_for_all_layers_is_that_of_all(curves, groups, data):
    first = curves.geometry.layers[0]
    alike = [
        (tokens, widths)
        for tokens, widths in all_sizes(curves)
        if len(set(widths)) == 1 and widths[0].kv_groups in {*groups, first.kv_groups}
    ]
    every = [(removed_of(curves, *sizes), loss_of(curves, *sizes)) for sizes in alike]
    most = max(gone for gone, _ in every)
    assert curves.most_removable_native(groups) == most
    asked = data.draw(st.integers(0, most))
    found = curves.cheapest_native(asked, groups)
    assert (found.tokens, found.widths) in alike
    assert curves.removed(found) >= asked
    assert found.loss == pytest.approx(min(loss for gone, loss in every if gone >= asked))
    assert found.loss >= curves.cheapest(asked).loss - 1e-9
    assert curves.cheapest_native(most + 1, groups) is None
    with pytest.raises(BudgetError, match=f"remove {most + 1:,} parameters, but the native"):
        curves.choose(most + 1, True, groups)


@quick
@given(unit_curves(), st.sets(st.integers(1, 4)), st.floats(0.1, 1e4), st.data())
def test_one_width_is_chosen_where_it_costs_next_to_nothing(curves, groups, base_loss, data):
    curves = replace(curves, base_loss=base_loss)
    asked = data.draw(st.integers(0, curves.most_removable_native(groups)))
    free, alike = curves.cheapest(asked), curves.cheapest_native(asked, groups)
    for native in (None, True, False):
        found, facts = curves.choose(asked, native, groups)
        wins = native or (native is None and alike.loss - free.loss <= NATIVE_TOLERANCE * base_loss)
        assert found == (alike if wins else free)
        assert (
            set(facts) == {None: {"variable", "native", "base"}, True: {"native"}, False: {"variable", "base"}}[native]
        )
        assert all(
            facts[name] == pytest.approx(sizes.loss, rel=1e-5)
            for name, sizes in (("variable", free), ("native", alike))
            if name in facts
        )
    unknown, _ = replace(curves, base_loss=None).choose(asked, None, groups)
    assert unknown.loss == pytest.approx(free.loss)  # without a loss to compare with, nothing is paid for one width


def test_layers_of_several_widths_are_not_given_one():
    curves = UnitCurves({}, geometry((8, 2), (6, 2)), 10, {"mlp": 1, "attention": 1}, {})
    assert curves.most_removable_native([1]) == 0
    assert curves.cheapest_native(0, [1]) is None
    assert curves.choose(0, None, [1])[0].widths == curves.geometry.layers


def test_padding_goes_as_a_whole():
    """Of 20 rows 5 are padding, which costs nothing; the tokenizer's own 15 are no multiple of 4, and may all stay."""
    tokens = ((20, 0.0), (15, 0.0), (8, 7.0))
    costs = {"mlp": 1, "attention": 1, "tokens": 3}
    curves = UnitCurves({TOKENS: tokens}, geometry((4, 1)), 20, costs, {"tokens": 4}, padding=5)
    for asked, kept in ((0, 20), (1, 15), (12, 15), (16, 12), (36, 8)):
        for found in (curves.cheapest(asked), curves.cheapest_native(asked, [])):
            assert (found.tokens, found.widths) == (kept, curves.geometry.layers)
            assert found.loss == pytest.approx(loss_on_hull(tokens, [20 - kept])[0])
            assert curves.removed(found) >= asked
