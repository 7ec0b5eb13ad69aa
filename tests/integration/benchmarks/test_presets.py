"""The benchmark of presets on a tiny model: rows, section, and resuming."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, presets
from hf_context_prune.storage.loading import LoadedModel
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import model_for, shared_tokenizer, write_domains

pytestmark = [pytest.mark.slow, TINY_TEXT]


def test_rows_section_and_resume(tmp_path, monkeypatch):
    write_domains(tmp_path, ("law", "general"))
    tokenizer = shared_tokenizer("smollm2")
    model = model_for("llama", tokenizer, intermediate_size=160, max_position_embeddings=512)
    monkeypatch.setattr(presets, "smollm2", lambda: LoadedModel(model, tokenizer, "tiny", None, None))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    words = f"--data {tmp_path} --work {tmp_path / 'rows'} --num-samples 4 --eval-tokens 900 --presets".split()
    presets.main([*words, "balanced", "compatible"])
    rows = [json.loads(line) for line in (tmp_path / "rows/presets.jsonl").open()]
    assert [row["key"]["preset"] for row in rows] == ["balanced", "compatible"]
    assert all(row["parameters"] <= 0.81 * row["base_parameters"] for row in rows)
    assert rows[1]["native"]
    section = (tmp_path / "RESULTS.md").read_text()
    (line,) = [line for line in section.splitlines() if line.startswith("| `compatible`")]
    change, _, _ = rows[1]["domain"]
    assert f"{100 * change:+.1f} %" in line
    assert line.endswith("plain transformers |")
    monkeypatch.setattr(presets, "measure", lambda *_: pytest.fail("measured again"))
    presets.main([*words, "balanced", "compatible"])
