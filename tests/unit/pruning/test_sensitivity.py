"""Probing leaves no trace, and what it measures is, to second order, the divergence of the really sliced model."""

from __future__ import annotations

import math

import pytest
import torch

from hf_context_prune.errors import ConfigError, NumericsError
from hf_context_prune.modeling.architectures import TARGETS, layers_of, output_projection, unit_size
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan
from hf_context_prune.modeling.specs import SPECS, base_model_type
from hf_context_prune.pruning.allocation import output_fisher
from hf_context_prune.pruning.allocation.sensitivity import MOST_NATS, PROBES, measure_sensitivity, withhold_probe
from hf_context_prune.pruning.calibration.calibrate import calibrate
from hf_context_prune.pruning.reconstruction import RECONSTRUCTIONS
from hf_context_prune.pruning.sequential.sub_layer import SubLayer
from hf_context_prune.pruning.surgery import apply_plan, kept_features
from tests.support.tiny import COVERING, case, tiny_model, tokens


def geometry_of(model):
    return read_geometry(model.config, SPECS[base_model_type(model.config.model_type)])


def random_importance(model, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        (layer, target): torch.rand(widths.of(target), generator=generator)
        for layer, widths in enumerate(geometry_of(model).layers)
        for target in widths.targets
    }


def slicing(layer, target, weight, bias, kept):
    return weight[:, kept], bias


def repair_from(model, name):
    stats = calibrate(model, [{"input_ids": tokens(seed=5)}], statistics=frozenset({"gram"}))

    def reconstruct(layer, target, weight, bias, kept):
        return RECONSTRUCTIONS[name](weight, bias, kept, stats.targets[layer, target], 0.01)

    return reconstruct


def divergence(model, narrowed, ids):
    """Mean KL(model || narrowed) a token, from whole forward passes."""
    with torch.no_grad():
        dense, other = (x(input_ids=ids).logits.double().log_softmax(dim=-1) for x in (model, narrowed))
    return float((dense.exp() * (dense - other)).sum(dim=-1).mean())


def sliced_alone(model, importance, layer, target, count, reconstruct):
    """The model with one layer narrowed in one target to its `count` most important units."""
    geometry = geometry_of(model)
    layers = [LayerPlan(tuple(range(w.neurons)), tuple(range(w.kv_groups))) for w in geometry.layers]
    best = sorted(range(len(importance[layer, target])), key=lambda unit: -importance[layer, target][unit])[:count]
    kept = {name: layers[layer].kept(name) for name in TARGETS} | {target: tuple(sorted(best))}
    layers[layer] = LayerPlan(kept["mlp"], kept["attention"])
    return apply_plan(
        model, PruningPlan(model.config.model_type, geometry.layers, tuple(layers)), reconstruct=reconstruct
    )


def with_small_branches(name, factor=0.01):
    """A model whose sub-layers add little, so that losing units costs little, and second order is enough."""
    model, spec = case(name), SPECS[base_model_type(case(name).config.model_type)]
    with torch.no_grad():
        for layer, widths in zip(layers_of(model, spec), read_geometry(model.config, spec).layers, strict=True):
            if "attention" not in widths.targets and name == "qwen3_5_text":
                layer.linear_attn.out_proj.weight *= factor
            for target in widths.targets:
                branch = SubLayer(layer, spec, target).branch
                if branch is output_projection(layer, spec, target):
                    branch.weight *= factor
                else:  # Gemma's gamma is stored less 1
                    branch.weight.copy_(factor * (1 + branch.weight) - 1)
    return model


SLOW = ("qwen3_5_text",)  # its recurrence runs once for every sample


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.nightly if name in SLOW else ())
        for name in (*COVERING, "llama-biased", "gemma3_text", "opt")
    ],
)
def test_the_curve_is_the_divergence_of_the_sliced_model(name):
    """Of samples of one token, whose errors can't add up or cancel; what is left is the noise of the signs."""
    model, ids = with_small_branches(name), tokens(2560, 1)
    importance, reconstruct = random_importance(model), repair_from(model, "least_squares")
    curves = measure_sensitivity(model, importance, reconstruct, ids, targets=TARGETS)
    assert set(curves) == {key for key, value in importance.items() if len(value) > 1}
    for (layer, target), curve in curves.items():
        total = len(importance[layer, target])
        if target == "mlp":
            assert [count for count, _ in curve] == [total, *(round(total * share) for share in PROBES)]
        assert curve[0] == (total, 0.0)
        if layer == 1:
            for count, increase in curve[1:]:
                sliced = sliced_alone(model, importance, layer, target, count, reconstruct)
                assert divergence(model, sliced, ids) == pytest.approx(increase, rel=0.2, abs=1e-7)


def test_a_change_of_the_bias_counts(model):
    def shifting(layer, target, weight, bias, kept):
        return weight[:, kept], torch.ones(len(weight))

    importance, ids = random_importance(model), tokens()
    free, shifted = (measure_sensitivity(model, importance, how, ids, targets=TARGETS) for how in (slicing, shifting))
    assert sum(curve[-1][1] for curve in shifted.values()) > sum(curve[-1][1] for curve in free.values())


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_behind_a_norm_no_output_at_all_is_not_harmless(name):
    """A norm's derivative has no component along its input, so it would call any shrinking of all of it free."""

    def nothing(layer, target, weight, bias, kept):
        return torch.zeros_like(weight[:, kept]), bias

    model = case(name)
    for curve in measure_sensitivity(model, random_importance(model), nothing, tokens(), targets=TARGETS).values():
        assert min(loss for _, loss in curve[1:]) > 0.01


def test_a_single_token_counts_at_most_so_much(model):
    def wild(layer, target, weight, bias, kept):
        return 1e6 * weight[:, kept], bias

    curves = measure_sensitivity(model, random_importance(model), wild, tokens(), targets=TARGETS)
    assert all(0.9 * MOST_NATS < loss <= MOST_NATS for curve in curves.values() for _, loss in curve[1:])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi"])
def test_batches_and_hidden_states_on_disk_change_nothing(name, monkeypatch, tmp_path):
    """Layer by layer, forwards, back, and forwards again: each layer's turn ends before that of the next."""
    model = case(name)
    importance, ids = random_importance(model), tokens(5, 24)
    curves = measure_sensitivity(model, importance, slicing, ids, targets=TARGETS)
    assert measure_sensitivity(model, importance, slicing, ids, targets=TARGETS) == curves
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("hf_context_prune.pruning.sequential.hidden_states.free_memory", lambda: 0)
    assert measure_sensitivity(model, importance, slicing, ids, targets=TARGETS) == curves
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(output_fisher, "batches_of", lambda samples: [{"input_ids": part} for part in samples.split(2)])
    turns = []
    spec = SPECS[base_model_type(model.config.model_type)]
    for index, layer in enumerate(layers_of(model, spec)):
        projection = output_projection(layer, spec, "mlp")
        projection.register_forward_pre_hook(lambda module, args, index=index: turns.append(index))
    batched = measure_sensitivity(model, importance, slicing, ids, targets=TARGETS)
    assert turns == [index for index in (0, 1, 2, 2, 1, 0, 0, 1, 2) for _ in range(3)]
    for key, curve in curves.items():
        assert [count for count, _ in batched[key]] == [count for count, _ in curve]
        assert [loss for _, loss in batched[key]] == pytest.approx([loss for _, loss in curve], rel=2e-2, abs=1e-6)


def everything(model):
    """Parameters by name, with their identity, values, gradients and flags."""
    return {
        name: (id(value), value.detach().clone(), value.requires_grad, value.grad)
        for name, value in model.named_parameters()
    }


def check_untouched(model, before, modes):
    after = everything(model)
    assert list(after) == list(before)
    for name, (identity, value, requires_grad, grad) in before.items():
        assert after[name][0] == identity
        assert after[name][1].view(torch.uint8).equal(value.view(torch.uint8))  # bit by bit: 0.0 is not -0.0
        assert after[name][2] == requires_grad
        assert after[name][3] is grad
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama-biased", torch.bfloat16),
        ("gpt2", torch.float32),
        ("opt-unbiased", torch.bfloat16),
    ],
)
def test_the_model_is_bit_identical_afterwards(name, dtype):
    model = case(name).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::7] = -0.0
    before, modes = everything(model), [module.training for module in model.modules()]
    importance = random_importance(model)
    curves = measure_sensitivity(model, importance, repair_from(case(name), "bias"), tokens(), targets=TARGETS)
    assert len(curves) == 6
    check_untouched(model, before, modes)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("at", ["repair", "forward", "shape"])
def test_the_model_is_bit_identical_after_an_exception(name, at):
    model = case(name)
    before, modes = everything(model), [module.training for module in model.modules()]
    calls = []

    def reconstruct(layer, target, weight, bias, kept):
        calls.append(layer)
        if at == "repair" and len(calls) == 3:
            raise RuntimeError("stop")
        return weight[:, kept[1:] if at == "shape" and len(calls) == 3 else kept], bias

    def forward(module, args):
        if at == "forward":
            raise RuntimeError("stop")

    handle = model.get_output_embeddings().register_forward_pre_hook(forward)
    with pytest.raises(RuntimeError, match="must match|shape mismatch" if at == "shape" else "stop"):
        measure_sensitivity(model, random_importance(model), reconstruct, tokens(), targets=TARGETS)
    handle.remove()
    check_untouched(model, before, modes)
    assert not [module for module in model.modules() if module._forward_hooks]


def test_dropout_is_off_whatever_the_mode():
    model, ids = tiny_model("gpt2", resid_pdrop=0.5), tokens()
    importance = random_importance(model)
    expected = measure_sensitivity(model, importance, slicing, ids, targets=TARGETS)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert measure_sensitivity(model, importance, slicing, ids, targets=TARGETS) == expected
    assert [module.training for module in model.modules()] == modes


def test_a_repair_may_return_a_view_of_the_weight(model):
    importance = {key: -torch.arange(len(value)).float() for key, value in random_importance(model).items()}

    def first_columns(layer, target, weight, bias, kept):
        return weight[:, : len(kept)], bias  # a view; the kept ones are the first here

    expected = measure_sensitivity(model, importance, slicing, tokens(), targets=TARGETS)
    assert measure_sensitivity(model, importance, first_columns, tokens(), targets=TARGETS) == expected


def test_equal_units_give_way_from_the_end(model):
    """The same order as in the plan: of equals, the lower index is kept."""
    kept_by = {}

    def reconstruct(layer, target, weight, bias, kept):
        kept_by[layer, target, len(kept)] = kept
        return slicing(layer, target, weight, bias, kept)

    importance = {key: torch.zeros(len(value)) for key, value in random_importance(model).items()}
    measure_sensitivity(model, importance, reconstruct, tokens(), targets=TARGETS)
    geometry = geometry_of(model)
    for (_, target, count), kept in kept_by.items():
        units = range(count // unit_size(geometry, target))
        assert kept == kept_features(geometry, target, units)


def test_targets_with_nothing_to_remove_have_no_curve():
    model = case("llama-mqa-tied")
    curves = measure_sensitivity(model, random_importance(model), slicing, tokens(), targets=TARGETS)
    assert set(curves) == {(0, "mlp"), (1, "mlp"), (2, "mlp")}


def test_an_output_that_is_not_finite_is_refused(model):
    def reconstruct(layer, target, weight, bias, kept):
        return weight[:, kept] * (math.nan if (layer, target) == (1, "attention") else 1), bias

    before, modes = everything(model), [module.training for module in model.modules()]
    with pytest.raises(NumericsError, match=r"layer 1 \(attention\).*2 of 3 units"):
        measure_sensitivity(model, random_importance(model), reconstruct, tokens(), targets=TARGETS)
    check_untouched(model, before, modes)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NumericsError, match="output of the base model"):
        measure_sensitivity(model, random_importance(model), slicing, tokens(), targets=TARGETS)


def test_gradients_that_overflow_are_refused(model, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda self: self * math.inf)
    with pytest.raises(NumericsError, match=r"gradient at layer 2 \((mlp|attention)\)"):
        measure_sensitivity(model, random_importance(model), slicing, tokens(), targets=TARGETS)


def test_a_pruned_model_can_be_probed(model):
    geometry = geometry_of(model)
    layers = tuple(LayerPlan(tuple(range(20 + i)), (0, 2)) for i in range(3))
    smaller = apply_plan(model, PruningPlan("llama", geometry.layers, layers))
    curves = measure_sensitivity(smaller, random_importance(smaller), slicing, tokens(), targets=TARGETS)
    assert [curves[layer, "mlp"][0][0] for layer in range(3)] == [20, 21, 22]
    assert [count for count, _ in curves[0, "attention"]] == [2, 1]


def test_what_is_measured_on_comes_after_what_is_fitted(subtests):
    for count, length, fit_tokens, fitted, withheld in (
        (2, 512, None, 1, [1]),
        (3, 512, None, 2, [2]),
        (8, 512, None, 6, [6, 7]),
        (128, 512, None, 120, list(range(120, 128))),
        (128, 4096, None, 126, [126, 127]),
        (16, 2, None, 12, [12, 13, 14, 15]),
        (128, 512, 16_384, 32, [43, 55, 67, 79, 91, 103, 115, 127]),
        (34, 512, 16_384, 26, list(range(26, 34))),
        (40, 512, 16_384, 32, list(range(32, 40))),
        (12, 512, 100, 1, [3, 7, 11]),
    ):
        with subtests.test(count=count, length=length, fit_tokens=fit_tokens):
            samples = torch.arange(count * length).view(count, length)
            fit, probe = withhold_probe(samples, fit_tokens)
            assert torch.equal(fit, samples[:fitted])
            assert (probe[:, 0] // length).tolist() == withheld


def test_one_sample_can_not_be_split():
    with pytest.raises(ConfigError, match=r"\b1\b.*\b20\b.*num_calibration_samples.*allocation='uniform'"):
        withhold_probe(tokens(1))
