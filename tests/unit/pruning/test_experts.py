"""Experts removed by what a text routes to them: how many, which, and with what else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hf_context_prune.config import PrunerConfig, ThresholdConfig
from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import (
    BudgetError,
    ConfigError,
    ContextPruneError,
    ExportError,
    PlanError,
    UnsupportedArchitectureError,
)
from hf_context_prune.export import onnx
from hf_context_prune.modeling.expert_neurons import check_neurons_fit, inner_widths
from hf_context_prune.modeling.experts import num_groups
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.widths import count_base_parameters
from hf_context_prune.pruning.calibration import routing
from hf_context_prune.pruning.calibration.routing import measure_routing
from hf_context_prune.pruning.calibration.samples import CalibrationSet, batches_of
from hf_context_prune.pruning.check_budget import check_budget
from hf_context_prune.pruning.expert_criteria import EXPERT_CRITERIA, ExpertStatistics, get_expert_criterion
from hf_context_prune.pruning.experts import choose_experts, count_experts
from hf_context_prune.pruning.notes import experts_note
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.training.callback.checks import check_config
from tests.support.experts import expert_plan, neuron_plan
from tests.support.tiny import MOE_COVERING, case, texts, tiny_model, tiny_tokenizer, tokens

IDS = tokens(6, 24)
SMALL = {"num_calibration_samples": 16, "max_seq_length": 32}


def by_hand(model, layer, ids, mask):
    """Tokens routed to every expert of a layer, and gate x norm of its output, one expert at a time."""
    view = ModelView.of(model)
    experts = view.spec.experts
    module = view.layers[layer].get_submodule(experts.prefix)
    seen = {}
    handle = module.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    hidden, chosen, gates = seen["args"]
    routed, added, squared = (torch.zeros(view.widths[layer].experts) for _ in range(3))
    for token in mask.flatten().nonzero().flatten().tolist():
        for slot in range(chosen.shape[1]):
            expert = int(chosen[token, slot])
            with torch.no_grad():
                output = module(hidden[token : token + 1], torch.tensor([[expert]]), torch.ones(1, 1))
            routed[expert] += 1
            added[expert] += float(gates[token, slot]) * float(output.norm())
            squared[expert] += (float(gates[token, slot]) * float(output.norm())) ** 2
    return routed, added, squared


@pytest.mark.parametrize("name", MOE_COVERING)
def test_routing_is_what_counting_by_hand_gives(name):
    model, mask = case(name), torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    ids = IDS[:2, :12]
    found = measure_routing(model, [{"input_ids": ids, "attention_mask": mask}])
    assert found.keys() == {index for index, widths in enumerate(ModelView.of(model).widths) if widths.experts}
    for layer, statistics in found.items():
        routed, added, squared = by_hand(model, layer, ids, mask)
        assert statistics.num_tokens == 20
        assert torch.equal(statistics.routed.float(), routed)
        torch.testing.assert_close(statistics.added.float(), added, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(statistics.squared.float(), squared, atol=1e-3, rtol=1e-3)


def test_criteria():
    sums = torch.tensor([[8.0, 2.0, 0.0], [4.0, 6.0, 0.0], [3.0, 18.0, 0.0]]).double()
    statistics = ExpertStatistics(10, *sums)
    assert EXPERT_CRITERIA["frequency"](statistics).tolist() == [0.8, 0.2, 0]
    assert EXPERT_CRITERIA["reap"](statistics).tolist() == [0.5, 3, 0]
    assert EXPERT_CRITERIA["energy"](statistics).tolist() == [0.3, 1.8, 0]
    with pytest.raises(ConfigError, match="Did you mean 'reap'"):
        get_expert_criterion("reab")


@pytest.mark.parametrize("name", ["mixtral", "glm4_moe-groups"])
@pytest.mark.parametrize("criterion", EXPERT_CRITERIA)
def test_the_best_experts_stay_as_many_in_every_group(name, criterion, tmp_path, monkeypatch):
    model, config = case(name), PrunerConfig(num_experts=4, expert_criterion=criterion)
    choice = choose_experts(model, IDS, config, state_dir=tmp_path)
    groups = num_groups(model.config, ModelView.of(model).spec.experts)
    for index, statistics in measure_routing(model, batches_of(IDS)).items():
        scores = EXPERT_CRITERIA[criterion](statistics)
        for group in range(groups):
            own = range(group * 8 // groups, (group + 1) * 8 // groups)
            kept = [expert for expert in choice.kept[index] if expert in own]
            assert kept == sorted(sorted(own, key=lambda expert: -scores[expert])[: 4 // groups])
    assert choice.facts["kept"] == 4
    assert choice.facts["of"] == 8
    assert all(0 < share <= 1 for share in choice.facts["routed_share"].values())
    monkeypatch.setattr(routing, "prepare_batch", None)  # measured once: a run that is resumed reads it
    assert choose_experts(model, IDS, config, state_dir=tmp_path) == choice
    with pytest.raises(TypeError):
        choose_experts(model, IDS + 1, config, state_dir=tmp_path)


CONFIGS = {
    "experts alone": ("mixtral", {"num_experts": 4}),
    "a share": ("lfm2_moe", {"experts_ratio": 0.5}),
    "sliced": ("gpt_oss", {"num_experts": 6, "reconstruction": "none"}),
    "with a budget": ("glm4_moe-groups", {"num_experts": 4, "pruning_ratio": 0.35, "units": "neurons,kv_groups"}),
    "with tokens": ("mixtral", {"num_experts": 6, "vocab_size": 300, "pad_to_multiple_of": 4}),
    "with heads": ("gpt_oss", {"num_experts": 4, "attention_ratio": 0.34}),
    "with layers": ("mixtral", {"num_experts": 4, "num_layers": 2, "removable_layers": "0-1"}),
    "neurons inside": ("mixtral", {"expert_neurons_ratio": 0.25}),
    "neurons inside, sliced": ("gpt_oss", {"expert_neurons_ratio": 0.5, "reconstruction": "none"}),
    "both, with a budget": (
        "glm4_moe-groups",
        {"num_experts": 4, "expert_neurons_ratio": 0.25, "pruning_ratio": 0.4, "units": "neurons,kv_groups"},
    ),
    "shared, with layers": (
        "qwen3_5_moe_text",
        {"num_experts": 4, "shared_expert_ratio": 0.5, "num_layers": 2, "removable_layers": "0-1"},
    ),
    "units alone": ("lfm2_moe", {"pruning_ratio": 0.03, "units": "neurons,kv_groups"}),
}


@pytest.mark.parametrize(("name", "options"), CONFIGS.values(), ids=CONFIGS)
def test_experts_go_together_with_other_units(name, options, tmp_path):
    model, tokenizer = case(name), tiny_tokenizer()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = PrunerConfig(**SMALL, **options)
    calibration = CalibrationSet(load_documents(texts(60)), config)
    check_budget(model, tokenizer, config)
    found = prune_model(model, tokenizer, calibration, config)
    plan, view = found.plan, ModelView.of(model)
    plan.check_fits(model, view.spec.model_type, view.geometry)
    dense, shared = inner_widths(model.config, view.spec.experts)
    inside = inner_widths(found.model.config, view.spec.experts)
    assert (inside[0] < dense) == bool(config.expert_neurons_ratio)
    assert (inside[1] < shared) == bool(shared and config.narrows_experts)
    assert (plan.expert_neurons is not None) == config.narrows_experts
    if config.removes_experts:
        kept = config.num_experts or 4
        assert {widths.experts for widths in plan.kept_widths} - {0} == {kept}
        assert plan.provenance["experts"]["kept"] == kept
        assert plan.provenance["config"] == config.to_dict()
        (note,) = experts_note(plan)
        repaired = config.reconstruction != "none"
        assert ("error_left" in plan.provenance["experts"]) == repaired
        assert note.endswith("They were refitted to what all did." if repaired else "not made up for in the layers.")
        assert note.startswith(f"{kept} of 8 experts stay in every layer that has them, by energy: ")
    elif config.narrows_experts:
        (note,) = experts_note(plan)
        assert note.startswith(f"{inside[0]} of {dense} neurons of every expert stay. ")
    else:
        assert experts_note(plan) == ()
    assert count_base_parameters(found.model, plan) == model.num_parameters()
    gone = model.num_parameters() - found.model.num_parameters()
    assert gone >= (config.pruning_ratio or 0) * model.num_parameters()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    sliced = apply_plan(model, plan)
    assert {key: one.shape for key, one in sliced.named_parameters()} == {
        key: one.shape for key, one in found.model.named_parameters()
    }
    folder = save_pruned(found.model, tmp_path / "out", plan=plan, tokenizer=found.tokenizer)
    assert PruningPlan.load(folder / "pruning_plan.json") == plan


REFUSED = {
    "none": ("mixtral", {"num_experts": 8}, "num_experts is 8, but every layer has 8 experts, so none would"),
    "none by a share": ("mixtral", {"experts_ratio": 0.01}, r"experts_ratio is 0\.01, but every layer has 8"),
    "all": ("mixtral", {"experts_ratio": 0.99}, r"0 of 8 experts would stay, and at least 2 must.*Keep 2 or more"),
    "too many": ("mixtral", {"num_experts": 1}, r"1 of 8 experts would stay, and at least 2 must.*num_experts_per_tok"),
    "of groups": ("glm4_moe-groups", {"num_experts": 3}, "3 of 8 experts would stay, and at least 4"),
    "unequal groups": ("glm4_moe-groups", {"num_experts": 5}, "3, 2 experts of the 2 groups.*multiple of 2"),
    "a dense model": ("llama", {"num_experts": 2}, "num_experts is 2: a llama model has no experts"),
    "no neuron": (
        "mixtral",
        {"expert_neurons_ratio": 0.001},
        r"ratio is 0\.001, which removes no neuron",
    ),
    "neurons of a dense model": ("llama", {"expert_neurons_ratio": 0.5}, "expert_neurons_ratio is 0.5: a llama model"),
    "one width for both": ("glm4_moe", {"shared_expert_ratio": 0.5}, "one width for its experts and the shared one"),
    "no shared expert": ("mixtral", {"shared_expert_ratio": 0.5}, "a mixtral model has no shared experts"),
    "neurons": ("mixtral", {"mlp_ratio": 0.5}, "layers have experts in place of MLPs.*experts_ratio"),
}


@pytest.mark.parametrize(("name", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_is_refused_before_any_work(name, options, message):
    with pytest.raises(ContextPruneError, match=message):
        check_budget(case(name), tiny_tokenizer(), PrunerConfig(**SMALL, **options))


def test_options_that_contradict_each_other():
    for options, message in (
        ({"num_experts": 4, "experts_ratio": 0.5}, "num_experts and experts_ratio both say"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"experts_ratio": 1.0}, "experts_ratio is 1"),
        ({"num_experts": 4, "max_loss_increase": 0.1}, "num_experts fixes it"),
        ({"num_experts": 4, "expert_criterion": "reab"}, "reab"),
    ):
        with pytest.raises(ConfigError, match=message):
            PrunerConfig(**options)
    for options in ({"num_experts": 4}, {"expert_neurons_ratio": 0.5}):
        with pytest.raises(ConfigError, match="num_experts"):
            check_config(PrunerConfig(**options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", {"expert_neurons_ratio": 0.5}),
        ("gpt_oss", {"expert_neurons_ratio": 0.5}),
        ("qwen2_moe", {"shared_expert_ratio": 0.75}),
    ],
)
def test_the_refit_makes_up_for_neurons(name, options):
    model, tokenizer, errors = case(name), tiny_tokenizer(), {}
    small = {"num_calibration_samples": 48, "max_seq_length": 64, "refit_lm_head": False}
    other = PrunerConfig(**small, pruning_seed=1)
    ids = CalibrationSet(load_documents(texts(60)), other).samples(tokenizer)[:8]
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        for how in ("none", "sequential"):
            config = PrunerConfig(**small, reconstruction=how, **options)
            found = prune_model(model, tokenizer, CalibrationSet(load_documents(texts(60)), config), config)
            errors[how] = float((found.model(input_ids=ids).logits - dense).square().mean())
            assert ("error_left" in found.plan.provenance["experts"]) == (how == "sequential")
    assert errors["sequential"] < 0.9 * errors["none"]


def test_neurons_of_a_plan_are_held_to_the_model(subtests):
    model = case("qwen2_moe")
    plan = neuron_plan(expert_plan(model), model)
    neurons = plan.expert_neurons
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    assert plan.to_dict()["format_version"] == 5
    first = neurons.layers[1]
    wrong = {
        "expert_neurons.dense is 0": {"dense": 0},
        "has 2 layers, not 3": {"layers": neurons.layers[:2]},
        r"Layer 1 of the plan: expert_neurons.layers has the neurons of 3 experts; 4 stay": {
            "layers": (neurons.layers[0], first[:3], neurons.layers[2])
        },
        "ascending numbers": {"layers": (neurons.layers[0], (first[0][::-1], *first[1:]), neurons.layers[2])},
        "all keep as many": {"layers": (neurons.layers[0], (first[0][1:], *first[1:]), neurons.layers[2])},
    }
    for message, changes in wrong.items():
        with subtests.test(message), pytest.raises(PlanError, match=message):
            dataclasses.replace(plan, expert_neurons=dataclasses.replace(neurons, **changes))
    wider = dataclasses.replace(neurons, dense=neurons.dense + 8)
    with pytest.raises(PlanError, match="made for experts of"):
        apply_plan(model, dataclasses.replace(plan, expert_neurons=wider))
    alone = case("glm4_moe")
    both = neuron_plan(expert_plan(alone), alone)
    apart = dataclasses.replace(both, expert_neurons=dataclasses.replace(both.expert_neurons, shared=()))
    with pytest.raises(PlanError, match="one width for both"):
        apply_plan(alone, apart)
    with pytest.raises(PlanError, match="has no experts"):
        check_neurons_fit(case("llama").config, None, neurons)
    data = plan.to_dict()
    for mask in ("xyz", "f" * 999, 3):
        data["expert_neurons"]["shared"][1] = mask
        with subtests.test(mask=mask), pytest.raises(PlanError, match="mask"):
            PruningPlan.from_dict(data)


def test_plans_of_ones_own_are_held_to_the_same(subtests):
    model = case("glm4_moe-groups")
    plan = expert_plan(model)
    for experts, message in (
        ((), "Layer 1 of the plan keeps no experts"),
        ((0, 4), "2 of 8 experts would stay, and at least 4 must: every token is routed to 2"),
        ((0, 1, 2, 4, 5), "3, 2 experts of the 2 groups"),
        ((0, 1, 4, 9), "ascending integers from 0 to 7"),
    ):
        layer = dataclasses.replace(plan.layers[1], experts=experts)
        layers = plan.layers[0], layer, plan.layers[2]
        with subtests.test(experts=experts), pytest.raises(PlanError, match=message):
            apply_plan(model, dataclasses.replace(plan, layers=layers))
    stacked = tiny_model("mixtral", output_router_logits=True)
    unequal = expert_plan(stacked, (6, 4, 4))
    with pytest.raises(PlanError, match="output_router_logits"):
        apply_plan(stacked, unequal)
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    assert plan.to_dict()["format_version"] == 4
    assert PruningPlan.identity("llama", ModelView.of(case("llama")).geometry).to_dict()["format_version"] == 2


def test_a_router_that_is_no_linear_layer_is_refused(subtests):
    def deep(router):
        router.second = nn.Linear(8, 8)

    def adapted(router):
        router.lora = nn.Parameter(torch.zeros(4, 4))

    for change, message in ((deep, "no linear layer"), (adapted, "no linear layer")):
        with subtests.test(change=change.__name__):
            model = case("mixtral")
            change(model.model.layers[1].mlp.gate)
            with pytest.raises(UnsupportedArchitectureError, match=f"model.layers.1.mlp.gate .*{message}"):
                ModelView.of(model)
    replaced = case("mixtral")
    replaced.model.layers[0].mlp.gate = nn.Linear(48, 8)
    with pytest.raises(UnsupportedArchitectureError, match=r"model\.layers\.0\.mlp\.gate is torch"):
        ModelView.of(replaced)


def test_exports_and_thresholds_refuse_experts_by_name():
    model, tokenizer = case("mixtral"), tiny_tokenizer()
    loaded = LoadedModel.of(model, tokenizer, "mix", None, None)
    config = ThresholdConfig(linear_threshold=0.1)
    with pytest.raises(ExportError, match="can't be exported to ONNX: the graph would hold the experts"):
        onnx.check(loaded, "fp32")
    with pytest.raises(ConfigError, match="mixtral model has experts in place of MLPs"):
        check_budget(model, tokenizer, config)


def test_layers_that_differ_in_experts_need_a_plan():
    model = case("mixtral")
    smaller, config = apply_plan(model, expert_plan(model, (6, 4, 4))), PrunerConfig(num_experts=3)
    with pytest.raises(BudgetError, match="from 4 to 6"):
        count_experts(smaller, config)
