"""Peers from checkouts: their modules come and go, and sizes are hit. Their code itself is tried by hand."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import methods, one_shot
from benchmarks.checkouts import _imported, _mask_attention, _put_back, _sliced_width, _unmask_attention, checkout_peers
from benchmarks.common import given, parser
from benchmarks.peers import PeerResult, check_peer
from tests.support.tiny import tiny_model


@pytest.fixture
def model():
    return tiny_model("llama").eval()


def test_modules_of_a_checkout_are_forgotten(tmp_path, monkeypatch):
    (tmp_path / "config.py").write_text("import absent\nVALUE = absent.ConfigDict\n")
    ours = type(sys)("config")
    monkeypatch.setitem(sys.modules, "config", ours)
    with _imported(tmp_path, ("config",), ("absent",)) as (theirs,):
        assert theirs.VALUE().__dict__ == {}
        assert sys.modules["config"] is theirs
    assert sys.modules["config"] is ours
    assert "absent" not in sys.modules
    assert str(tmp_path) not in sys.path
    (tmp_path / "config.py").write_text("raise OSError('broken')\n")
    with pytest.raises(OSError, match="broken"), _imported(tmp_path, ("config",)):
        pytest.fail("imported")
    assert sys.modules["config"] is ours


def test_a_checkout_that_is_missing_is_named(tmp_path, model):
    peers = checkout_peers(tmp_path)
    assert set(peers) == {"grasprune", "2ssp", "slicegpt"}
    with pytest.raises(SystemExit, match="GRASPrune is missing"):
        peers["grasprune"](model, torch.zeros(1, 8, dtype=torch.long), 1, False)


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
    _put_back(model, stock)
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
