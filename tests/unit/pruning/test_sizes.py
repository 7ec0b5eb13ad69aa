"""One budget for tokens, neurons and KV groups: the cheapest sizes, against all sizes that there are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_context_prune.config import NATIVE_TOLERANCE
from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.geometry import LayerWidths
from hf_context_prune.pruning.allocation.adaptive import loss_on_hull
from hf_context_prune.pruning.allocation.budget import removed_params
from hf_context_prune.pruning.allocation.sizes import TOKENS, Sizes, UnitCurves
from tests.unit.pruning.test_allocation import geometry

quick = settings(max_examples=50, deadline=None)


@st.composite
def curve_of(draw, total):
    """A convex curve from `total` kept units downwards."""
    below = sorted(draw(st.sets(st.integers(1, total - 1), min_size=1, max_size=3)), reverse=True)
    slopes = sorted(draw(st.lists(st.integers(0, 20), min_size=len(below), max_size=len(below))))
    curve = [(total, 0.0)]
    for kept, slope in zip(below, slopes, strict=True):
        curve.append((kept, curve[-1][1] + slope * (curve[-1][0] - kept)))
    return tuple(curve)


@st.composite
def unit_curves(draw):
    """Curves of a small model whose layers are alike; some kinds of units may have none."""
    neurons, groups, rows = draw(st.integers(2, 6)), draw(st.integers(2, 3)), draw(st.integers(3, 16))
    curves, layers = {}, draw(st.integers(1, 2))
    for layer in range(layers):
        for target, total in (("mlp", neurons), ("attention", groups)):
            if draw(st.booleans()):
                curves[layer, target] = draw(curve_of(total))
    if draw(st.booleans()) or not curves:
        curves[TOKENS] = draw(curve_of(rows))
    costs = {"mlp": draw(st.integers(1, 4)), "attention": draw(st.integers(1, 9)), "tokens": draw(st.integers(1, 5))}
    multiples = {"mlp": draw(st.integers(1, 3)), "tokens": draw(st.integers(1, 4))}
    return UnitCurves(curves, geometry(*[(neurons, groups)] * layers), rows, costs, multiples)


def losses_of(curves, key, total):
    """The loss of every number of units that may stay, for one curve."""
    if key not in curves.curves:
        return {total: 0.0}
    multiple, curve = curves.multiples.get(key[1], 1), curves.curves[key]
    kept = [total, *(count for count in range(curve[-1][0], total) if count % multiple == 0)]
    return dict(zip(kept, loss_on_hull(curve, [total - count for count in kept]), strict=True))


def removed_by(curves, sizes):
    """Parameters that sizes remove."""
    layers = {target: cost for target, cost in curves.costs.items() if target != "tokens"}
    gone = removed_params(curves.geometry.layers, sizes.widths, layers)
    return gone + (curves.rows - sizes.tokens) * curves.costs.get("tokens", 0)


def all_sizes(curves):
    """Every choice with what it removes."""
    first, layers = curves.geometry.layers[0], range(len(curves.geometry.layers))
    tables = [losses_of(curves, TOKENS, curves.rows)]
    tables += [
        losses_of(curves, (layer, target), first.of(target)) for layer in layers for target in ("mlp", "attention")
    ]
    for tokens, *kept in itertools.product(*tables):
        widths = tuple(LayerWidths(*pair) for pair in zip(kept[::2], kept[1::2], strict=True))
        loss = sum(table[count] for table, count in zip(tables, (tokens, *kept), strict=True))
        sizes = Sizes(tokens, widths, loss)
        yield sizes, removed_by(curves, sizes)


@quick
@given(unit_curves(), st.data())
def test_the_cheapest_sizes_are_those_of_all(curves, data):
    every = list(all_sizes(curves))
    assert curves.most_removable == max(gone for _, gone in every)
    asked = data.draw(st.integers(0, curves.most_removable))
    found = curves.cheapest(asked)
    ((own, removed),) = ((sizes, gone) for sizes, gone in every if (sizes.tokens, sizes.widths) == key_of(found))
    assert asked <= removed == removed_by(curves, found)
    assert found.loss == pytest.approx(own.loss)
    assert found.loss == pytest.approx(min(sizes.loss for sizes, gone in every if gone >= asked))
    with pytest.raises(BudgetError, match=f"at most {curves.most_removable:,}"):
        curves.cheapest(curves.most_removable + 1)


def key_of(sizes):
    return sizes.tokens, sizes.widths


@quick
@given(unit_curves(), st.sets(st.integers(1, 3)), st.data())
def test_the_cheapest_width_for_all_layers_is_that_of_all(curves, groups, data):
    allowed = {*groups, curves.geometry.layers[0].kv_groups}
    alike = [
        (sizes, gone)
        for sizes, gone in all_sizes(curves)
        if len(set(sizes.widths)) == 1 and sizes.widths[0].kv_groups in allowed
    ]
    most = max(gone for _, gone in alike)
    assert curves.most_removable_native(groups) == most
    asked = data.draw(st.integers(0, most))
    found = curves.cheapest_native(asked, groups)
    assert key_of(found) in [key_of(sizes) for sizes, _ in alike]
    assert removed_by(curves, found) >= asked
    assert found.loss == pytest.approx(min(sizes.loss for sizes, gone in alike if gone >= asked))
    assert found.loss >= curves.cheapest(asked).loss - 1e-9
    assert curves.cheapest_native(most + 1, groups) is None
    with pytest.raises(BudgetError, match=f"remove {most + 1:,} parameters, but the native"):
        curves.choose(most + 1, True, groups)


@quick
@given(unit_curves(), st.sets(st.integers(1, 3)), st.floats(0.1, 1e4), st.data())
def test_one_width_is_chosen_where_it_costs_next_to_nothing(curves, groups, base_loss, data):
    curves = replace(curves, base_loss=base_loss)
    asked = data.draw(st.integers(0, curves.most_removable_native(groups)))
    free, alike = curves.cheapest(asked), curves.cheapest_native(asked, groups)
    close = alike.loss - free.loss <= NATIVE_TOLERANCE * base_loss
    for native, expected, names in (
        (None, alike if close else free, {"variable", "native", "base"}),
        (True, alike, {"native"}),
        (False, free, {"variable", "base"}),
    ):
        found, facts = curves.choose(asked, native, groups)
        assert found == expected
        known = {"variable": free.loss, "native": alike.loss, "base": base_loss}
        assert facts == pytest.approx({name: known[name] for name in names}, rel=1e-5)
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
            assert key_of(found) == (kept, curves.geometry.layers)
            assert found.loss == pytest.approx(loss_on_hull(tokens, [20 - kept])[0])
            assert removed_by(curves, found) >= asked


def test_layers_of_doubled_width_stay_doubled():
    """Gemma 4 doubles some layers by its config: one width says how wide all are."""
    curves = {(0, "mlp"): ((4, 0.0), (1, 3.0)), (1, "mlp"): ((8, 0.0), (2, 6.0))}
    costs = {"mlp": 1, "attention": 1, "tokens": 1}
    units = UnitCurves(curves, geometry((4, 2), (8, 2)), 10, costs, {"mlp": 1}, factors=(1, 2))
    found = units.cheapest_native(6, [])
    assert [widths.neurons for widths in found.widths] == [2, 4]
    assert found.loss == pytest.approx(6.0)
    assert units.most_removable_native([2]) == 9
    assert units.cheapest_native(10, []) is None
    assert replace(units, factors=()).cheapest_native(6, []) is None
