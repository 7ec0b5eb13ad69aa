"""The vocabulary benchmark on a tiny model: rows, verdicts, the worst source, and resuming."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, vocabulary
from hf_context_prune.storage.loading import LoadedModel
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import model_for, shared_tokenizer, write_domains

pytestmark = [pytest.mark.slow, TINY_TEXT]


@pytest.fixture
def options(tmp_path, monkeypatch):
    write_domains(tmp_path, ("law", "medicine"))
    tokenizer = shared_tokenizer("smollm2")
    loaded = LoadedModel(model_for("llama", tokenizer), tokenizer, "tiny", None, None)
    monkeypatch.setattr(vocabulary, "smollm2", lambda: loaded)
    monkeypatch.setattr(vocabulary, "SPEED_BYTES", 10_000)
    monkeypatch.setattr(vocabulary, "SPEED_TOKENS", 320)
    monkeypatch.setattr(vocabulary, "GOALS", {320: (0.01, {"law": None, "medicine": -1.0})})
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    sizes = "--domains law medicine --sizes 320 256 --num-samples 16 --length 32"
    return f"--data {tmp_path} --work {tmp_path / 'rows'} {sizes} --eval-tokens 900".split()


def test_rows_verdicts_and_resume(options, tmp_path, monkeypatch):
    vocabulary.main(options)
    rows = {tuple(row["key"]["place"]): row for row in map(json.loads, (tmp_path / "rows/vocabulary.jsonl").open())}
    dense = rows["law", "dense"]
    for way, tokens in ((way, tokens) for way in vocabulary.WAYS for tokens in (320, 256)):
        row = rows["law", way, tokens]
        assert dense["parameters"] - row["parameters"] == (392 - tokens) * 2 * 48
        assert [(doc, size) for doc, _, size in row["documents"]] == [
            (doc, size) for doc, _, size in dense["documents"]
        ]
        assert sum(n for _, n, _ in row["documents"]) >= sum(n for _, n, _ in dense["documents"])
    assert rows["law", "refit"]["parameters"] == dense["parameters"]
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("<!-- begin vocabulary -->") == 1
    limit = (sum(rows["law", "frequency", 320]["nll"]) / sum(dense["nll"]) - 1) / 2
    assert f"(goal: at most {limit:.1%}, half of the loss by frequency)" in text
    assert "(goal: at most -100.0%): missed." in text
    assert "256 entries by default, the worst source: law has one source; medicine has one source." in text

    monkeypatch.setattr(vocabulary.VocabularyDomain, "score_model", lambda *_: pytest.fail("measured again"))
    vocabulary.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text
