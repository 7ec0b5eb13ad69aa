"""Peers from checkouts: their modules come and go, and sizes are hit. Their code itself is tried by hand."""

from __future__ import annotations

import copy
import sys
from dataclasses import make_dataclass

import pytest
import torch

from benchmarks import methods, one_shot
from benchmarks.checkouts import _mask_attention, _sliced_width, _unmask_attention, imported
from benchmarks.common import given, parser
from benchmarks.grasprune import _given, _harden, _walk, put_back
from benchmarks.peers import PeerResult, check_peer
from hf_context_prune.modeling.plan import LayerPlan
from tests.support.tiny import tiny_model


@pytest.fixture
def model():
    return tiny_model("llama").eval()


def test_modules_of_a_checkout_are_forgotten(tmp_path, monkeypatch):
    (tmp_path / "config.py").write_text("import absent\nVALUE = absent.ConfigDict\n")
    ours = type(sys)("config")
    monkeypatch.setitem(sys.modules, "config", ours)
    with imported(tmp_path, ("config",), ("absent",)) as (theirs,):
        assert theirs.VALUE().__dict__ == {}
        assert sys.modules["config"] is theirs
    assert sys.modules["config"] is ours
    assert "absent" not in sys.modules
    assert str(tmp_path) not in sys.path
    (tmp_path / "config.py").write_text("raise OSError('broken')\n")
    with pytest.raises(OSError, match="broken"), imported(tmp_path, ("config",)):
        pytest.fail("imported")
    assert sys.modules["config"] is ours


@pytest.mark.parametrize(("name", "folder"), [("grasprune", "GRASPrune"), ("2ssp", "2SSP"), ("slicegpt", "2SSP")])
def test_a_checkout_that_is_missing_is_named(tmp_path, monkeypatch, model, name, folder):
    monkeypatch.setattr(methods, "METHODS", {})
    methods.add_checkouts(tmp_path, tmp_path)
    with pytest.raises(SystemExit, match=f"{folder} is missing"):
        methods.METHODS[name].peer(model, torch.zeros(1, 8, dtype=torch.long), 1, False)


def test_random_numbers_of_a_checkout_are_seeded_and_those_of_the_caller_go_on(tmp_path):
    (tmp_path / "config.py").write_text("import torch\nVALUE = torch.rand(()).item()\n")
    before = torch.get_rng_state()
    for _ in range(2):
        with imported(tmp_path, ("config",)) as (theirs,):
            assert torch.rand((), generator=torch.Generator().manual_seed(0)).item() == theirs.VALUE
    assert torch.equal(torch.get_rng_state(), before)


def test_the_walk_keeps_a_given_choice(model):
    generator = torch.Generator().manual_seed(0)
    layers = []
    for neurons, groups in ((30, 2), (40, 1), (17, 2)):  # of 40 and 2: some sub-layers keep all
        kept = torch.randperm(40, generator=generator)[:neurons].sort().values
        layers.append(LayerPlan(tuple(kept.tolist()), (1,) if groups == 1 else (0, 1)))
    samples = torch.randint(5, 100, (6, 32), generator=generator)
    smaller, kept = _walk(model, samples, layers, _given(layers))
    assert kept == tuple(layers)
    assert [layer.mlp.down_proj.in_features for layer in smaller.model.layers] == [30, 40, 17]
    assert [layer.self_attn.k_proj.out_features // smaller.config.head_dim for layer in smaller.model.layers] == [
        2,
        1,
        2,
    ]


def test_masks_reach_the_size_though_a_layer_gets_a_group_back(model):
    sizes = [[sum(p.numel() for p in part.parameters()) for part in (x.mlp, x.self_attn)] for x in model.model.layers]
    asked = []

    class Pipeline:
        @staticmethod
        def apply_final_hard_masks(gated, options):
            asked.append(options.keep_ratio)
            for index, layer in enumerate(gated.model.layers):  # the last layer loses both groups, and gets one back
                neurons, groups = torch.arange(40) < round(40 * options.keep_ratio), torch.tensor([True, index < 2])
                layer.mlp.eval_keep_mask, layer.self_attn.eval_keep_mask_kv = neurons, groups

    remove = sizes[0][0] + sizes[2][1]  # more than the masks of the first ratio remove
    options = make_dataclass("Options", ["keep_ratio"])(0.8)
    kept = _harden(model, copy.deepcopy(model), Pipeline, options, remove)
    gone = sum(
        mlp * (1 - len(layer.neurons) / 40) + attention * (1 - len(layer.kv_groups) / 2)
        for (mlp, attention), layer in zip(sizes, kept, strict=True)
    )
    assert len(asked) > 1
    assert abs(gone - remove) <= sizes[0][0] / 40 * 3 / 2  # a neuron of each layer


def test_a_masked_attention_adds_nothing(model):
    ids = torch.arange(5, 13)[None]
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        before = model(ids).logits
        _mask_attention(model, [0, 1, 0], [0, 0, 0])
        masked = model(ids).logits
        _unmask_attention(model, [0, 1, 0], [0, 0, 0])
        assert torch.equal(model(ids).logits, before)
        attention.o_proj.weight.zero_()
        assert torch.allclose(model(ids).logits, masked, atol=1e-6)
    assert not torch.allclose(masked, before, atol=1e-3)


def test_narrowed_projections_go_into_the_stock_layers(model):
    stock = [(layer.mlp, layer.self_attn) for layer in model.model.layers]
    narrow = [torch.nn.Linear(4, 4) for _ in stock]
    for layer, projection in zip(model.model.layers, narrow, strict=True):
        layer.mlp, layer.self_attn = torch.nn.Module(), torch.nn.Module()
        layer.mlp.up_proj = projection
    put_back(model, stock)
    for layer, (mlp, attention), projection in zip(model.model.layers, stock, narrow, strict=True):
        assert layer.mlp is mlp
        assert layer.self_attn is attention
        assert mlp.up_proj is projection


def test_the_width_of_the_stream_counts_shortcuts_and_the_untied_head(model):
    width, step = _sliced_width(model, 0)
    config = model.config
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    rows = 2 * (attention.q_proj.out_features + attention.k_proj.out_features) + 3 * mlp.down_proj.in_features
    layers = config.num_hidden_layers * (rows + 2 * width) * width
    last = (config.hidden_size - width) * (mlp.down_proj.in_features + width)
    left = config.vocab_size * (width + config.hidden_size) + layers + last
    assert abs(left - model.num_parameters()) <= step / 2
    with pytest.raises(SystemExit, match="SliceGPT leaves at least"):
        _sliced_width(model, model.num_parameters() - 100)


def test_a_size_may_be_off_by_half_a_step(model):
    samples = torch.zeros(1, 8, dtype=torch.long)
    assert check_peer(model, PeerResult(model, "p", "c", step=2000), samples, 1000).step == 2000
    with pytest.raises(RuntimeError, match=r"over 0\.5% off"):
        check_peer(model, PeerResult(model, "p", "c", step=1000), samples, 1000)


def test_the_option_adds_methods_and_is_no_part_of_the_command(tmp_path, monkeypatch, capsys):
    known = dict(methods.METHODS)
    monkeypatch.setattr(methods, "METHODS", known)
    monkeypatch.setattr(one_shot, "METHODS", known)
    with pytest.raises(SystemExit):
        one_shot.main(["--data", str(tmp_path), "--methods", "grasprune"])
    assert "invalid choice: 'grasprune'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        one_shot.main(["--data", str(tmp_path), "--peers", str(tmp_path), "--methods", "grasprune", "--sizes", "x"])
    assert "invalid choice: 'x'" in capsys.readouterr().err
    assert known["grasprune"].label == "GRASPrune"
    options = parser("")
    options.add_argument("--peers", type=type(tmp_path))
    args = options.parse_args(["--data", str(tmp_path), "--peers", str(tmp_path), "--seed", "3"])
    assert given(options, args) == " --seed 3"
