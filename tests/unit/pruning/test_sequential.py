"""Sequential pruning: it calls the real layers, keeps what needs no change, and lowers the error."""

from __future__ import annotations

import errno

import pytest
import torch

from hf_context_prune.errors import ConfigError, SaveError
from hf_context_prune.modeling.architectures import layers_of, output_projection, output_weight, spec_of
from hf_context_prune.modeling.geometry import LayerWidths, read_geometry
from hf_context_prune.modeling.patching import finish_forward
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.pruning.calibration.calibrate import calibrate
from hf_context_prune.pruning.criteria import CRITERIA
from hf_context_prune.pruning.reconstruction import least_squares
from hf_context_prune.pruning.sequential import layer_pruner, regression, sub_layer
from hf_context_prune.pruning.sequential import prune as sequential
from hf_context_prune.pruning.sequential.prune import prune_sequentially
from hf_context_prune.pruning.sequential.regression import MomentRegression, RowRegression
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.utils import precision
from hf_context_prune.utils.linalg import FLOOR
from tests.support.tiny import COVERING, VOCABULARY, case

MORE_GROUPS = {"llama-mqa-tied": "llama", "gpt_bigcode-multi-query": "gpt_bigcode"}
WALKED = [*COVERING, "opt"]  # with biases behind an activation that is often zero


def batches(count=4, length=24, *, padded=False):
    generator = torch.Generator().manual_seed(5)
    result = []
    for index in range(count):
        ids = torch.randint(3, VOCABULARY, (3, length), generator=generator)
        batch = {"input_ids": ids}
        if padded:
            mask = torch.ones_like(ids)
            mask[0, length - 3 - index :] = 0
            batch["attention_mask"] = mask
        result.append(batch)
    return result


def widths_of(model, *, neurons=0.75, groups=1):
    geometry = read_geometry(model.config, spec_of(model.config))
    return [
        LayerWidths(int(w.neurons * neurons), w.kv_groups and max(1, w.kv_groups - groups)) for w in geometry.layers
    ]


def final_hidden(model, given):
    """Residual stream after the last layer, unpadded rows of all batches."""
    rows = []
    last = layers_of(model, SPECS[model.config.model_type.removeprefix("context_pruned_")])[-1]
    for batch in given:
        seen: list[torch.Tensor] = []
        handle = last.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        hidden = seen[0].reshape(-1, seen[0].shape[-1])
        mask = batch.get("attention_mask")
        rows.append(hidden if mask is None else hidden[mask.reshape(-1).bool()])
    return torch.cat(rows)


def pruned_by(model, result, given, widths):
    spec = spec_of(model.config)
    plan = PruningPlan(spec.model_type, read_geometry(model.config, spec).layers, result.layers)
    assert plan.widths == tuple(widths)
    return apply_plan(model, plan, reconstruct=result.reconstruct)


@pytest.mark.parametrize(("name", "padded"), [(name, bool(place % 2)) for place, name in enumerate(WALKED)])
def test_the_error_is_lower_than_without_and_the_model_is_left_alone(name, padded):
    model = case(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = batches(padded=padded)
    widths = widths_of(model)
    result = prune_sequentially(model, given, widths, CRITERIA["obs"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert result.num_tokens == sum(int(b.get("attention_mask", torch.ones_like(b["input_ids"])).sum()) for b in given)
    spec = spec_of(model.config)
    plan = PruningPlan(spec.model_type, read_geometry(model.config, spec).layers, result.layers)
    dense = final_hidden(model, given)
    repaired = final_hidden(pruned_by(model, result, given, widths), given)
    sliced = final_hidden(apply_plan(model, plan), given)
    assert (repaired - dense).square().mean() < (sliced - dense).square().mean()


@pytest.mark.parametrize("name", WALKED)
def test_with_equal_streams_and_nothing_removed_the_old_weights_come_back(name):
    """A plan that removes one unit that never fires: everything else must stay as it was."""
    model = case(name)
    spec, geometry = spec_of(model.config), read_geometry(model.config, spec_of(model.config))
    for block in layers_of(model, spec):
        output_weight(output_projection(block, spec, "mlp"))[:, 0] = 0  # neuron 0 feeds nothing
    widths = [LayerWidths(w.neurons - 1, w.kv_groups) for w in geometry.layers]
    result = prune_sequentially(model, batches(), widths, CRITERIA["obs"])
    for index, block in enumerate(layers_of(model, spec)):
        projection = output_projection(block, spec, "mlp")
        assert 0 not in result.layers[index].neurons
        weight, bias = result.outputs[index, "mlp"]
        torch.testing.assert_close(weight, output_weight(projection)[:, 1:], atol=2e-4, rtol=2e-4)
        if projection.bias is not None:
            torch.testing.assert_close(bias, projection.bias.detach(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", WALKED)
def test_the_walk_sees_what_the_smaller_model_does(name, monkeypatch):
    """The pruned stream and the sliced model agree layer by layer, since layers are called, not imitated."""
    model = case(name)
    given = batches(2)
    widths = widths_of(model)
    captured = []
    original = sequential.capture_streams

    def remember(*args, **options):
        captured.extend(original(*args, **options))
        return captured

    monkeypatch.setattr(sequential, "capture_streams", remember)
    result = prune_sequentially(model, given, widths, CRITERIA["wanda"])
    smaller = pruned_by(model, result, given, widths)
    walked = torch.cat([stream.pruned.reshape(-1, stream.pruned.shape[-1]) for stream in captured])
    dense = torch.cat([stream.base.reshape(-1, stream.base.shape[-1]) for stream in captured])
    scale = float(dense.abs().max())
    torch.testing.assert_close(walked / scale, final_hidden(smaller, given) / scale, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dense / scale, final_hidden(model, given) / scale, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "padded"), [(name, bool(place % 2)) for place, name in enumerate(WALKED)])
def test_the_final_states_are_those_of_the_smaller_model(name, padded):
    model, given = case(name), batches(2, padded=padded)
    widths = widths_of(model)
    result = prune_sequentially(model, given, widths, CRITERIA["wanda"])
    smaller = pruned_by(model, result, given, widths)
    states = result.final_states
    assert states.shape == (6, 24, model.config.hidden_size)
    kept = torch.cat([batch.get("attention_mask", torch.ones(3, 24)) for batch in given]).bool()
    expected = final_hidden(smaller, given)
    scale = expected.abs().max()
    torch.testing.assert_close(states[kept] / scale, expected / scale, atol=1e-5, rtol=1e-4)
    for batch, part in zip(given, states.split(3), strict=True):
        seen: list[torch.Tensor] = []
        handle = smaller.get_output_embeddings().register_forward_pre_hook(lambda _, a, seen=seen: seen.append(a[0]))
        with torch.no_grad():
            smaller(**batch)
        handle.remove()
        mask = batch.get("attention_mask", torch.ones(3, 24)).bool()
        finished = finish_forward(smaller, batch["input_ids"], part)
        torch.testing.assert_close(finished[mask], seen[0][mask], atol=1e-4, rtol=1e-4)


def test_there_are_no_final_states_of_batches_that_differ_in_length_or_are_all_padding():
    model = case("llama")
    longer = {"input_ids": torch.full((2, 30), 7)}
    empty = {"input_ids": torch.full((3, 24), 7), "attention_mask": torch.zeros(3, 24, dtype=torch.long)}
    for other in (longer, empty):
        assert prune_sequentially(model, [*batches(2), other], widths_of(model), CRITERIA["l1"]).final_states is None


@pytest.mark.parametrize("name", WALKED)
@pytest.mark.parametrize("narrowed", ["both", "neurons", "kv_groups", "later"])
def test_every_sub_layer_runs_once_per_stream(name, narrowed, monkeypatch):
    """The base stream and the pruned one cost a forward pass each; one in all where nothing is removed yet."""
    model, given = case(MORE_GROUPS.get(name, name)), batches(2)  # MQA has one KV group only
    spec, geometry = spec_of(model.config), read_geometry(model.config, spec_of(model.config))
    widths = widths_of(model, neurons=1 if narrowed == "kv_groups" else 0.75, groups=int(narrowed != "neurons"))
    if narrowed == "later":
        widths[0] = geometry.layers[0]
    layers, products = layers_of(model, spec), []
    paths = (spec.attention_inputs[0].path, spec.mlp_inputs[0])
    modules = [module for layer in layers for path, module in layer.named_modules() if path in paths]
    for kind in set(map(type, modules)):
        own = kind.forward

        def count(module, x, own=own):
            products.append(id(module.weight))
            return own(module, x)

        monkeypatch.setattr(kind, "forward", count)
    prune_sequentially(model, given, widths, CRITERIA["wanda"])
    for index, layer in enumerate(layers):
        streams = 1 if tuple(widths[: index + 1]) == geometry.layers[: index + 1] else 2
        for target, path in zip(("attention", "mlp"), paths, strict=True):
            if target in geometry.layers[index].targets:  # else it is a part of the layer that runs each time
                assert products.count(id(layer.get_submodule(path).weight)) == streams * len(given), path


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_behind_a_norm_the_weights_are_those_of_the_equation(name):
    model, given, layer = case(name), batches(), 1
    widths = widths_of(model, groups=0)
    norm = model.model.layers[layer].post_feedforward_layernorm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.999, 1.0, len(norm.weight)))  # gamma = 1 + weight
    result = prune_sequentially(model, given, widths, CRITERIA["obs"])

    # The model whose earlier layers are as sequential pruning left them, and this one as it was.
    earlier = list(read_geometry(model.config, spec_of(model.config)).layers)
    earlier[:layer] = widths[:layer]
    smaller = pruned_by(model, prune_sequentially(model, given, earlier, CRITERIA["obs"]), given, earlier)
    projection = smaller.model.layers[layer].mlp.down_proj
    weight, kept = projection.weight.detach().double(), list(result.layers[layer].neurons)
    gamma = 1 + norm.weight.detach().double()
    damped = gamma / (gamma**2 + sub_layer.NORM_DAMPING * (gamma**2).mean())
    rows, wanted = [], []
    for batch in given:
        behind, seen = [], []
        handles = [
            model.model.layers[layer].register_forward_hook(lambda _, args, out, to=behind: to.append(out)),
            smaller.model.layers[layer].register_forward_hook(lambda _, args, out, to=behind: to.append(out)),
            projection.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0])),
        ]
        with torch.no_grad():
            model(**batch), smaller(**batch)
        for handle in handles:
            handle.remove()
        x, lacking = seen[0].flatten(0, 1).double(), (behind[0] - behind[1]).flatten(0, 1).double()
        r = ((x @ weight.T).square().mean(-1, keepdim=True) + norm.eps).sqrt()
        u = torch.minimum(torch.ones(()), r / (sub_layer.SINK_SHARE * r.median()))
        rows.append(u * x / r)
        wanted.append(u * damped * lacking)
    X, T = torch.cat(rows), torch.cat(wanted)
    G, C = X.T @ X / len(X), X.T @ T / len(X)
    D = (G.diagonal() + FLOOR * G.diagonal().mean()).diag()

    def solved(ridge, right):
        return torch.linalg.solve((G + ridge * D)[kept][:, kept], right).T

    gone = [i for i in range(weight.shape[1]) if i not in kept]
    own = weight[:, kept] + weight[:, gone] @ solved(0.3, G[kept][:, gone])
    expected = own + solved(layer_pruner.DEFAULT_CORRECTION_RIDGE, C[kept])
    found = result.outputs[layer, "mlp"][0].double()
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    # What channels of almost no gamma lack is left to others.
    changed = (found - own).norm(dim=1)
    assert changed[0] < 0.1 * changed.max()


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_behind_a_norm_the_error_upstream_is_corrected(name, monkeypatch):
    model, given = case(name), batches(12)
    widths = widths_of(model, neurons=0.5)

    def error():
        smaller = pruned_by(model, prune_sequentially(model, given, widths, CRITERIA["obs"]), given, widths)
        return (final_hidden(smaller, given) - final_hidden(model, given)).square().mean()

    corrected = error()
    monkeypatch.setattr(layer_pruner, "CORRECTION_RIDGES", (1e9,))
    assert corrected < 0.95 * error()


def test_behind_a_norm_a_token_with_almost_no_output_has_little_weight():
    model = case("gemma2")
    part = sub_layer.SubLayer(model.model.layers[0], spec_of(model.config), "mlp")
    channels = len(part.post_norm.weight)
    sizes = torch.tensor([1e-4, 1.0, 2.0, 3.0, 4.0])[:, None]
    x, lacking = torch.ones(5, 3), torch.ones(5, channels)
    rows, wanted = part.regression(x, sizes * torch.ones(5, channels), lacking)
    least = sub_layer.SINK_SHARE * 2.0  # of the median
    torch.testing.assert_close(rows[:, 0], 1 / torch.tensor([least, 1.0, 2.0, 3.0, 4.0]))
    shares = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(wanted[:, 0] / wanted[-1, 0], shares, atol=1e-2, rtol=1e-3)


def test_the_first_block_of_a_bias_free_model_is_plain_least_squares():
    """Nothing is upstream of it, so its target is its own dense output."""
    model = case("llama")
    given = batches()
    widths = widths_of(model, groups=0)
    result = prune_sequentially(model, given, widths, CRITERIA["wanda"])
    stats = calibrate(model, given, targets=["mlp"], statistics=frozenset({"gram"})).targets[0, "mlp"]
    weight = model.model.layers[0].mlp.down_proj.weight.detach()
    expected, _ = least_squares(weight, None, list(result.layers[0].neurons), stats, 0.3)
    torch.testing.assert_close(result.outputs[0, "mlp"][0].double(), expected, atol=1e-4, rtol=1e-4)


def test_same_inputs_give_the_same_result():
    model = case("qwen3")
    first, second = (prune_sequentially(model, batches(), widths_of(model), CRITERIA["obs"]) for _ in range(2))
    assert first.layers == second.layers
    for key, (weight, _) in first.outputs.items():
        assert torch.equal(weight, second.outputs[key][0])


def test_text_that_chooses_ridges_is_never_fitted(monkeypatch):
    model, given = case("llama"), batches(12)
    seen = []

    class Watched(MomentRegression):
        def errors(self, ridges, withheld):
            seen.append((self.statistics, ridges, sum(len(x) for x, _ in withheld)))
            return super().errors(ridges, withheld)

    monkeypatch.setattr(regression, "MomentRegression", Watched)
    widths = widths_of(model, groups=0)
    prune_sequentially(model, given, widths, CRITERIA["wanda"])
    fitted, ridges, withheld = seen[0]
    assert ridges == layer_pruner.CORRECTION_RIDGES
    assert withheld == given[-1]["input_ids"].numel()
    stats = calibrate(model, given[:-1], targets=["mlp"], statistics=frozenset({"gram"})).targets[0, "mlp"]
    assert fitted.num_tokens == stats.num_tokens
    torch.testing.assert_close(fitted.second_moment(), stats.second_moment(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi", "gemma2", "gpt2"])
@pytest.mark.parametrize("count", [1, 9])
def test_few_tokens_give_the_same_by_their_rows(name, count, monkeypatch):
    """With fewer tokens than features their products are solved, without a Gram matrix; with validation and without."""
    model = case(name)
    given = [{"input_ids": batch["input_ids"][:1, :2]} for batch in batches(count)]  # 16 tokens are fitted at most
    used = []

    class Watched(RowRegression):
        def solve(self, *args):
            used.append(1)
            return super().solve(*args)

    monkeypatch.setattr(regression, "RowRegression", Watched)
    by_rows = prune_sequentially(model, given, widths_of(model), CRITERIA["obs"])
    assert used
    monkeypatch.setattr(regression, "RowRegression", lambda *, centre: pytest.fail("a Gram matrix was asked for"))
    monkeypatch.setattr(
        layer_pruner,
        "open_regression",
        lambda features, outputs, tokens, device, *, centre: MomentRegression(features, outputs, device, centre=centre),
    )
    by_moments = prune_sequentially(model, given, widths_of(model), CRITERIA["obs"])
    assert by_rows.layers == by_moments.layers
    for key, (weight, bias) in by_rows.outputs.items():
        torch.testing.assert_close(weight, by_moments.outputs[key][0], atol=1e-3, rtol=1e-3)
        if bias is not None:
            torch.testing.assert_close(bias, by_moments.outputs[key][1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_hidden_states_on_disk_give_the_same_bits(name, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, widths = case(name), widths_of(case(name))
    inside = prune_sequentially(model, batches(), widths, CRITERIA["obs"])
    streams = 2 * 4 * inside.final_states.numel()
    for limit in (0, streams, streams + 1000):  # nothing in memory; both streams; and not what layers compute on them
        outside = prune_sequentially(model, batches(), widths, CRITERIA["obs"], memory_limit=limit)
        assert inside.layers == outside.layers
        assert all(torch.equal(weight, outside.outputs[key][0]) for key, (weight, _) in inside.outputs.items())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_disk_without_room_is_told(monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(SaveError, match=r"needs [\d,]+ bytes in .*No space left on device.*TMPDIR"):
        prune_sequentially(case("llama"), batches(), widths_of(case("llama")), CRITERIA["obs"], memory_limit=0)


def test_any_seed_will_do():
    model, widths = case("llama"), widths_of(case("llama"))
    results = [prune_sequentially(model, batches(), widths, CRITERIA["random"], seed=s) for s in (2**62, 2**62, 1)]
    assert results[0].layers == results[1].layers != results[2].layers


def test_the_pace_of_restored_layers_says_nothing_of_the_rest(tmp_path, monkeypatch):
    bars = []
    original = sequential._bar
    monkeypatch.setattr(sequential, "_bar", lambda *args: (bars.append(args), original(*args))[1])
    model, widths = case("llama"), widths_of(case("llama"))
    prune_sequentially(model, batches(), widths, CRITERIA["obs"], state_dir=tmp_path)
    assert bars == [("Pruning layers", 3, 0)]
    next(tmp_path.glob("*/block-0002.safetensors")).unlink()
    prune_sequentially(model, batches(), widths, CRITERIA["obs"], state_dir=tmp_path)
    assert bars[1:] == [("Restoring finished layers", 3, 0), ("Pruning layers", 3, 2)]


@pytest.mark.parametrize(
    ("name", "criterion"), [("llama", "obs"), ("phi", "random"), ("gemma2", "obs"), ("gpt2", "obs"), ("opt", "wanda")]
)
def test_a_killed_walk_goes_on_to_the_same_bits(name, criterion, tmp_path, monkeypatch):
    model, widths = case(name), widths_of(case(name))
    whole = prune_sequentially(model, batches(), widths, CRITERIA[criterion])
    original, pruned = sequential.SequentialPruner.prune, []

    def dies_in_the_last_block(self, index, width):
        pruned.append(index)
        if index == len(widths) - 1 and pruned.count(index) == 1:
            raise KeyboardInterrupt
        return original(self, index, width)

    monkeypatch.setattr(sequential.SequentialPruner, "prune", dies_in_the_last_block)
    with pytest.raises(KeyboardInterrupt):
        prune_sequentially(model, batches(), widths, CRITERIA[criterion], state_dir=tmp_path)
    resumed = prune_sequentially(model, batches(), widths, CRITERIA[criterion], state_dir=tmp_path)
    last = len(widths) - 1
    assert pruned == [*range(len(widths)), last]
    assert resumed.layers == whole.layers
    assert resumed.outputs.keys() == whole.outputs.keys()
    assert torch.equal(resumed.final_states, whole.final_states)
    for key, (weight, bias) in whole.outputs.items():
        assert torch.equal(weight, resumed.outputs[key][0])
        assert bias is None or torch.equal(bias, resumed.outputs[key][1])


def test_blocks_of_other_inputs_or_damaged_ones_are_pruned_again(tmp_path, caplog):
    model, widths = case("llama"), widths_of(case("llama"))
    first = prune_sequentially(model, batches(), widths, CRITERIA["obs"], state_dir=tmp_path)
    other = prune_sequentially(model, batches(3), widths, CRITERIA["obs"], state_dir=tmp_path)
    alone = prune_sequentially(model, batches(3), widths, CRITERIA["obs"])
    assert all(torch.equal(weight, alone.outputs[key][0]) for key, (weight, _) in other.outputs.items())
    assert any(not torch.equal(weight, first.outputs[key][0]) for key, (weight, _) in other.outputs.items())
    for path in tmp_path.glob("*/block-0001.safetensors"):
        path.write_bytes(b"damaged")
    again = prune_sequentially(model, batches(3), widths, CRITERIA["obs"], state_dir=tmp_path)
    assert "block-0001.safetensors is damaged" in caplog.text
    assert all(torch.equal(weight, alone.outputs[key][0]) for key, (weight, _) in again.outputs.items())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match="folder for resuming"):
        prune_sequentially(
            case("llama"), batches(), widths_of(case("llama")), CRITERIA["obs"], state_dir=tmp_path / "file"
        )


def test_fast_products_change_little_and_the_setting_comes_back(monkeypatch):
    model, widths = case("llama"), widths_of(case("llama"), groups=0)
    exact = prune_sequentially(model, batches(), widths, CRITERIA["wanda"])
    before = torch.get_float32_matmul_precision()
    inside = []
    original = sequential.SequentialPruner._choose_and_reconstruct
    monkeypatch.setattr(
        sequential.SequentialPruner,
        "_choose_and_reconstruct",
        lambda *args: (inside.append(torch.get_float32_matmul_precision()), original(*args))[1],
    )
    monkeypatch.setattr(precision, "FAST_PRECISION", "medium")
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: True)
    fast = prune_sequentially(model, batches(), widths, CRITERIA["wanda"])
    assert {before} == {torch.get_float32_matmul_precision(), *inside}  # sums and solvers are never fast
    for key, (weight, _) in exact.outputs.items():
        if exact.layers[key[0]] == fast.layers[key[0]]:
            assert (weight - fast.outputs[key][0]).norm() < 0.1 * weight.norm()


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="do_layer_norm_before=False"):
        prune_sequentially(case("opt-post-norm"), batches(), widths_of(case("opt")), CRITERIA["obs"])
    with pytest.raises(ConfigError, match="gradients"):
        prune_sequentially(case("llama"), batches(), widths_of(case("llama")), CRITERIA["taylor"])
