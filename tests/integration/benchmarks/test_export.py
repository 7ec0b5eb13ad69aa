"""The benchmark of exports on tiny models: table, and resuming."""

from __future__ import annotations

import pytest

from benchmarks import common
from benchmarks import export as benchmark
from hf_context_prune.storage.loading import load_model
from tests.support.export_folders import save
from tests.support.tiny_domain import write_domains

pytestmark = pytest.mark.slow


def test_the_table_has_every_runtime_and_resumes(tmp_path, monkeypatch):
    write_domains(tmp_path, ("law",))
    dense = load_model(save(tmp_path / "dense"), device="cpu")
    monkeypatch.setattr(benchmark, "smollm2", lambda: dense)
    monkeypatch.setattr(benchmark, "EXPORTS", (("quanto", "int8"), ("gguf", "f16")))
    monkeypatch.setattr(benchmark, "BASE_EXPORTS", (("quanto", "int8"),))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    folders = ["--uniform", tmp_path / "dense", "--variable", save(tmp_path / "variable", variable=True)]
    sizes = ["--tokens", 200, "--new-tokens", 4, "--rounds", 1, "--domain", "law"]
    options = [str(word) for word in ("--data", tmp_path, "--work", tmp_path / "rows", *folders, *sizes)]
    benchmark.main(options)
    text = (tmp_path / "RESULTS.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("| base", "| uniform", "| variable"))]
    assert [line.split("|")[1].strip() for line in lines] == [
        *("base: transformers", "base: quanto int8"),
        *("uniform: transformers", "uniform: quanto int8", "uniform: gguf f16"),
        *("variable: transformers", "variable: quanto int8", "variable: gguf f16"),
    ]
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured again"))
    benchmark.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text
