"""The benchmark of decoding on a tiny model: every runtime beside its base, bytes that are counted, and resuming."""

from __future__ import annotations

import pytest

from benchmarks import common
from benchmarks import decoding as benchmark
from hf_context_prune.storage.loading import load_model
from tests.support.export_folders import save
from tests.support.tiny_domain import write_domains

pytestmark = pytest.mark.nightly


def test_the_table_has_every_runtime_and_resumes(tmp_path, monkeypatch):
    write_domains(tmp_path, ("medicine",))
    dense = load_model(save(tmp_path / "dense"), device="cpu")
    monkeypatch.setattr(benchmark, "MODELS", {"smollm2-135m": lambda: dense})
    monkeypatch.setattr(benchmark, "VOCABULARY", 296)
    monkeypatch.setattr(benchmark, "REMOVED", 0.2)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    words = ("--data", tmp_path, "--work", tmp_path / "rows", "--contexts", 8, 12, "--batches", 1, 3)
    words += ("--new-tokens", 4, "--rounds", 1, "--cases", "uniform:8", "variable:1", "--whole-grid", "uniform:8")
    options = [str(word) for word in words]
    benchmark.main(options)
    text = (tmp_path / "RESULTS.md").read_text()
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| smollm2")]
    assert len(lines) == 5 * 5
    assert all(float(line[6]) > 1 and float(line[9]) > 1 for line in lines)  # bytes and work are fewer
    monkeypatch.setattr(benchmark, "compare", lambda *_: pytest.fail("measured again"))
    benchmark.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text
