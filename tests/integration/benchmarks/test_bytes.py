"""The benchmark of loss by bytes on a tiny model: weights are read back, rows, fronts, picture, and resuming."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bytes as loss_by_bytes
from benchmarks import bytes_text, common
from hf_context_prune.export import gguf
from hf_context_prune.storage.loading import LoadedModel
from tests.support.export_folders import save
from tests.support.marks import TINY_TEXT
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_domain import model_for, shared_tokenizer, write_domains

pytestmark = [pytest.mark.slow, TINY_TEXT]


@pytest.mark.parametrize("variable", [False, True])
def test_a_file_gives_back_its_weights(variable, tmp_path):
    from hf_context_prune import load_pruned

    model = load_pruned(save(tmp_path / "model", variable=variable))
    before = {name: value.clone() for name, value in model.named_parameters()}
    (tmp_path / "file").mkdir()
    gguf.write(LoadedModel(model, tiny_tokenizer(), "tiny", None, None), tmp_path / "file", "bf16")
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    loss_by_bytes.read_back(tmp_path / "file" / gguf.FILE_NAME, model)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=1e-2, atol=1e-3)


def test_rows_table_picture_and_resume(tmp_path, monkeypatch):
    write_domains(tmp_path, ("medicine", "general"))
    tokenizer = shared_tokenizer("smollm2")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    loaded = LoadedModel(model_for("llama", tokenizer, intermediate_size=160, **sizes), tokenizer, "tiny", None, None)
    monkeypatch.setattr(loss_by_bytes, "smollm2", lambda: loaded)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    options = (
        f"--data {tmp_path} --work {tmp_path / 'rows'} --quick --minutes 0.05 --length 32 --eval-tokens 600".split()
    )
    loss_by_bytes.main(options)
    rows = [json.loads(line) for line in (tmp_path / "rows/bytes.jsonl").open()]
    by = {(row["key"]["form"], row["key"]["dtype"]): row for row in rows if row["key"]["what"] == "loss"}
    speeds = [row["turns"] for row in rows if row["key"]["what"] == "speed"]
    assert len(by) == len(speeds) == 9
    assert len(rows) == 18
    assert all(speed > 0 for turns in speeds for turn in turns for speed in turn)
    for form in ("base", "default", "healed"):
        assert by[form, "f16"]["bytes"] > by[form, "q8_0"]["bytes"] > by[form, "q4_k_m"]["bytes"]
        assert len({len(by[form, dtype]["general"]["nll"]) for dtype in loss_by_bytes.QUICK}) == 1
    assert by["default", "f16"]["bytes"] < by["base", "f16"]["bytes"]
    assert by["base", "f16"]["domain"]["nll"] != by["base", "q4_k_m"]["domain"]["nll"]
    text = (tmp_path / "RESULTS.md").read_text()
    assert "30% gone, trained, q4_k_m" in text
    assert "smaller than the base model in q4_k_m" in text
    assert (tmp_path / "bytes_quick.png").stat().st_size > 10_000
    monkeypatch.setattr(loss_by_bytes, "write_file", lambda *_: pytest.fail("measured again"))
    loss_by_bytes.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_the_front_holds_what_nothing_beats():
    def row(size, loss, speed):
        return {"bytes": size, "turns": [[10.0, speed]], "domain": {"nll": [loss]}, "general": {"nll": [loss]}}

    rows = {
        ("a", "base", 0.0, "f16"): row(100, 1.0, 10),
        ("a", "base", 0.0, "q4_k_m"): row(50, 1.2, 30),
        ("a", "default", 0.3, "q8_0"): row(45, 1.1, 20),
        ("a", "default", 0.3, "q4_k_m"): row(40, 1.3, 40),
        ("b", "base", 0.0, "f16"): row(1, 0.1, 99),
    }
    keys = bytes_text.keys_of(rows, "a")
    assert bytes_text.front(rows, keys, "bytes") == [
        ("a", "default", 0.3, "q4_k_m"),
        ("a", "default", 0.3, "q8_0"),
        ("a", "base", 0.0, "f16"),
    ]
    assert bytes_text.front(rows, keys, "time")[0] == ("a", "default", 0.3, "q4_k_m")
    assert "Of the 2 files of the front that are smaller than the base model in q4_k_m, 2 are pruned" in (
        bytes_text.verdict(rows, "a")
    )
