"""The recovery benchmark on a tiny model: rows, verdicts, ablations, and resuming."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, recovery, recovery_text
from hf_context_prune.storage.loading import LoadedModel
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import model_for, shared_tokenizer, write_domains

pytestmark = [pytest.mark.slow, TINY_TEXT]


@pytest.fixture
def options(tmp_path, monkeypatch):
    write_domains(tmp_path, ("law", "general"))
    tokenizer = shared_tokenizer("smollm2")
    loaded = LoadedModel(model_for("llama", tokenizer, intermediate_size=160), tokenizer, "tiny", None, None)
    monkeypatch.setattr(recovery, "smollm2", lambda: loaded)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    sizes = "--domains law --shares 0.3 --vocabularies 320 --minutes 0.05 --short-minutes 0.02 --steps 12"
    sizes += " --num-samples 16"
    return f"--data {tmp_path} --work {tmp_path / 'rows'} {sizes} --length 32 --eval-tokens 900".split()


def test_rows_tables_and_resume(options, tmp_path, monkeypatch):
    recovery.main(options)
    rows = {tuple(row["key"]["place"]): row for row in map(json.loads, (tmp_path / "rows/recovery.jsonl").open())}
    dense = rows["law", "dense", 0]
    for name in ("one-shot", "ours", "rate", "lora"):
        row = rows["law", name, 0.3]
        assert row["parameters"] <= 0.7 * dense["parameters"]
        assert row["own"]["documents"] == dense["own"]["documents"]
        assert row["general"]["bytes"] == dense["general"]["bytes"]
    assert sum(rows["law", "ours", 0.3]["own"]["nll"]) < sum(rows["law", "one-shot", 0.3]["own"]["nll"])
    assert sum(rows["law", "dense-tuned", 0]["own"]["nll"]) < sum(dense["own"]["nll"])
    gradual, then = rows["law", "gradual", 0.3], rows["law", "then", 0.3]
    assert gradual["parameters"] == then["parameters"]
    assert gradual["history"]["tokens"] == then["history"]["tokens"] == 12 * 4 * 32
    assert 0 < gradual["history"]["listening"] < gradual["history"]["seconds"]
    text = (tmp_path / "RESULTS.md").read_text()
    for part in (
        ": law\n",
        "- 30% removed: ",
        ": ablations (law, ",
        "Listening took",
        "pruned and recovered (default)",
    ):
        assert part in text

    monkeypatch.setattr(recovery.RecoveryDomain, "scored", lambda *_: pytest.fail("measured again"))
    recovery.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_sizes_have_rows_and_a_section_of_their_own(options, tmp_path):
    recovery.main([*options, "--sizes"])
    rows = [json.loads(line)["key"]["place"] for line in (tmp_path / "rows/recovery_sizes.jsonl").open()]
    assert rows == [["law", "dense", 0], ["law", "one-shot", 0.3], ["law", "ours", 0.3], ["law", "dense-tuned", 0]]
    assert not (tmp_path / "rows/recovery.jsonl").exists()
    text = (tmp_path / "RESULTS.md").read_text()
    for part in ("<!-- begin recovery_sizes-law -->", ": law, by size\n", "- 30% removed: ", " --sizes"):
        assert part in text
    assert "ablations" not in text


def test_relative_loss_is_paired():
    dense, row = {"nll": [1.0, 2.0, 3.0]}, {"nll": [1.5, 3.0, 4.5]}
    estimate = recovery_text.relative(dense, row, 0)
    assert (estimate.value, estimate.interval) == (0.5, pytest.approx((0.5, 0.5)))
    assert recovery_text.format_change(estimate) == "+50.0 % [+50.0, +50.0]"
    assert recovery_text.relative({"nll": [2.0]}, {"nll": [1.0]}, 0).interval is None
