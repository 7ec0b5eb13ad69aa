"""Whole layers as a unit of the shared budget: how many go, what they are thought to cost, and what comes of it."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import BudgetError, ConfigError, UnsupportedArchitectureError
from hf_context_prune.modeling.geometry import GONE
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning import depth_search
from hf_context_prune.pruning.allocation import layer_choice
from hf_context_prune.pruning.allocation.depth_choice import PATIENCE, choose_depth
from hf_context_prune.pruning.allocation.layer_choice import LayerOrder, choose_layers
from hf_context_prune.pruning.allocation.sizes import TOKENS, UnitCurves
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.check_budget import check_budget
from hf_context_prune.pruning.criteria import CRITERIA
from hf_context_prune.pruning.depth import Depth, deepest
from hf_context_prune.pruning.depth_search import DepthSearch
from hf_context_prune.pruning.notes import depth_note
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.sequential.prune import prune_sequentially
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.pruning.unit_curves import TokenProbe
from hf_context_prune.storage.loading import load_model
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.utils.linalg import ridge_diagonal
from tests.support.tiny import texts, tiny_model, tiny_tokenizer, tokens
from tests.unit.pruning.test_allocation import geometry

IDLE = (3, 5)
"""Layers of the model here that do next to nothing."""


def convex(steps):
    """Sums of ascending steps, from 0 on."""
    return [0.0, *itertools.accumulate(sorted(steps))]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_the_number_of_layers_has_the_least_sum(price_steps, rest_steps):
    prices, asked = convex(price_steps), []
    rests = convex(rest_steps)[::-1]  # falls ever more slowly, down to 0
    most = len(prices) - 1

    def price(count):
        asked.append(count)
        return prices[count]

    def rest(count):
        return rests[min(count, len(rests) - 1)]

    best, sums = choose_depth(price, rest, most)
    assert sums == [prices[count] + rest(count) for count in range(len(sums))]
    assert sums[best] == min(prices[count] + rest(count) for count in range(most + 1))
    assert asked == list(range(1, len(sums)))


def test_no_price_is_measured_without_need():
    asked = []

    def price(count):
        asked.append(count)
        return 10.0 * count

    assert choose_depth(price, lambda count: 100 - count, 9) == (0, [100, 109, 118])
    assert len(asked) == PATIENCE
    assert choose_depth(price, lambda count: 9 - count / 9, 9) == (0, [9, 10 + 9 - 1 / 9])  # the price alone is more
    asked.clear()
    assert choose_depth(price, lambda count: 0.0 if count > 3 else math.inf, 9) == (4, [*[math.inf] * 4, 40.0])
    assert asked == [4]
    assert choose_depth(price, lambda count: math.inf, 2) == (0, [math.inf] * 3)
    assert choose_depth(price, lambda count: 0.0, 9) == (0, [0.0])


def test_curves_without_some_layers():
    mlp, attention, rows = ((8, 0.0), (2, 6.0)), ((2, 0.0), (1, 3.0)), ((10, 0.0), (4, 60.0))
    curves = {(0, "mlp"): mlp, (1, "mlp"): mlp, (1, "attention"): attention, (2, "attention"): attention, TOKENS: rows}
    costs = {"mlp": 1, "attention": 4, "tokens": 2}
    units = UnitCurves(curves, geometry((8, 2), (8, 2), (8, 2)), 10, costs, {}, factors=(1, 2, 1))
    rest = units.without_layers([0])
    assert rest.curves == {(0, "mlp"): mlp, (0, "attention"): attention, (1, "attention"): attention, TOKENS: rows}
    assert (len(rest.geometry.layers), rest.factors) == (2, (2, 1))
    assert units.without_layers([]) == units
    assert units.without_layers([0, 1, 2]).curves == {TOKENS: rows}
    found = rest.cheapest(18)
    assert 0 < rest.token_loss(found.tokens) < found.loss
    assert rest.least_loss(18, False, []) == pytest.approx(found.loss)
    half = rest.token_loss(found.tokens) + (found.loss - rest.token_loss(found.tokens)) / 2
    assert rest.least_loss(18, False, [], repaired=0.5) == pytest.approx(half)
    assert rest.least_loss(rest.most_removable, None, []) < math.inf
    assert rest.least_loss(rest.most_removable + 1, None, []) == math.inf
    assert rest.least_loss(rest.most_removable_native([1]) + 1, True, [1]) == math.inf


def deep_model(**options):
    """A model of eight layers, of which two do next to nothing."""
    model = tiny_model("llama", num_hidden_layers=8, initializer_range=0.2, **options)
    for index in IDLE:
        layer = model.model.layers[index]
        for projection in (layer.mlp.down_proj, layer.self_attn.o_proj):
            projection.weight.data *= 0.02
    return model


def divergence(model, other, probe):
    with torch.no_grad():
        base, other = (torch.log_softmax(one(probe).logits.double(), dim=-1) for one in (model, other))
    return float((base.exp() * (base - other)).sum(dim=-1).mean())


def bridge(change, hidden, **_):
    return hidden + hidden @ change


def bridged(model, gone, samples):
    """A copy of a model without some layers, in the place of whose gaps stands the linear map of ridge regression."""
    with torch.no_grad():
        states = model(samples, output_hidden_states=True).hidden_states[:-1]  # before each layer
    smaller, layers = copy.deepcopy(model), range(len(model.model.layers))
    for first in (index for index in gone if index - 1 not in gone):
        behind = next(index for index in layers if index > first and index not in gone)
        x, y = (states[index].flatten(0, 1).double() for index in (first, behind))
        gram = x.T @ x
        change = torch.linalg.solve(gram + ridge_diagonal(gram.diagonal(), 0.03).diag(), x.T @ (y - x)).float()
        for index in range(first, behind):
            layer = smaller.model.layers[index]
            layer.forward = partial(bridge, change if index == first else torch.zeros_like(change))
    return smaller


def test_layers_are_chosen_as_if_linear_maps_stood_in_their_place(monkeypatch):
    monkeypatch.setattr(layer_choice, "CHOICE_TOKENS", 4 * 24)
    model, samples = deep_model(), tokens(48, 24)
    probe = samples[torch.arange(1, 5) * 12 - 1]
    others = torch.stack([sample for index, sample in enumerate(samples) if (index + 1) % 12])
    found, order = choose_layers(model, samples, 4, range(1, 7)), []
    for index, loss in zip(found.order, found.losses, strict=True):
        losses = {
            other: divergence(model, bridged(model, [*order, other], others), probe)
            for other in range(1, 7)
            if other not in order
        }
        assert index == min(losses, key=lambda other: losses[other])
        assert loss == pytest.approx(losses[index], rel=1e-2)
        order.append(index)
    assert any(index + 1 in order for index in order)  # one gap has several layers


def test_the_price_is_that_of_the_repaired_model(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_choice, "CHOICE_TOKENS", 4 * 24)
    model, samples = deep_model(), tokens(48, 24)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    order = LayerOrder(model, samples, range(2, 6), state_dir=tmp_path)
    depth, price = order.depth(3), order.repaired_loss(3)
    assert set(depth.order[:2]) == set(IDLE)
    assert depth == choose_layers(model, samples, 3, range(2, 6))
    assert order.repaired_loss(0) == 0.0

    probe = samples[torch.arange(1, 5) * 12 - 1]
    others = [sample for index, sample in enumerate(samples) if (index + 1) % 12]
    widths = depth.expand([ModelView.of(model).widths[index] for index in depth.kept], GONE)
    batches = [{"input_ids": sample[None]} for sample in others]
    walked = prune_sequentially(model, batches, widths, CRITERIA["magnitude"])
    smaller = apply_plan(model, depth.plan(model), reconstruct=walked.reconstruct)
    assert price == pytest.approx(divergence(model, smaller, probe), rel=1e-3)
    assert price < divergence(model, apply_plan(model, depth.plan(model)), probe)  # as it is cut
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    again = LayerOrder(model, samples, range(2, 6), state_dir=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(layer_choice, "prune_sequentially", None)
        patched.setattr(layer_choice, "LayerComparison", None)
        assert (again.depth(3), again.repaired_loss(3)) == (depth, price)
    monkeypatch.setattr(layer_choice, "CHOICE_TOKENS", 10**6)  # no text is left to repair with
    order = LayerOrder(model, samples, range(2, 6))
    assert order.repaired_loss(1) == order.depth(1).losses[0]


def pruned(resume_dir=None, *, validation_loss=None, model=None, **options):
    model, tokenizer = model or deep_model(), tiny_tokenizer()
    size = {"num_calibration_samples": 16, "max_seq_length": 32, "refit_lm_head": False}
    config = PrunerConfig(**{**size, **options})
    probe = None
    if config.max_loss_increase or config.searches_tokens:
        source = load_documents(texts(60))
        probe = TokenProbe(source, lambda *_: pytest.fail("no vocabulary is measured here"), 3.0)
    calibration = CalibrationSet(load_documents(texts(60)), config)
    return prune_model(
        model, tokenizer, calibration, config, validation_loss=validation_loss, token_probe=probe, resume_dir=resume_dir
    )


def test_layers_go_where_that_costs_least(subtests):
    for options in (
        {"pruning_ratio": 0.25, "units": "neurons,kv_groups,layers"},
        {"pruning_ratio": 0.25, "units": "neurons,layers", "native_architecture": True},
        {"pruning_ratio": 0.25, "units": "neurons,layers", "reconstruction": "least_squares"},
        {"pruning_ratio": 0.25, "units": "tokens,neurons,layers", "vocab_size": 300, "pad_to_multiple_of": 4},
        {"pruning_ratio": 0.19, "units": "layers"},
        {"pruning_ratio": 0.15, "units": "layers", "reconstruction": "none"},
    ):
        with subtests.test(**options):
            base = deep_model()
            found = pruned(model=base, **options)
            plan, total = found.plan, base.num_parameters()
            assert plan.removed_layers == IDLE
            assert 1 - found.model.num_parameters() / total >= options["pruning_ratio"]
            facts = plan.provenance
            assert sorted(facts["removed_layers"]["order"]) == list(IDLE)
            losses = facts["predicted_by_removed_layers"]
            assert min(range(len(losses)), key=lambda count: losses[count] or math.inf) == 2 or None in losses
            assert 0 < facts["predicted_loss_increase"] < math.inf
            if options.get("native_architecture") or options["units"] == "layers":
                assert type(found.model).__name__ == "LlamaForCausalLM"
            if options["units"] != "layers":
                (note,) = depth_note(plan)
                assert "removed 2 layers as a whole: with" in note


def test_no_layer_goes_where_that_costs_more():
    found = pruned(pruning_ratio=0.05, units="neurons,layers", removable_layers="0,7")
    assert found.plan.removed_layers == ()
    assert "removed_layers" not in found.plan.provenance
    (note,) = depth_note(found.plan)
    assert "removed no layers as a whole: with 1 removed" in note
    alone = pruned(pruning_ratio=0.05, units="neurons")
    assert [layer.neurons for layer in found.plan.layers] == [layer.neurons for layer in alone.plan.layers]
    assert not depth_note(alone.plan)


def test_a_fixed_number_of_layers_holds():
    found = pruned(pruning_ratio=0.25, units="neurons,layers", num_layers=7)
    assert len(found.plan.removed_layers) == 1
    assert "predicted_by_removed_layers" not in found.plan.provenance


def test_a_killed_search_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_choice, "CHOICE_TOKENS", 128)
    options = {"pruning_ratio": 0.25, "units": "neurons,kv_groups,layers", "num_calibration_samples": 24}
    whole = pruned(tmp_path / "whole", **options)
    for place in ("second choice", "second price", "units without the layers"):
        calls = []

        def dies(own, after, calls=calls):
            def call(*args, **kwargs):
                calls.append(own)
                if calls.count(own) > after:
                    raise KeyboardInterrupt
                return own(*args, **kwargs)

            return call

        folder = tmp_path / place
        with monkeypatch.context() as patched:
            if place == "second choice":
                patched.setattr(layer_choice.LayerComparison, "losses", dies(layer_choice.LayerComparison.losses, 1))
            elif place == "second price":
                patched.setattr(layer_choice, "prune_sequentially", dies(layer_choice.prune_sequentially, 1))
            else:
                patched.setattr(depth_search, "measure_units", dies(depth_search.measure_units, 0))
            with pytest.raises(KeyboardInterrupt):
                pruned(folder, **options)
        resumed = pruned(folder, **options)
        assert resumed.plan == whole.plan
        assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


def test_the_size_for_a_loss_may_lack_layers(tmp_path):
    """The loss here is the share of parameters that is gone beyond a tenth, so the search ends at about 0.2."""
    base = deep_model()
    total = base.num_parameters()

    def loss(model, tokenizer):
        return 1 + max(0.0, 0.9 - model.num_parameters() / total)

    for units in ("neurons,layers", "layers"):
        found = pruned(model=base, max_loss_increase=0.12, units=units, validation_loss=loss)
        facts = found.plan.provenance["loss_budget"]
        assert set(found.plan.removed_layers) >= set(IDLE)
        assert facts["increase"] <= 0.12
        assert 1 - found.model.num_parameters() / total > 0.15
        save_pruned(found.model, tmp_path / units, tokenizer=tiny_tokenizer(), plan=found.plan)
        reloaded = load_model(tmp_path / units).model
        ids = tokens(2, 12)
        with torch.no_grad():
            assert torch.equal(reloaded(ids).logits, found.model(ids).logits)


def test_how_many_layers_an_allowed_loss_looks_at():
    """Twice the allowed loss, and what refitting the rows of the LM head will give back; here each costs 0.1 more."""
    order = SimpleNamespace(repaired_loss=lambda count: 0.1 * count - 0.01)
    for limit, refits, most in ((0.05, False, 3), (0.05, True, 5), (0.5, False, 8)):
        config = PrunerConfig(units="neurons,layers", max_loss_increase=limit, refit_lm_head=refits)
        whole = SimpleNamespace(config=config, base_loss=3.0, measured=object(), model=None, tokenizer=None, total=1)
        assert DepthSearch(whole, order, 8, None).most == most


def test_what_a_budget_with_layers_can_reach(subtests):
    model, tokenizer = deep_model(), tiny_tokenizer()
    assert deepest(model, PrunerConfig(units="neurons,layers")) == Depth(8, (2, 3, 4, 5))
    assert deepest(model, PrunerConfig(units="neurons")) is None
    assert deepest(model, PrunerConfig(units="neurons,layers", pruning_ratio=0.3, layer_ratio=0.25)) is None
    assert len(deepest(model, PrunerConfig(units="layers", removable_layers="0-7")).order) == 7
    for options in (
        {"units": "layers", "pruning_ratio": 0.3},
        {"units": "neurons,kv_groups,layers", "pruning_ratio": 0.6},
        {"units": "tokens,layers", "pruning_ratio": 0.3},
    ):
        with subtests.test(**options):
            check_budget(model, tokenizer, PrunerConfig(**options))
    for options, said in (
        (
            {"units": "layers", "pruning_ratio": 0.5},
            r"parameters asked to go, [\d,]+ \(0\.\d+ of all\) can go with the 4",
        ),
        (
            {"units": "neurons,layers", "pruning_ratio": 0.8},
            r"can go with the 4 layers .* For the rest: Asked to remove",
        ),
        (
            {"units": "tokens,layers", "pruning_ratio": 0.95},
            r"can go with the 4 layers .* For the rest: Asked to remove",
        ),
    ):
        with subtests.test(**options), pytest.raises(BudgetError, match=said):
            check_budget(model, tokenizer, PrunerConfig(**options))
    with pytest.raises(BudgetError, match="of the 3 layers of this model none can go by itself: the first 2"):
        check_budget(tiny_model("llama"), tokenizer, PrunerConfig(units="neurons,layers"))
    with pytest.raises(UnsupportedArchitectureError, match="hidden_size_per_layer_input"):
        check_budget(tiny_model("gemma4_text"), tokenizer, PrunerConfig(units="neurons,layers"))


def test_which_configs_search_layers():
    for options, searched, removed in (
        ({}, False, False),
        ({"units": "neurons,layers"}, True, True),
        ({"units": "layers", "max_loss_increase": 0.1}, True, True),
        ({"units": "neurons,layers", "pruning_ratio": 0.3, "num_layers": 5}, False, True),
        ({"units": "neurons,layers", "pruning_ratio": 0.3, "layer_ratio": 0.0}, False, False),
    ):
        config = PrunerConfig(**options)
        assert (config.searches_layers, config.removes_layers) == (searched, removed)
    layers = PrunerConfig(units="layers")
    assert (layers.prunes_layers, layers.prunes_vocabulary) == (False, False)
    assert layers.pruning_ratio == 0.2
    for fixed in ({"num_layers": 5}, {"layer_ratio": 0.2}):
        with pytest.raises(ConfigError, match=f"units='layers' lets the budget say .* {next(iter(fixed))} says it too"):
            PrunerConfig(units="layers", pruning_ratio=0.2, **fixed)
    with pytest.raises(ConfigError, match="add layers to units"):
        PrunerConfig(units="neurons", removable_layers="2")
