"""The benchmark of the share of general text on a tiny model: rows, table, and resuming."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, general_share
from hf_context_prune.storage.loading import LoadedModel
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import model_for, shared_tokenizer, write_domains

pytestmark = [pytest.mark.slow, TINY_TEXT]


def test_rows_table_and_resume(tmp_path, monkeypatch):
    write_domains(tmp_path, ("law", "general"))
    tokenizer = shared_tokenizer("smollm2")
    loaded = LoadedModel(model_for("llama", tokenizer, intermediate_size=160), tokenizer, "tiny", None, None)
    monkeypatch.setattr(general_share, "smollm2", lambda: loaded)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    sizes = "--domains law --shares 0 0.125 --removed 0.2 --num-samples 16 --length 32 --eval-tokens 900"
    options = f"--data {tmp_path} --work {tmp_path / 'rows'} {sizes}".split()
    general_share.main(options)
    rows = {row["key"]["share"]: row for row in map(json.loads, (tmp_path / "rows/general_share.jsonl").open())}
    assert set(rows) == {None, 0.0, 0.125}
    for share in (0.0, 0.125):
        assert rows[share]["parameters"] <= 0.8 * rows[None]["parameters"]
        assert len(rows[share]["general"]["nll"]) == len(rows[None]["general"]["nll"])
    assert rows[0.0]["nll"] != rows[0.125]["nll"]
    text = (tmp_path / "RESULTS.md").read_text()
    assert "The default, 0.125: " in text
    monkeypatch.setattr(general_share.SharedDomain, "measure_share", lambda *_: pytest.fail("measured again"))
    general_share.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text
