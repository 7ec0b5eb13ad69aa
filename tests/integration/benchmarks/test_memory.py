"""The benchmark of memory on a small shape: a checkpoint in shards, processes under a limit, a table, and resuming."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import common, memory
from hf_context_prune.storage.loading import load_model
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import shared_tokenizer, write_domains

pytestmark = [pytest.mark.nightly, TINY_TEXT]


def test_row_section_and_resume(tmp_path, monkeypatch):
    write_domains(tmp_path, ("medicine",))
    monkeypatch.setattr(memory, "smollm2", lambda: SimpleNamespace(tokenizer=shared_tokenizer("smollm2")))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    sizes = "--shape tiny --limit 2GiB --num-samples 8 --length 32 --eval-tokens 300"
    options = f"--data {tmp_path} --work {tmp_path / 'rows'} {sizes}".split()
    memory.main(options)
    (row,) = map(json.loads, (tmp_path / "rows/memory.jsonl").open())
    checkpoint = load_model(tmp_path / "rows/models/memory-tiny").model
    assert row["checkpoint"] > 2 * checkpoint.num_parameters()
    assert 0.2 <= row["prune"]["removed"] < 0.21
    assert row["result"] < 0.82 * row["checkpoint"]
    assert row["prune"]["class"] == "LlamaForCausalLM"
    assert 0 < row["prune"]["peak"] < 2 * 2**30
    assert row["prune"]["growth"] < 0.1 * 2**30
    assert row["open"]["nats"] > 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| prune |" in text
    assert "20.0% of all\nparameters removed (uniform widths)" in text
    monkeypatch.setattr(memory, "measure", lambda *_: pytest.fail("measured again"))
    memory.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text
