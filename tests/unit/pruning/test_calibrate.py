"""Statistics against a brute force, what may not change them, and how calibration fails."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load, save_file
from torch import nn

from hf_context_prune.errors import DataError, NumericsError
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.calibrate import calibrate, check_weights_finite
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.calibration.statistics import CalibrationStats
from tests.support.tiny import COVERING, VOCABULARY, case, tiny_model, tokens

ALL = frozenset({"gram", "taylor"})
GRAM = frozenset({"gram"})
MOMENTS = ("sum", "sum_abs", "sum_squares")


def spec_of_model(model):
    return SPECS[model.config.model_type]


def projections(model):
    view = ModelView.of(model)
    return {place: view.output_projection(*place) for place in view.places()}


def inputs_by_hand(model, batches, **kwargs):
    """{(layer, target): X [tokens, features]} in float64, from separate hooks."""
    seen = {key: [] for key in projections(model)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, key=key: seen[key].append(args[0].detach().double()))
        for key, module in projections(model).items()
    ]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids, **kwargs)
    for handle in handles:
        handle.remove()
    return {key: torch.cat([x.reshape(-1, x.shape[-1]) for x in parts]) for key, parts in seen.items()}


def check_close(got, expected, *, tolerance=1e-5):
    """Of two statistics; relative to the largest number, since sums cancel."""
    assert (expected is None) == (got is None)
    if expected is not None:
        largest = float(expected.abs().max())
        torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=tolerance * largest)


def check_same(got, expected, *, names=(*MOMENTS, "gram", "taylor"), tolerance=1e-5):
    assert set(got.targets) == set(expected.targets)
    for key, stats in got.targets.items():
        assert stats.num_tokens == expected.targets[key].num_tokens
        other = expected.targets[key]
        for name in names:
            if name == "gram" and stats.gram is not None:
                for centred in (False, True):
                    check_close(
                        stats.second_moment(centred=centred),
                        other.second_moment(centred=centred),
                        tolerance=max(tolerance, 1e-6) if tolerance else 0,
                    )
            else:
                check_close(getattr(stats, name), getattr(other, name), tolerance=tolerance)


# What is summed


@pytest.mark.parametrize("name", [*COVERING, "opt"])
def test_statistics_equal_a_brute_force(name):
    model = case(name)
    ids = tokens(5)
    batches = [ids[:2], ids[2:4], ids[4:]]
    stats = calibrate(model, [{"input_ids": batch} for batch in batches], statistics=GRAM)
    assert (stats.num_samples, stats.num_tokens) == (5, 100)
    expected = inputs_by_hand(model, batches)
    assert set(stats.targets) == set(expected)
    for key, X in expected.items():
        got = stats.targets[key]
        assert got.num_tokens == len(X) == 100
        check_close(got.sum, X.sum(dim=0), tolerance=1e-6)
        check_close(got.sum_abs, X.abs().sum(dim=0), tolerance=1e-6)
        check_close(got.sum_squares, X.square().sum(dim=0), tolerance=1e-6)
        check_close(got.second_moment() * len(X), X.T @ X, tolerance=1e-6)
        check_close(got.second_moment(centred=True), torch.cov(X.T, correction=0), tolerance=1e-5)
        check_close(got.mean, X.mean(dim=0), tolerance=1e-6)
        check_close(got.variance, X.var(dim=0, correction=0), tolerance=1e-5)
        assert got.taylor is None
        assert {getattr(got, name).dtype for name in MOMENTS} == {torch.float64}


def test_only_what_is_asked_for_is_collected(model):
    stats = calibrate(model, [{"input_ids": tokens()}], targets=["attention"])
    assert set(stats.targets) == {(0, "attention"), (1, "attention"), (2, "attention")}
    assert all(value.gram is None and value.taylor is None for value in stats.targets.values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bfloat16_models_are_summed_in_higher_precision(name):
    model = case(name).bfloat16()
    batches = [tokens(8, 64, seed=seed) for seed in range(6)]  # enough that bfloat16 sums would stop growing
    stats = calibrate(model, [{"input_ids": batch} for batch in batches], statistics=GRAM)
    for key, X in inputs_by_hand(model, batches).items():
        got = stats.targets[key]
        assert got.gram.dtype == torch.float32
        check_close(got.sum_abs, X.abs().sum(dim=0), tolerance=1e-6)
        check_close(got.sum_squares, X.square().sum(dim=0), tolerance=1e-6)
        check_close(got.second_moment() * len(X), X.T @ X, tolerance=1e-5)


def test_batches_of():
    blocks_of_text = tokens(7, 20)
    batches = batches_of(blocks_of_text, batch_tokens=70)
    assert [batch["input_ids"].shape[0] for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), blocks_of_text)
    assert len(batches_of(blocks_of_text, batch_tokens=5)) == 7


# Padding


def padded(texts, side, *, length):
    ids, mask = torch.zeros(len(texts), length, dtype=torch.long), torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(length - len(text), length) if side == "left" else slice(0, len(text))
        ids[row, where], mask[row, where] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", [*COVERING, "mistral", "opt-post-norm"])
def test_padding_changes_nothing(name, subtests):
    model = case(name)
    texts = [tokens(1, length, seed=length)[0] for length in (20, 7, 1)]
    alone = calibrate(model, [{"input_ids": text[None]} for text in texts], statistics=GRAM)
    for side in ("left", "right"):
        with subtests.test(side):
            together = calibrate(model, [padded(texts, side, length=24)], statistics=GRAM)
            assert (together.num_samples, together.num_tokens) == (3, 28)
            check_same(together, alone)


@pytest.mark.parametrize("name", [*COVERING, "opt"])
def test_padding_changes_no_gradient(name, subtests):
    model = case(name)
    ids = tokens(2, 12)
    plain = calibrate(model, [{"input_ids": ids}], statistics=ALL)
    for side in ("left", "right"):
        with subtests.test(side):
            check_same(calibrate(model, [padded(ids, side, length=17)], statistics=ALL), plain, tolerance=1e-4)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    check_same(calibrate(model, [whole], statistics=ALL), plain, tolerance=1e-6)


def test_batches_of_padding_alone_count_nothing(model):
    empty = {"input_ids": torch.zeros(2, 9, dtype=torch.long), "attention_mask": torch.zeros(2, 9, dtype=torch.long)}
    text = {"input_ids": tokens()}
    got = calibrate(model, [empty, text, empty], statistics=ALL)
    assert got.num_samples == 4
    check_same(got, calibrate(model, [text], statistics=ALL), tolerance=0)


def test_texts_of_one_token_have_activations_but_no_gradients(model):
    one, text = {"input_ids": tokens(2, 1)}, {"input_ids": tokens()}
    got = calibrate(model, [one, text], statistics=ALL)
    check_same(got, calibrate(model, [one, text], statistics=GRAM), names=(*MOMENTS, "gram"))
    for key, stats in calibrate(model, [text], statistics=ALL).targets.items():
        check_close(got.targets[key].taylor, stats.taylor)
    with pytest.raises(DataError, match="no text has two tokens"):
        calibrate(model, [one], statistics=ALL)


# Bad input


def hooks_left(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_nothing_to_calibrate_on(model, subtests):
    none = torch.zeros(2, 9, dtype=torch.long)
    for name, batches in (
        ("no batch", []),
        ("padding", [{"input_ids": none, "attention_mask": none}]),
        ("no row", [{"input_ids": none[:0]}]),
        ("no column", [{"input_ids": none[:, :0]}]),
    ):
        for statistics in (frozenset(), ALL):
            with subtests.test(name, statistics=statistics):
                with pytest.raises(DataError, match="nothing to calibrate on"):
                    calibrate(model, batches, statistics=statistics)
                assert hooks_left(model) == 0


def test_token_ids_beyond_the_embedding(model, subtests):
    for bad in (VOCABULARY, 5000, -1):
        with subtests.test(bad):
            ids = tokens()
            ids[2, 3] = bad
            with pytest.raises(DataError, match=rf"Batch 1\b.* {bad}\b.* {VOCABULARY} rows") as error:
                calibrate(model, [{"input_ids": tokens()}, {"input_ids": ids}])
            assert f"0 to {VOCABULARY - 1}" in str(error.value)
            assert hooks_left(model) == 0


def test_weights_that_are_not_finite(model):
    for bad in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight[3, 4] = bad
        with pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight .*NaN or Inf"):
            calibrate(model, [{"input_ids": tokens()}])


def test_weights_of_any_precision(model, subtests):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model.to(dtype)
        weight = model.lm_head.weight
        was = weight[-1, -1].item()
        for bad in (math.nan, math.inf, -math.inf):
            with subtests.test(dtype=dtype, bad=bad), torch.no_grad():
                weight[-1, -1] = was
                check_weights_finite(model)
                weight[-1, -1] = bad
                with pytest.raises(NumericsError, match="NaN or Inf"):
                    check_weights_finite(model)
                weight[-1, -1] = was


def test_a_weight_without_values_is_finite():
    check_weights_finite(torch.nn.ParameterList([torch.nn.Parameter(torch.empty(0, 4))]))


def test_large_weights_are_finite(model):
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)  # a float32 sum of these overflows
    check_weights_finite(model)


@pytest.mark.parametrize("statistics", [frozenset(), ALL], ids=["moments", "taylor"])
def test_activations_that_overflow(model, statistics):
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            model.model.layers[1].mlp.get_submodule(name).weight.mul_(1e25)
    padding = padded([torch.tensor([], dtype=torch.long)], "left", length=8)
    with pytest.raises(NumericsError, match=r"NaN or Inf .* layer 1 \(mlp\), batch 1\."):
        calibrate(model, [padding, {"input_ids": tokens()}], statistics=statistics)
    assert hooks_left(model) == 0


def test_the_batch_with_the_nan_is_named(model):
    calls = []

    def nan_in_the_third(module, args, output):
        calls.append(module)
        return output * math.nan if len(calls) == 3 else output

    handle = model.model.layers[2].self_attn.v_proj.register_forward_hook(nan_in_the_third)
    with pytest.raises(NumericsError, match=r"layer 2 \(attention\), batch 2\."):
        calibrate(model, [{"input_ids": tokens(seed=seed)} for seed in range(5)])
    assert len(calls) == 3  # it stops there
    handle.remove()
    assert hooks_left(model) == 0


def test_a_nan_in_a_padded_position_does_not_matter(model):
    """What attention makes of a row without a single allowed key is nobody's business."""
    batch = padded([tokens(1, 5)[0], tokens(1, 8)[0]], "left", length=8)
    expected = calibrate(model, [batch], statistics=GRAM)
    handle = model.model.layers[2].mlp.up_proj.register_forward_hook(
        lambda _, args, output: output.masked_fill(batch["attention_mask"][..., None] == 0, math.nan)
    )
    check_same(calibrate(model, [batch], statistics=GRAM), expected, tolerance=0)
    handle.remove()


# The model is as it was


@pytest.mark.parametrize(("statistics", "fails"), [(GRAM, False), (ALL, False), (ALL, True)])
def test_the_model_is_left_as_it_was(statistics, fails):
    model = tiny_model("gpt2", resid_pdrop=0.5)
    model.train()
    model.transformer.h[1].eval()  # one layer frozen by its owner
    frozen = {"transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        parameter.grad = None if name in frozen else torch.full_like(parameter, 0.5)
    before = {name: (parameter.detach().clone(), parameter.grad) for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    batches = [{"input_ids": tokens()}, {"input_ids": tokens() + (VOCABULARY if fails else 0)}]
    if fails:
        with pytest.raises(DataError):
            calibrate(model, batches, statistics=statistics)
    else:
        calibrate(model, batches, statistics=statistics)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert hooks_left(model) == 0
    for name, parameter in model.named_parameters():
        value, grad = before[name]
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == (name not in frozen)
        assert parameter.grad is grad
        assert grad is None or bool((grad == 0.5).all())


def test_evaluation_mode_is_used_whatever_the_mode():
    model = tiny_model("gpt2", resid_pdrop=0.5)
    batch = [{"input_ids": tokens()}]
    expected = calibrate(model, batch, statistics=ALL)
    check_same(calibrate(model.train(), batch, statistics=ALL), expected, tolerance=0)


def test_gradients_work_under_no_grad_and_with_a_frozen_model(model):
    batch = [{"input_ids": tokens()}]
    expected = calibrate(model, batch, statistics=ALL)
    model.requires_grad_(False)
    with torch.no_grad():
        check_same(calibrate(model, batch, statistics=ALL), expected, tolerance=0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# Saved statistics


def test_save_and_load(model, tmp_path):
    for statistics in (frozenset(), GRAM, ALL):
        stats = calibrate(model, [{"input_ids": tokens()}], statistics=statistics)
        stats.save(tmp_path / "stats.safetensors")
        again = CalibrationStats.load(tmp_path / "stats.safetensors")
        assert (again.num_samples, again.num_tokens) == (stats.num_samples, stats.num_tokens)
        check_same(again, stats, tolerance=0)
        for key, value in again.targets.items():
            assert value.sum.dtype == torch.float64
            assert (value.gram is None) == ("gram" not in statistics)
            assert (value.taylor is None) == (stats.targets[key].taylor is None)


def test_loaded_statistics_do_not_depend_on_their_file(model, tmp_path):
    path = tmp_path / "stats.safetensors"
    stats = calibrate(model, [{"input_ids": tokens()}], statistics=GRAM)
    stats.save(path)
    again = CalibrationStats.load(path)
    again.save(path)  # over the very file
    check_same(again, stats, tolerance=0)
    check_same(CalibrationStats.load(path), stats, tolerance=0)


def test_damaged_statistics(model, tmp_path):
    path = tmp_path / "stats.safetensors"
    calibrate(model, [{"input_ids": tokens()}]).save(path)
    whole = path.read_bytes()
    tensors = load(whole)

    def refused():
        with pytest.raises(DataError, match=r"stats\.safetensors is not a statistics file"):
            CalibrationStats.load(path)

    for bad in (b"", whole[:100], whole[: len(whole) // 2], b"\x00" * 64, b"not a file of tensors"):
        path.write_bytes(bad)
        refused()
    header = {"num_samples": 1, "num_tokens": 80, "counts": {"0.mlp": 80}}
    headers = [
        *({key: value for key, value in header.items() if key != gone} for gone in header),
        header | {"counts": {"mlp": 80}},
        header | {"counts": {"9.mlp": 80}},
        header | {"counts": [80]},
        [],
        {},
    ]
    for metadata in (None, *({"calibration_stats": text} for text in ("{", *map(json.dumps, headers)))):
        save_file(tensors, path, metadata=metadata)
        refused()
    del tensors["0.mlp.sum"]
    save_file(tensors, path, metadata={"calibration_stats": json.dumps(header)})
    refused()
    path.unlink()
    refused()


def test_a_forward_that_fails_leaves_no_hook(model, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(nn.Linear, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate(model, [{"input_ids": tokens()}])
    assert hooks_left(model) == 0


def test_a_mean_that_dwarfs_the_spread_does_not_drown_the_covariance():
    """X^T X in float32 has seven digits; a mean of 3000 standard deviations would leave none for the covariance."""
    model = tiny_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias += 3000
    ids = tokens(16)
    stats = calibrate(model, [{"input_ids": ids}], targets=["mlp"], statistics=GRAM)
    X = inputs_by_hand(model, [ids])[0, "mlp"]
    check_close(stats.targets[0, "mlp"].second_moment(centred=True), torch.cov(X.T, correction=0), tolerance=1e-3)
