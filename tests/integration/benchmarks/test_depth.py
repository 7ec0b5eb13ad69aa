"""The benchmark of whole layers on a tiny model. The code of peers is tried by hand; here their choice is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import common, depth
from hf_context_prune.storage.loading import LoadedModel
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import model_for, shared_tokenizer, write_domains

CHOSEN = {
    "shortgpt": ([False, True, False, True, False, False],) * 2,
    "window": ([False, False, True, True, False, False],) * 2,
    "blockpruner": ([True, True, False, False, False, False], [False, False, False, True, True, False]),
}


@pytest.mark.slow
@TINY_TEXT
def test_rows_tables_and_resume(tmp_path, monkeypatch):
    write_domains(tmp_path, ["medicine"])
    tokenizer = shared_tokenizer("smollm2")
    loaded = LoadedModel(model_for("llama", tokenizer, num_hidden_layers=6), tokenizer, "tiny", None, None)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    monkeypatch.setattr(depth, "smollm2", lambda: loaded)
    monkeypatch.setattr(depth, "depth_masks", lambda _, name, *rest: (*CHOSEN[name], f"{name}(model)"))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    sizes = (
        "--domains medicine --shares 0.34 --num-samples 16 --length 32 --eval-tokens 900 --context 64 --new-tokens 2"
    )
    sizes += " --rounds 2 --narrower 0.5"
    options = f"--data {tmp_path} --work {tmp_path / 'rows'} --peers {tmp_path} {sizes}".split()
    depth.main(options)
    rows = list(map(json.loads, (tmp_path / "rows/depth.jsonl").open()))
    lost = [row for row in rows if "runtime" not in row["key"]]
    losses = {row["key"].get("method", ""): row for row in lost if row["key"].get("share") != 0.5}
    (narrower,) = [row for row in lost if row["key"].get("share") == 0.5]
    assert narrower["key"]["method"] == depth.WIDTHS
    assert narrower["parameters"] < losses[depth.WIDTHS]["parameters"]
    assert losses.keys() == {"", *depth.METHODS}
    dense = losses[""]["parameters"]
    layer = sum(parameter.numel() for parameter in loaded.model.model.layers[0].parameters())
    for method in (depth.WHOLE, "shortgpt", "window"):
        assert losses[method]["parameters"] == dense - 2 * layer
        assert len(losses[method]["gone"]) == 2
    assert losses[depth.PATCH]["parameters"] == dense - 2 * layer + loaded.model.config.hidden_size**2
    assert losses[depth.PATCH]["nll"] != losses["window"]["nll"]
    assert losses["blockpruner"]["parameters"] == pytest.approx(dense - 2 * layer, rel=0.01)
    assert losses[depth.WIDTHS]["parameters"] <= dense - 2 * layer
    assert sum("runtime" in row["key"] for row in rows) == (len(depth.OWN) + 1) * len(depth.RUNTIMES)
    text = (tmp_path / "RESULTS.md").read_text()
    for part in ("| medicine | 34% | ShortGPT |", "2 attentions, 2 MLPs", "times as fast", "layers 2, 3"):
        assert part in text
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    monkeypatch.setattr(depth.DepthDomain, "make", lambda *_: pytest.fail("measured again"))
    depth.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_the_linear_map_is_that_of_least_squares():
    tokenizer = shared_tokenizer("smollm2")
    model = model_for("llama", tokenizer, num_hidden_layers=4)
    domain = depth.DepthDomain(
        Path(), lambda: LoadedModel(model, tokenizer, "tiny", None, None), None, "x", targets=("mlp",)
    )
    domain.samples = torch.randint(3, 90, (24, 16), generator=torch.Generator().manual_seed(0))
    matrix = domain.linear_map(1, 2)
    states = model(domain.samples, output_hidden_states=True).hidden_states
    before, behind = (state.detach().flatten(0, 1) for state in (states[1], states[3]))
    expected = torch.linalg.lstsq(before.double(), behind.double()).solution.float()
    torch.testing.assert_close(before @ matrix, before @ expected, atol=1e-3, rtol=1e-3)
