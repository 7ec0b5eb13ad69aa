"""The paper's protocol against a computation of its own: the zeros are the paper's, the cuts change nothing."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_context_prune.config import ThresholdConfig
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.errors import ConfigError
from hf_context_prune.pruning.calibration.samples import CalibrationSet, batches_of
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.pruning.thresholds.magnitudes import measure_magnitudes
from hf_context_prune.pruning.thresholds.prune import (
    count_zeros,
    count_zeros_of_paper,
    prune_by_thresholds,
    zero_below_,
)
from tests.support.tiny import VOCABULARY, case
from tests.support.tiny_domain import documents, model_for, shared_tokenizer

PAPER = {
    "phi": ("mlp.activation_fn", "mlp.fc1"),
    "opt": ("activation_fn", "fc1"),
    "llama": ("mlp.act_fn", "mlp.gate_proj"),
}
CASES = ["phi", "opt", "llama-biased", "opt-unbiased", "llama-mqa-tied"]


def samples(num=6, length=16):
    return torch.randint(0, VOCABULARY, (num, length), generator=torch.Generator().manual_seed(3))


def measured(model, blocks=None):
    return measure_magnitudes(model, batches_of(samples() if blocks is None else blocks))


def quieter(model, seed=0):
    """Some neurons, value rows, o columns and inputs of q, k and v much smaller than the others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in name:
                rows = torch.rand(module.out_features, generator=generator) < 0.3
                module.weight[rows] *= 1e-4
                if module.bias is not None:
                    module.bias[rows & (torch.rand(module.out_features, generator=generator) < 0.5)] *= 1e-4
            if name.endswith("norm") and module.weight.shape == (48,):  # the inputs of what follows
                for parameter in module.parameters():
                    parameter[:5] *= 1e-4
    return model


@pytest.fixture(scope="module", params=CASES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return quieter(case(name))


def recorded(model, blocks, activation_path):
    """Inputs and outputs of every linear layer and activation, token by token, in plain lists."""
    seen: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    handles = []

    def record(path):
        def hook(_, inputs, output):
            for found, x in zip(seen.setdefault(path, ([], [])), (inputs[0], output), strict=True):
                found.extend(x.reshape(-1, x.shape[-1]).double())

        return hook

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or path.endswith(activation_path):
            handles.append(module.register_forward_hook(record(path)))
    with torch.no_grad():
        for row in blocks:
            model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    return {path: (torch.stack(x), torch.stack(y)) for path, (x, y) in seen.items()}


def by_the_paper(model, name, blocks, linear, activation):
    """`prune_linear`, then `prune_activations`, one neuron at a time."""
    act, before = PAPER[name.partition("-")[0]]
    seen, result = recorded(model, blocks, act), copy.deepcopy(model)
    with torch.no_grad():
        for path, module in result.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            x, y = seen[path]
            for column in range(module.in_features):
                if x[:, column].abs().mean() <= linear:
                    module.weight[:, column] = 0
            for row in range(module.out_features):
                biased = y[:, row].abs().mean()
                bias = None if module.bias is None else seen_bias(model, path)[row]
                smallest = biased if bias is None else min(biased, (y[:, row] - bias).abs().mean())
                if smallest <= linear:
                    module.weight[row] = 0
                    if bias is not None and biased <= linear:
                        module.bias[row] = 0
        for path, (_, y) in seen.items():
            if not path.endswith(act):
                continue
            module = result.get_submodule(path[: -len(act)] + before)
            for row in range(module.out_features):
                if y[:, row].abs().mean() <= activation:
                    module.weight[row] = 0
                    if module.bias is not None:
                        module.bias[row] = 0
    return result


def seen_bias(model, path):
    return model.get_submodule(path).bias.detach().double()


@pytest.mark.parametrize(("linear", "activation"), [(1e-3, 0.0), (1e-5, 0.05), (0.1, 0.1)])
def test_the_zeros_are_those_of_the_paper(model, name, linear, activation):
    blocks = samples()
    ours = copy.deepcopy(model)
    zero_below_(ours, measure_magnitudes(model, batches_of(blocks)), linear=linear, activation=activation)
    theirs = by_the_paper(model, name, blocks, linear, activation)
    changed = 0
    for (key, got), expected, before in zip(
        ours.named_parameters(), theirs.parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(got, expected), key
        changed += int((got != before).sum())
    assert changed > 0


@pytest.mark.parametrize(("linear", "activation"), [(1e-3, None), (None, 0.05), (0.1, 0.1)])
def test_what_is_cut_out_was_dead(model, linear, activation):
    blocks = samples()
    config = ThresholdConfig(linear_threshold=linear, activation_threshold=activation)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = measured(model, blocks)
    smaller, plan, counts = prune_by_thresholds(model, found, config)
    zeroed = copy.deepcopy(model)
    zero_below_(zeroed, measure_magnitudes(model, batches_of(blocks)), linear=linear, activation=activation)
    other = samples(num=2)  # not only on the calibration text
    with torch.no_grad():
        assert torch.allclose(smaller(other).logits, zeroed(other).logits, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    total = sum(parameter.numel() for parameter in model.parameters())
    left = sum(parameter.numel() for parameter in smaller.parameters())
    assert counts.removed == total - left
    sliced = apply_plan(model, plan)
    assert counts.zeroed == count_zeros(smaller) - count_zeros(sliced)
    zeros = count_zeros_of_paper(model, found, config, ())
    assert zeros == count_zeros(zeroed) - count_zeros(model)
    assert counts.removed > 0
    assert counts.removed + counts.zeroed >= zeros  # what was cut out had weights that were not zero too
    assert plan.provenance["zeroed"]["zeroed_not_removed"] == counts.zeroed
    assert sliced.config.to_dict() == smaller.config.to_dict()


def test_no_unit_is_cut_that_a_bias_keeps_alive():
    model = quieter(case("opt"))
    layer = model.model.decoder.layers[0]
    with torch.no_grad():
        layer.fc1.weight[7], layer.fc1.bias[7] = 0, 3.0  # a constant, not nothing
        layer.fc1.weight[8], layer.fc1.bias[8] = 0, 0.0
    config = ThresholdConfig(linear_threshold=0.0)
    _, plan, _ = prune_by_thresholds(model, measured(model), config)
    assert 7 in plan.layers[0].neurons
    assert 8 not in plan.layers[0].neurons


def test_a_layer_keeps_one_unit_of_each():
    config = ThresholdConfig(linear_threshold=1e9)
    model = case("llama")
    smaller, plan, counts = prune_by_thresholds(model, measured(model), config)
    assert {(len(layer.neurons), len(layer.kv_groups)) for layer in plan.layers} == {(1, 1)}
    assert torch.isfinite(smaller(samples()).logits).all()
    assert counts.removed + counts.zeroed > 0.5 * model.num_parameters()


@pytest.mark.parametrize(("name", "embedding"), [("llama", 0.0), ("phi-mha", 0.02)])
def test_the_dense_model_is_measured_where_tokens_go_too(name, embedding):
    tokenizer = shared_tokenizer("llama3")
    model, text = quieter(model_for(name, tokenizer)), documents()
    options = {"linear_threshold": 0.1, "activation_threshold": 0.1}
    config = ThresholdConfig(**options, num_calibration_samples=8, max_seq_length=32)
    _, _, alone = prune_model(model, tokenizer, CalibrationSet(text, config), config)
    both = replace(config, embedding_threshold=embedding)
    smaller, fewer, plan = prune_model(model, tokenizer, CalibrationSet(text, both), both)
    assert len(fewer) == len(plan.vocabulary.kept) < len(tokenizer)
    assert plan.layers == alone.layers  # the tokens of a smaller vocabulary are other ones
    assert [len(x.neurons) for x in plan.layers] != [40, 40, 40]
    zeroed = copy.deepcopy(model)
    samples = tokenize_samples(text, tokenizer, num_samples=8, max_seq_length=32, seed=0)
    zero_below_(zeroed, measured(model, samples), linear=0.1, activation=0.1)
    kept = torch.tensor(plan.vocabulary.kept)
    ids = torch.arange(len(kept))[None]
    with torch.no_grad():
        assert torch.allclose(smaller(ids).logits, zeroed(kept[None]).logits[..., kept], atol=1e-5)


def test_padding_counts_nowhere(model):
    blocks = samples()
    mask = torch.ones_like(blocks)
    padded = torch.cat([blocks, torch.zeros_like(blocks[:, :4])], dim=1)
    batch = {"input_ids": padded, "attention_mask": torch.cat([mask, mask[:, :4] * 0], dim=1)}
    plain, other = measure_magnitudes(model, [{"input_ids": blocks}]), measure_magnitudes(model, [batch])
    assert plain.num_tokens == other.num_tokens
    for key, found in plain.linears.items():
        assert torch.allclose(found.outputs, other.linears[key].outputs, rtol=1e-4, atol=1e-6), key


def test_other_layers_are_refused():
    with pytest.raises(ConfigError, match="Conv1D"):
        measure_magnitudes(case("gpt2"), batches_of(samples()))


CONTRADICTIONS = [
    {"linear_threshold": -1.0},
    {"linear_threshold": float("nan")},
    {"linear_threshold": True},
    {"embedding_threshold": 1.5},
    {"linear_threshold": 0.1, "pruning_ratio": 0.2},
    {"activation_threshold": 0.1, "mlp_ratio": 0.2},
    {"linear_threshold": 0.1, "allocation": "adaptive"},
    {"linear_threshold": 0.1, "criterion": "obs"},
    {"linear_threshold": 0.1, "reconstruction": "least_squares"},
    {"embedding_threshold": 0.0, "vocab_size": 100},
    {"embedding_threshold": 0.0, "criterion": "obs", "reconstruction": "sequential"},
]


def test_options_that_contradict_are_refused(subtests):
    for options in CONTRADICTIONS:
        with subtests.test(**options), pytest.raises(ConfigError):
            ThresholdConfig.from_dict(options)


@pytest.mark.parametrize(
    ("name", "linear"), [("phi-mha", None), ("llama-mqa-tied", 0.5), ("opt-unbiased", 0.5), ("opt-unbiased", None)]
)
def test_zeros_are_counted_once_where_tokens_go_too(name, linear):
    """Zeros of rows and columns of the head lie in the rows of its tokens too; its bias stays, as in the paper."""
    model, tokens = case(name), [3, 9, 17]
    config = ThresholdConfig(linear_threshold=linear, embedding_threshold=0.0)
    found = measured(model) if linear is not None else None
    by_hand = copy.deepcopy(model)
    if found is not None:
        zero_below_(by_hand, found, linear=linear)
    with torch.no_grad():
        by_hand.get_input_embeddings().weight[tokens] = 0
        by_hand.get_output_embeddings().weight[tokens] = 0
    zeros = count_zeros_of_paper(model, found, config, tokens)
    assert 0 < zeros == count_zeros(by_hand) - count_zeros(model) < model.num_parameters()
