"""The benchmark of the proof on a tiny model: cross-domain matrix, grid, time, and resuming."""

import json
import random

import pytest

from benchmarks import common, proof
from hf_context_prune.storage.loading import LoadedModel
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import model_for, shared_tokenizer, write_domains
from tests.support.tiny_tokenizers import WORDS

pytestmark = [pytest.mark.slow, TINY_TEXT]


@pytest.fixture
def options(tmp_path, monkeypatch):
    write_domains(tmp_path, ("law", "general"))
    draw = random.Random(3)
    for name in ("law", "general"):
        rows = [
            {
                "id": str(i),
                "question": draw.choice(WORDS),
                "choices": draw.sample(WORDS, 4),
                "answer": i % 4,
                "source": "s",
            }
            for i in range(8)
        ]
        (tmp_path / name / "mcq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = shared_tokenizer("smollm2")
    loaded = LoadedModel(model_for("llama", tokenizer), tokenizer, "tiny", None, None)
    monkeypatch.setattr(proof, "smollm2", lambda: loaded)
    monkeypatch.setattr(proof, "GRID", (0.3,))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    sizes = "--domains law general --shares 0.1 --grids law --num-samples 8 --grid-samples 4 --length 32 --steps 2"
    more = "--question-shares 0.1 --mix-domain law --mixes 0.5 --questions 6 --grid-questions 4 --timed-bytes 500"
    return f"--data {tmp_path} --work {tmp_path / 'rows'} {sizes} {more} --eval-tokens 900".split()


def test_sections_and_resume(options, tmp_path, monkeypatch):
    proof.main(options)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## The proof: the domain matrix at 10% of all parameters" in text
    for part in ("Does the context matter?", "| calibrated on | on law |"):
        assert part in text
    assert "## The proof: the paper's grid, law" in text
    assert text.count("\n| law | 50 % |") == 1
    assert "500 bytes" not in text
    assert "6 questions, both models" in text
    for name in ("matrix", "mix"):
        assert (tmp_path / f"proof-0.1-{name}.png").is_file()
        assert f"](proof-0.1-{name}.png)" in text
    for name in ("prune_model", "score"):
        monkeypatch.setattr(f"hf_context_prune.pipelines.matrix.{name}", None)
        monkeypatch.setattr(f"hf_context_prune.pipelines.sweep.{name}", None)
    proof.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text
