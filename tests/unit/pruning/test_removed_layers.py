"""Layers removed as a whole: which ones go, and what the layer before the gap makes up for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import BudgetError, ConfigError, PlanError, UnsupportedArchitectureError
from hf_context_prune.modeling.architectures import layers_of, output_projection, output_weight, spec_of
from hf_context_prune.modeling.geometry import GONE, LayerWidths, read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation import layer_choice
from hf_context_prune.pruning.allocation.layer_choice import choose_layers
from hf_context_prune.pruning.allocation.widths import count_base_parameters
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.check_budget import check_budget
from hf_context_prune.pruning.criteria import CRITERIA
from hf_context_prune.pruning.depth import Depth, count_removed, deepest, removable_layers, stand_in
from hf_context_prune.pruning.notes import layers_note
from hf_context_prune.pruning.planner import Planner, make_plan, plan_and_reconstruct
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.sequential import layer_pruner
from hf_context_prune.pruning.sequential.prune import prune_sequentially
from hf_context_prune.pruning.surgery import apply_plan
from tests.support.tiny import COVERING, case, texts, tiny_model, tiny_tokenizer, tokens
from tests.unit.pruning.test_sequential import batches, final_hidden, pruned_by

IDS = tokens(8, 24)
HYBRIDS = ("qwen3_5_text", "lfm2")
DEEP = {"num_hidden_layers": 8}


def gaps_of(name):
    """Layers to remove: those of hybrids leave the one with attention."""
    return [(0,), (2,)] if name in HYBRIDS else [(0,), (1,), (1, 2)]


def widths_without(model, gone, *, narrower=0):
    widths = read_geometry(model.config, spec_of(model.config)).layers
    return [GONE if index in gone else replace(w, neurons=w.neurons - narrower) for index, w in enumerate(widths)]


@pytest.mark.parametrize("name", [*COVERING, "opt"])
def test_the_layer_before_a_gap_makes_up_for_it(name):
    model, given = case(name), batches()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for gone in gaps_of(name):
        for narrower in (0, 8):
            widths = widths_without(model, gone, narrower=narrower)
            result = prune_sequentially(model, given, widths, CRITERIA["obs"])
            smaller = pruned_by(model, result, given, widths)
            view = ModelView.of(model)
            sliced = apply_plan(model, PruningPlan(view.spec.model_type, view.widths, result.layers))
            dense = final_hidden(model, given)
            repaired, unrepaired = (final_hidden(one, given) for one in (smaller, sliced))
            if gone != (0,) or narrower:  # before layer 0 there is nothing to repair
                assert (repaired - dense).square().mean() < (unrepaired - dense).square().mean()
            states = result.final_states
            assert states is not None
            torch.testing.assert_close(states.reshape(repaired.shape), repaired, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_refit_is_the_regression_of_the_stream_behind_the_gap(monkeypatch):
    """The equation, and with it ReplaceMe's linear map T: T W is one of the matrices among which the best is found."""
    monkeypatch.setattr(layer_pruner, "DEFAULT_CORRECTION_RIDGE", 1e-6)
    model, given = tiny_model("llama", intermediate_size=80), [{"input_ids": tokens(30, 24)}]
    widths = widths_without(model, (1,))
    result = prune_sequentially(model, given, widths, CRITERIA["obs"])
    assert set(result.outputs) == {(0, "mlp")}
    assert result.layers[0] == LayerPlan(tuple(range(80)), (0, 1, 2))
    assert result.layers[1].gone
    first, second = layers_of(model, spec_of(model.config))[:2]
    seen = {}
    hooks = [
        first.mlp.down_proj.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out)),
        first.register_forward_hook(lambda _, args, out: seen.update(first=out)),
        second.register_forward_hook(lambda _, args, out: seen.update(second=out)),
    ]
    with torch.no_grad():
        model(**given[0])
    for hook in hooks:
        hook.remove()
    x, y, lacking = (seen[key].reshape(-1, seen[key].shape[-1]).double() for key in ("x", "y", "second"))
    lacking = lacking - seen["first"].reshape(lacking.shape)
    gram = x.T @ x / len(x)
    system = gram + 1e-6 * gram.diagonal().diag()
    old = first.mlp.down_proj.weight.detach().double()
    expected = old + torch.linalg.solve(system, x.T @ lacking / len(x)).T
    torch.testing.assert_close(result.outputs[0, "mlp"][0].double(), expected, atol=1e-3, rtol=1e-3)
    linear_map = torch.linalg.lstsq(y, y + lacking).solution  # M T = M + what is lacking

    def error(predicted):
        return float((predicted - y - lacking).square().mean())

    assert error(x @ expected.T) < error(y @ linear_map) < error(y)


@pytest.mark.parametrize("name", ["llama-mqa-tied", "gemma2", "phi"])
def test_a_killed_walk_with_a_gap_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    model = case(name)
    for gone in gaps_of(name):
        widths, folder = widths_without(model, gone, narrower=8), tmp_path / str(gone)
        whole = prune_sequentially(model, batches(), widths, CRITERIA["obs"])
        own = layer_pruner.SequentialPruner.prune

        def dies(self, index, width, own=own):
            if index == 2:
                raise KeyboardInterrupt
            return own(self, index, width)

        with monkeypatch.context() as patched:
            patched.setattr(layer_pruner.SequentialPruner, "prune", dies)
            with pytest.raises(KeyboardInterrupt):
                prune_sequentially(model, batches(), widths, CRITERIA["obs"], state_dir=folder)
        resumed = prune_sequentially(model, batches(), widths, CRITERIA["obs"], state_dir=folder)
        assert resumed.layers == whole.layers
        assert resumed.outputs.keys() == whole.outputs.keys()
        for key, (weight, _) in whole.outputs.items():
            assert torch.equal(resumed.outputs[key][0], weight)
        assert torch.equal(resumed.final_states, whole.final_states)


def divergence(model, gone):
    """KL(base || model without these layers), in nats per token."""
    smaller = Depth(len(ModelView.of(model).layers), tuple(gone)).shorten(model)
    with torch.no_grad():
        base, other = (torch.log_softmax(one(IDS).logits.double(), dim=-1) for one in (model, smaller))
    return float((base.exp() * (base - other)).sum(dim=-1).mean())


@pytest.mark.parametrize("name", ["llama", "falcon", "gemma2", "gpt2"])
def test_layers_are_chosen_one_after_the_other_by_the_loss_without_them(name):
    model = case(name, num_hidden_layers=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, order = choose_layers(model, IDS, 3, range(5)), []
    for index, loss in zip(found.order, found.losses, strict=True):
        losses = {other: divergence(model, [*order, other]) for other in range(5) if other not in order}
        assert index == min(losses, key=lambda other: losses[other])
        assert loss == pytest.approx(losses[index], rel=1e-3)
        order.append(index)
    assert found.kept == tuple(sorted({*range(5)} - {*order}))
    assert choose_layers(model, IDS, 1, [4]).order == (4,)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_hybrid_keeps_a_layer_with_attention():
    model = tiny_model("lfm2")
    assert set(choose_layers(model, IDS, 2, range(3)).order) == {0, 2}
    with pytest.raises(BudgetError, match="2 can go one after the other, not 3"):
        choose_layers(model, IDS, 3, range(3))


def test_an_interrupted_choice_goes_on(tmp_path, monkeypatch):
    model = tiny_model("llama", **DEEP)
    whole = choose_layers(model, IDS, 3, range(8))
    own, calls = layer_choice.LayerComparison.losses, []

    def losses(self, gone, candidates):
        calls.append(list(gone))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(self, gone, candidates)

    monkeypatch.setattr(layer_choice.LayerComparison, "losses", losses)
    with pytest.raises(KeyboardInterrupt):
        choose_layers(model, IDS, 3, range(8), state_dir=tmp_path)
    assert choose_layers(model, IDS, 3, range(8), state_dir=tmp_path) == whole
    assert [len(gone) for gone in calls] == [0, 1, 2, 2]
    assert choose_layers(model, IDS, 3, range(8), state_dir=tmp_path) == whole
    assert len(calls) == 4
    (kept,) = tmp_path.iterdir()
    kept.write_text("damaged")
    assert choose_layers(model, IDS, 3, range(8), state_dir=tmp_path) == whole
    assert len(calls) == 7
    assert choose_layers(model, IDS, 3, range(1, 8), state_dir=tmp_path).num_layers == 8  # another search
    assert len(list(tmp_path.iterdir())) == 2


def test_which_layers_may_go(subtests):
    model = tiny_model("llama", **DEEP)
    assert removable_layers(model, PrunerConfig(num_layers=6)) == (2, 3, 4, 5)
    assert removable_layers(model, PrunerConfig(num_layers=6, removable_layers="7, 0-2,1")) == (0, 1, 2, 7)
    for options, removed in (
        ({"num_layers": 4}, 4),
        ({"num_layers": 1, "removable_layers": "0-7"}, 7),
        ({"layer_ratio": 0.25}, 2),
        ({"layer_ratio": 0.2}, 2),
        ({"layer_ratio": 0.07}, 1),
        ({"layer_ratio": 0.0}, 0),
        ({}, 0),
    ):
        with subtests.test(options=options):
            assert count_removed(model, PrunerConfig(**options)) == removed
            depth = stand_in(model, PrunerConfig(**options))
            assert (0 if depth is None else len(depth.order)) == removed
    for options, said in (
        ({"num_layers": 8}, "num_layers is 8, but the model has 8 layers"),
        ({"num_layers": 99}, "num_layers is 99, but the model has 8 layers"),
        ({"num_layers": 3}, "5 of 8 layers would be removed, and at most 4 may be.* unless removable_layers"),
        ({"layer_ratio": 0.9}, r"layer_ratio is 0\.9, so 7 of 8 layers .* at most 4 may be"),
        ({"layer_ratio": 0.01}, r"removes none of 8 layers. Ask for at least 0\.063"),
        ({"num_layers": 5, "removable_layers": "1,2"}, "3 of 8 layers would be removed, and at most 2 may be. Ask"),
        ({"num_layers": 5, "removable_layers": "6-9"}, "removable_layers names layer 9, but the model has 8 layers"),
    ):
        with subtests.test(options=options), pytest.raises(BudgetError, match=said):
            check_budget(model, tiny_tokenizer(), PrunerConfig(**options))
    with pytest.raises(
        BudgetError, match=r"of the model's .* parameters go with the layers .* For the rest: Asked to r"
    ):
        check_budget(model, tiny_tokenizer(), PrunerConfig(num_layers=6, pruning_ratio=0.95, units="neurons"))
    refused = tiny_model("gemma4_text")
    with pytest.raises(UnsupportedArchitectureError, match="hidden_size_per_layer_input"):
        check_budget(refused, tiny_tokenizer(), PrunerConfig(num_layers=4))


def test_layers_that_a_config_can_not_name_one_by_one_are_refused_before_the_work():
    mixture = tiny_model("ernie4_5_moe", num_hidden_layers=8, moe_layer_interval=2)
    with pytest.raises(BudgetError, match=r"0 can go one after the other, not 2.*moe_layer_interval = 2.*2 neighbours"):
        stand_in(mixture, PrunerConfig(num_layers=6, removable_layers="2,3,5"))
    assert stand_in(mixture, PrunerConfig(num_layers=6, removable_layers="2,3")).order == (2, 3)
    assert set(choose_layers(mixture, IDS, 2, (2, 3)).order) == {2, 3}
    with pytest.raises(UnsupportedArchitectureError, match="can't keep layers 0, 1, 3, 4, 6, 7 alone"):
        stand_in(mixture, PrunerConfig(num_layers=6, removable_layers="2,5"))
    with pytest.raises(BudgetError, match=r"none can go by itself: .* would name others"):
        deepest(mixture, PrunerConfig(units="neurons,layers"))


def test_where_only_prune_removes_layers():
    model, config = tiny_model("llama"), PrunerConfig(num_layers=2)
    with pytest.raises(ConfigError, match="num_layers"):
        plan_and_reconstruct(model, IDS, config)
    with pytest.raises(ConfigError, match="num_layers"):
        make_plan(model, None, config)


CONFIGS = {
    "layers alone": {"num_layers": 6},
    "sliced": {"num_layers": 6, "reconstruction": "none"},
    "with a budget": {"layer_ratio": 0.25, "pruning_ratio": 0.4},
    "of two units": {"num_layers": 6, "pruning_ratio": 0.3, "units": "neurons,kv_groups"},
    "by one pass": {"num_layers": 6, "pruning_ratio": 0.3, "units": "neurons", "reconstruction": "least_squares"},
    "with one width": {"num_layers": 6, "pruning_ratio": 0.4, "native_architecture": True},
    "with a unit ratio": {"num_layers": 6, "mlp_ratio": 0.2},
    "uniform": {"num_layers": 6, "pruning_ratio": 0.3, "allocation": "uniform"},
    "with tokens": {"num_layers": 6, "vocab_size": 300, "pad_to_multiple_of": 4},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_layers_go_together_with_other_units(options):
    model, tokenizer = tiny_model("llama", **DEEP), tiny_tokenizer()
    units = {"units": "neurons,kv_groups"} if options.get("pruning_ratio") and "units" not in options else {}
    if options.get("allocation") == "uniform":
        units = {}
    config = PrunerConfig(num_calibration_samples=16, max_seq_length=32, **{**options, **units})
    calibration = CalibrationSet(load_documents(texts(60)), config)
    pruned = prune_model(model, tokenizer, calibration, config)
    plan = pruned.plan
    assert len(plan.removed_layers) == 2
    assert set(plan.removed_layers) <= {2, 3, 4, 5}
    facts = plan.provenance["removed_layers"]
    assert sorted(facts["order"]) == list(plan.removed_layers)
    assert count_base_parameters(pruned.model, plan) == model.num_parameters()
    asked = options.get("pruning_ratio", 0)
    gone = model.num_parameters() - pruned.model.num_parameters()
    assert gone >= max(asked * model.num_parameters(), facts["parameters"])
    assert gone - asked * model.num_parameters() < max(1500, facts["parameters"] if not asked else 0) or not asked
    assert read_geometry(pruned.model.config, spec_of(model.config)).layers == plan.kept_widths
    named = {int(key.partition(".")[0]) for key in plan.provenance.get("sensitivity", {})} - {0}
    assert named.isdisjoint(plan.removed_layers)
    again = prune_model(model, tokenizer, calibration, config)
    assert again.plan == plan
    assert all(torch.equal(a, b) for a, b in zip(pruned.model.parameters(), again.model.parameters(), strict=True))
    assert "numbered from 0" in layers_note(plan)[0]
    assert "GSM8K" in layers_note(plan)[0]


def test_a_repaired_model_loses_less():
    model, tokenizer = tiny_model("llama", **DEEP), tiny_tokenizer()

    def loss(reconstruction):
        size = {"num_calibration_samples": 32, "max_seq_length": 32, "num_layers": 5}
        config = PrunerConfig(**size, reconstruction=reconstruction, refit_lm_head=False)
        found = prune_model(model, tokenizer, CalibrationSet(load_documents(texts(60)), config), config)
        with torch.no_grad():
            base, other = (torch.log_softmax(one(IDS).logits, dim=-1) for one in (model, found.model))
        return float((base.exp() * (base - other)).sum(dim=-1).mean())

    assert loss("sequential") < loss("none")


def test_the_size_of_the_base_is_known_or_refused():
    model = tiny_model("llama")
    plan = Depth(3, (1,)).plan(model)
    smaller = apply_plan(model, plan)
    with pytest.raises(PlanError, match=r"removed_layers\.parameters"):
        count_base_parameters(smaller, plan)
    told = replace(plan, provenance={"removed_layers": Depth(3, (1,)).facts(model)})
    assert count_base_parameters(smaller, told) == model.num_parameters()


def test_shapes_alone_are_enough_for_a_shorter_model():
    model = tiny_model("llama")
    with torch.device("meta"):
        empty = type(model)(model.config)
    shorter = Depth(3, (0,)).shorten(empty)
    assert shorter.device.type == "meta"
    assert shorter.num_parameters() == Depth(3, (0,)).shorten(model).num_parameters()
    assert Depth(3, (0,)).expand(["b", "c"], "-") == ("-", "b", "c")
    assert Depth(3, (0,)).in_base({(1, "mlp"): 5}) == {(2, "mlp"): 5}


def test_a_planner_keeps_to_the_numbers_of_the_base():
    model = tiny_model("llama")
    config = PrunerConfig(pruning_ratio=0.1, allocation="uniform", reconstruction="least_squares")
    planner = Planner(model, IDS, config, depth=Depth(3, (1,)))
    plan, reconstruct, _ = planner.plan(config, (LayerWidths(20, 3), LayerWidths(10, 3)))
    assert [len(layer.neurons) for layer in plan.layers] == [20, 0, 10]
    smaller = apply_plan(model, plan, reconstruct=reconstruct)
    spec = spec_of(model.config)
    assert output_weight(output_projection(layers_of(smaller, spec)[1], spec, "mlp")).shape == (48, 10)
    assert json.dumps(plan.to_dict())
