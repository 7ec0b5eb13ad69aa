"""Statistics -> plan: what adaptive allocation withholds, measures and predicts; planning with a reconstruction."""

from __future__ import annotations

import json

import pytest
import torch

from hf_context_prune import PrunerConfig, apply_plan, calibrate, make_plan
from hf_context_prune.errors import BudgetError, ConfigError
from hf_context_prune.pruning.allocation.sensitivity import withhold_probe
from hf_context_prune.pruning.allocation.widths import plan_widths
from hf_context_prune.pruning.calibration import chunked
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.planner import plan_and_reconstruct, reconstruct_with
from hf_context_prune.pruning.scoring import Requirements
from tests.support.tiny import tiny_model, tokens


@pytest.mark.parametrize("reconstruction", ["least_squares", "sequential"])
def test_adaptive_plans_carry_their_curves_and_their_prediction(model, reconstruction):
    config = PrunerConfig(pruning_ratio=0.15, allocation="adaptive", reconstruction=reconstruction)
    plan, _ = plan_and_reconstruct(model, tokens(12), config, provenance={"mine": 1})
    facts = json.loads(json.dumps(dict(plan.provenance), allow_nan=False))
    assert facts["mine"] == 1
    assert set(facts["sensitivity"]) == {f"{i}.{target}" for i in range(3) for target in ("mlp", "attention")}
    by_hand = 0.0
    for name, curve in facts["sensitivity"].items():
        layer, target = name.split(".")
        assert [kept for kept, _ in curve] == ([40, 30, 20, 10] if target == "mlp" else [3, 2, 1])
        assert all(loss >= 0 for _, loss in curve)
        width = plan.widths[int(layer)]
        kept = width.neurons if target == "mlp" else width.kv_groups
        by_hand += lower_envelope(curve, kept)
    # A power law sags below lines; the curves are kept to six digits.
    assert 0.9 * by_hand <= facts["predicted_loss_increase"] <= by_hand * (1 + 5e-6)
    # One-shot statistics lack the withheld samples; sequential pruning, whose widths are settled, uses all.
    assert facts["num_calibration_samples"] == (9 if reconstruction == "least_squares" else 12)


def lower_envelope(curve, at):
    """The least that any mix of two measured points gives at a width."""
    points = [(kept, max(loss, 0.0)) for kept, loss in curve]
    return min(
        a[1] if a[0] == b[0] else a[1] + (b[1] - a[1]) * (a[0] - at) / (a[0] - b[0])
        for a in points
        for b in points
        if a[0] >= at >= b[0] and (a[0] > b[0] or a[0] == at)
    )


def test_uniform_plans_predict_nothing(model):
    plan, _ = plan_and_reconstruct(model, tokens(4), PrunerConfig(mlp_ratio=0.25))
    assert not {"predicted_loss_increase", "sensitivity", "loss_budget"} & set(plan.provenance)
    assert plan.provenance["num_calibration_samples"] == 4


def test_the_stages_give_the_adaptive_plan_too(model):
    options = {"allocation": "adaptive", "reconstruction": "least_squares"}
    config, samples = PrunerConfig(mlp_ratio=0.25, attention_ratio=0.34, **options), tokens(12)
    plan, reconstruct = plan_and_reconstruct(model, samples, config)
    fit, probe = withhold_probe(samples)
    stats = calibrate(
        model, batches_of(fit), targets=Requirements.of(config).targets, statistics=Requirements.of(config).statistics
    )
    again = make_plan(model, stats, config, samples=probe)
    assert again == plan
    one, two = (
        apply_plan(model, plan, reconstruct=r).state_dict() for r in (reconstruct, reconstruct_with(stats, config))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ConfigError, match="withhold_probe"):
        make_plan(model, stats, config)


def test_a_walk_is_not_quietly_replaced_by_its_one_shot_kin(model):
    config = PrunerConfig(mlp_ratio=0.25)
    stats = calibrate(model, batches_of(tokens(2)), statistics=Requirements.of(config).statistics)
    for call in (lambda: make_plan(model, stats, config), lambda: reconstruct_with(stats, config)):
        with pytest.raises(ConfigError, match="plan_and_reconstruct"):
            call()


def test_the_gram_matrices_of_all_layers_need_not_fit_into_memory(model, monkeypatch):
    config = PrunerConfig(pruning_ratio=0.1, reconstruction="least_squares")

    def found():
        plan, reconstruct = plan_and_reconstruct(model, tokens(12), config)
        return plan, apply_plan(model, plan, reconstruct=reconstruct).state_dict()

    plan, weights = found()
    most, original = [], chunked.calibrate

    def watched(*args, layers=None, **how):
        most.append(None if layers is None else len(layers))
        return original(*args, layers=layers, **how)

    with monkeypatch.context() as patch:
        patch.setattr(chunked, "calibrate", watched)
        patch.setattr(chunked, "free_memory", lambda device: 0)
        again, others = found()
    assert set(most) == {1}
    assert again == plan
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def test_where_no_neuron_can_go_the_budget_says_so(model):
    with pytest.raises(BudgetError, match="round_to=64"):
        plan_widths(model, PrunerConfig(pruning_ratio=0.2, round_to=64, allocation="uniform"))


def test_a_loss_budget_needs_prune(model):
    with pytest.raises(ConfigError, match="call prune"):
        plan_and_reconstruct(model, tokens(4), PrunerConfig(max_loss_increase=0.3))


def test_which_units_a_loss_budget_may_remove(model):
    assert Requirements.of(PrunerConfig(max_loss_increase=0.1, allocation="uniform")).targets == ("mlp",)
    assert Requirements.of(PrunerConfig(max_loss_increase=0.1)).targets == ("mlp", "attention")
    config = PrunerConfig(max_loss_increase=0.1, reconstruction="least_squares")
    for call in (plan_widths, lambda model, config: make_plan(model, calibrate(model, batches_of(tokens(2))), config)):
        with pytest.raises(ConfigError, match="max_loss_increase"):
            call(model, config)


@pytest.mark.parametrize("options", [{"vocab_size": 128}, {"refit_lm_head": True}])
def test_what_is_no_plan_of_units_is_not_left_out_silently(model, options):
    config = PrunerConfig(mlp_ratio=0.25, **options)
    with pytest.raises(ConfigError, match="make_plan"):
        make_plan(model, calibrate(model, batches_of(tokens(2))), config)


def test_adaptive_needs_two_blocks():
    with pytest.raises(ConfigError, match=r"\b1 sample of 20\b"):
        plan_and_reconstruct(tiny_model("llama"), tokens(1), PrunerConfig(allocation="adaptive"))
