"""The experts that stay are refitted to what their layer computed with all of its experts."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import NumericsError, SaveError
from hf_context_prune.modeling.expert_neurons import shared_expert
from hf_context_prune.modeling.experts import gate_and_up, output_tensors
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.samples import CalibrationSet, batches_of
from hf_context_prune.pruning.experts import remove_experts
from hf_context_prune.pruning.notes import experts_note
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.sequential import expert_repair
from hf_context_prune.pruning.sequential.expert_repair import ExpertRepair
from hf_context_prune.pruning.sequential.experts import repair_experts
from hf_context_prune.pruning.sequential.hidden_states import StreamStorage, capture_streams, count_positions
from hf_context_prune.pruning.sequential.layer_pruner import DEFAULT_CORRECTION_RIDGE
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.utils import precision
from hf_context_prune.utils.compat import apply_expert_gate
from hf_context_prune.utils.linalg import ridge_diagonal
from tests.support.experts import expert_plan
from tests.support.tiny import MOE_CASES, MOE_COVERING, case, texts, tiny_tokenizer, tokens

KINDS = ["mixtral", "gpt_oss"]
"""Both layouts: [experts, out, in], and transposed, interleaved and biased."""


def batches(count, size=4, length=16):
    return [{"input_ids": ids} for ids in tokens(count * size, length).split(size)]


def without(model, given, **how):
    """(a model without half of the experts, the same repaired, share of the error left, kept experts)."""
    plan = expert_plan(model, (4, 4, 4))
    kept = {index: layer.experts for index, layer in enumerate(plan.layers) if layer.experts}
    sliced, repaired = (apply_plan(model, plan, share=True) for _ in range(2))
    done = repair_experts(model, repaired, kept, given, **how)
    return sliced, repaired, {index: one.left for index, one in done.items()}, kept


def experts_of(model):
    view = ModelView.of(model)
    return [
        layer.get_submodule(view.spec.experts.prefix)
        for layer, widths in zip(view.layers, view.widths, strict=True)
        if widths.experts
    ]


def outputs_of(model):
    return [tensor for module in experts_of(model) for tensor in output_tensors(module) if tensor is not None]


def shared_of(model):
    """The output projections of shared experts."""
    return [
        module.down_proj.weight
        for layer in ModelView.of(model).layers
        if (module := shared_expert(layer, ModelView.of(model).spec.experts)) is not None
    ]


def streams_of(model, given):
    storage = StreamStorage(count_positions(list(enumerate(given))))
    return capture_streams(ModelView.of(model), list(enumerate(given)), storage), storage


@torch.no_grad()
def behind(model, layer, given):
    """The residual stream behind a layer, all tokens."""
    seen = []
    handle = ModelView.of(model).layers[layer].register_forward_hook(lambda _, args, out: seen.append(out))
    for batch in given:
        model(**batch)
    handle.remove()
    return torch.cat([out.flatten(0, 1) for out in seen])


@pytest.mark.parametrize("name", MOE_CASES)
def test_less_is_lost_in_every_family(name):
    model, given = case(name), batches(13)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sliced, repaired, left, kept = without(model, given)
    assert left.keys() == kept.keys()
    assert all(0 < share < 1 for share in left.values())  # of text that was never fitted
    first, last = min(kept), len(ModelView.of(model).layers) - 1
    assert not any(map(torch.equal, shared_of(sliced), shared_of(repaired)))
    for layer in (first, last):
        target = behind(model, layer, given)
        errors = [float((behind(one, layer, given) - target).square().sum()) for one in (sliced, repaired)]
        assert errors[1] < errors[0], layer
    own = {id(tensor) for tensor in repaired.parameters()} - {id(tensor) for tensor in model.parameters()}
    assert own  # and nothing of the base model has changed
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MOE_COVERING)
def test_an_expert_computes_what_its_module_does(name):
    model = case(name)
    transposed = ModelView.of(model).spec.experts.transposed
    module, hidden = experts_of(model)[0], torch.randn(5, model.config.hidden_size)
    weight, bias = output_tensors(module)
    for expert in (0, 5):
        inputs = apply_expert_gate(module, gate_and_up(module, expert, hidden, transposed=transposed))
        own = inputs @ (weight[expert] if transposed else weight[expert].T)
        with torch.no_grad():
            expected = module(hidden, torch.full((5, 1), expert), torch.ones(5, 1))
        torch.testing.assert_close(own if bias is None else own + bias[expert], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MOE_COVERING)
@torch.no_grad()
def test_with_all_experts_kept_nothing_changes(name):
    model, given = case(name), batches(13)
    view, (streams, storage) = ModelView.of(model), streams_of(model, given)
    index = max(index for index, widths in enumerate(view.widths) if widths.experts)
    streams[-1].validation = True
    for layer in range(index):
        for stream in streams:
            stream.pruned.copy_(stream.call(layer, view.layers[layer], stream.pruned))
    for stream in streams:
        stream.base.copy_(stream.call(index, view.layers[index], stream.pruned))
    found = ExpertRepair(view, index, streams, storage).solve()
    weight, bias = output_tensors(view.layers[index].get_submodule(view.spec.experts.prefix))
    assert torch.equal(found.weight, weight)
    assert (found.bias is None and bias is None) or torch.equal(found.bias, bias)
    assert found.left == 1.0


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_taking_turns_comes_close_to_one_system_for_all(name):
    """The joint least-squares problem of the first layer, written down for all experts together."""
    model, given = case(name), batches(8)  # too few for validation: every ridge is the default
    plan = expert_plan(model, (4, 4, 4))
    fewer = apply_plan(model, plan, share=True)
    module, target = experts_of(fewer)[0], behind(model, 0, given)
    missing = (target - behind(fewer, 0, given)).double()
    seen, transposed = [], ModelView.of(model).spec.experts.transposed
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    behind(fewer, 0, given)
    handle.remove()
    hidden, chosen, gates = (torch.cat(parts) for parts in zip(*seen, strict=True))
    parts, ridges = [], []
    for expert in range(4):
        reach = ((chosen == expert) * gates).sum(dim=1, keepdim=True)
        z = reach * apply_expert_gate(module, gate_and_up(module, expert, hidden, transposed=transposed))
        z = torch.cat([z, reach], dim=1) if name == "gpt_oss" else z
        count = (chosen == expert).any(dim=1).sum()
        squares = z.double().square().sum(dim=0) / count
        parts.append(z.double())
        ridges.append(count * ridge_diagonal(squares, DEFAULT_CORRECTION_RIDGE))
    Z, D = torch.cat(parts, dim=1), torch.cat(ridges)

    def objective(changes):
        return float((missing - Z @ changes).square().sum() + (D[:, None] * changes.square()).sum())

    best = torch.linalg.solve(Z.T @ Z + D.diag(), Z.T @ missing)
    streams, storage = streams_of(fewer, given)
    for stream in streams:
        stream.base.copy_(stream.call(0, ModelView.of(model).layers[0], stream.base))
    found = ExpertRepair(ModelView.of(fewer), 0, streams, storage).solve()
    weight, bias = output_tensors(module)
    change = (found.weight - weight).double()
    change = change if transposed else change.mT
    if bias is not None:
        change = torch.cat([change, (found.bias - bias).double()[:, None]], dim=1)
    zero, least, own = (objective(one) for one in (0 * best, best, change.flatten(0, 1)))
    assert least <= own + 1e-3
    assert own - least < 0.02 * (zero - least)


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_repair_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    model, given = case(name), batches(13)
    _, whole, left, _ = without(model, given)
    solve, solved = ExpertRepair.solve, []

    def dies_in_the_last_layer(self):
        solved.append(self.index)
        if solved == [0, 1, 2]:
            raise KeyboardInterrupt
        return solve(self)

    monkeypatch.setattr(ExpertRepair, "solve", dies_in_the_last_layer)
    with pytest.raises(KeyboardInterrupt):
        without(model, given, state_dir=tmp_path)
    _, resumed, again, _ = without(model, given, state_dir=tmp_path)
    assert solved == [0, 1, 2, 2]
    assert again == left
    assert all(map(torch.equal, outputs_of(resumed), outputs_of(whole)))
    without(model, batches(12), state_dir=tmp_path)  # of other text nothing is taken
    assert solved == [0, 1, 2, 2, 0, 1, 2]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match="folder for resuming"):
        without(case("mixtral"), batches(2), state_dir=tmp_path / "file")


def test_what_does_not_fit_into_memory_gives_the_same_bits():
    model, given = case("gpt_oss"), batches(13)
    inside, outside = (without(model, given, memory_limit=limit) for limit in (None, 0))
    assert inside[2] == outside[2]
    assert all(map(torch.equal, outputs_of(inside[1]), outputs_of(outside[1])))


def test_experts_that_do_not_fit_into_memory_lie_in_files(monkeypatch):
    model, config, asked = case("gpt_oss"), PrunerConfig(num_experts=4), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inside = remove_experts(model, tokens(16, 16), config, None)[1].state_dict()
    monkeypatch.setattr("hf_context_prune.pruning.experts.fits_in_memory", lambda size: bool(asked.append(size)))
    outside = remove_experts(model, tokens(16, 16), config, None)[1].state_dict()
    view = ModelView.of(model)
    assert asked == [4 * 4 * 3 * view.costs["experts"]]
    assert inside.keys() == outside.keys()
    assert all(torch.equal(value, outside[name]) for name, value in inside.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_padding_counts_for_nothing():
    model, found = case("mixtral"), []
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[2:, 10:] = 0
    for noise in (0, 7):
        ids = [batch["input_ids"] + noise * (1 - mask) % 90 for batch in batches(13)]
        given = [{"input_ids": one, "attention_mask": mask} for one in ids]
        found.append(without(model, given)[1])
    for one, other in zip(*map(outputs_of, found), strict=True):  # experts sort tokens, so sums may round differently
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_half_precision_stays_what_it_is():
    model = case("gpt_oss").to(torch.bfloat16)
    sliced, repaired, left, _ = without(model, batches(13))
    assert all(share < 1 for share in left.values())
    for before, after in zip(outputs_of(sliced), outputs_of(repaired), strict=True):
        assert after.dtype == torch.bfloat16
        assert not torch.equal(before, after)


def test_few_tokens_are_enough_where_products_are_rounded(monkeypatch):
    """Fewer tokens reach an expert than it has neurons, and one may outweigh all others."""
    monkeypatch.setattr(precision, "FAST_PRECISION", "medium")
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: True)
    model, given = case("mixtral"), batches(26, size=1, length=4)
    sliced, repaired, _, _ = without(model, given)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in outputs_of(repaired))
    assert not all(map(torch.equal, outputs_of(sliced), outputs_of(repaired)))


def test_an_expert_that_no_token_reaches_stays_as_it_is(monkeypatch):
    model = case("glm4_moe")
    plan = expert_plan(model, (4, 4, 4))
    layer, expert = 2, plan.layers[2].experts[1]
    with torch.no_grad():
        ModelView.of(model).layers[layer].mlp.gate.e_score_correction_bias[expert] = -100.0
    sliced, repaired, _, _ = without(model, batches(13))
    before, after = (experts_of(one)[-1].down_proj.detach() for one in (sliced, repaired))
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])
    monkeypatch.setattr(expert_repair, "all_finite", lambda values: False)
    with pytest.raises(NumericsError, match=r"layer 1 \(experts\)"):
        without(model, batches(2))


def test_a_run_repairs_by_default_and_slices_where_nothing_is_reconstructed(monkeypatch):
    model, tokenizer, found = case("mixtral"), tiny_tokenizer(), {}
    monkeypatch.setattr("hf_context_prune.pruning.experts.batches_of", partial(batches_of, batch_tokens=256))
    for name in ("none", "bias", "least_squares", "sequential"):
        small = {"num_calibration_samples": 48, "max_seq_length": 64, "refit_lm_head": False}
        config = PrunerConfig(num_experts=4, reconstruction=name, **small)
        found[name] = prune_model(
            copy.deepcopy(model), tokenizer, CalibrationSet(load_documents(texts(60)), config), config
        )
        assert ("error_left" in found[name].plan.provenance["experts"]) == (name in ("least_squares", "sequential"))
    assert len({tuple(layer.experts for layer in one.plan.layers) for one in found.values()}) == 1
    assert re.search(
        r"They were refitted to what all did: \d+% .* on text that was not fitted\.",
        experts_note(found["sequential"].plan)[0],
    )
    sliced = outputs_of(apply_plan(model, found["none"].plan))
    for name, one in found.items():
        same = all(map(torch.equal, outputs_of(one.model), sliced))
        assert same == (name in ("none", "bias")), name
