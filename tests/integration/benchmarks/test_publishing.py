"""The benchmarks of publishing on a tiny model: cards, resuming, and the section of RESULTS.md."""

from __future__ import annotations

import json
import re

import pytest
from huggingface_hub import ModelCard

from benchmarks import common, model_cards, publishing
from hf_context_prune import EvalOptions, PrunerConfig, prune
from hf_context_prune.storage.loading import LoadedModel
from tests.support.marks import TINY_TEXT
from tests.support.runs import OPTIONS
from tests.support.tiny import texts, tiny_model, tiny_tokenizer
from tests.support.tiny_domain import model_for, shared_tokenizer, write_domains
from tests.unit.publishing.test_card import check_structure

pytestmark = [pytest.mark.slow, TINY_TEXT]


def test_cards_of_the_domains(tmp_path, monkeypatch):
    write_domains(tmp_path, ("law", "medicine", "general"))
    for domain in ("law", "medicine"):
        questions = [{"question": f"Which {i}?", "choices": ["the court", "a dose"], "answer": i % 2} for i in range(6)]
        (tmp_path / domain / "mcq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    tokenizer = shared_tokenizer("smollm2")
    loaded = LoadedModel(model_for("llama", tokenizer), tokenizer, "tiny", None, None)
    monkeypatch.setattr(model_cards, "smollm2", lambda: loaded)
    options = f"--data {tmp_path} --work {tmp_path / 'work'} --output {tmp_path / 'cards'} --domains law medicine"
    options += " --vocab-size 320 --reconstruction least_squares --num-samples 16 --length 32"
    options += " --eval-tokens 900 --questions 4 --no-memory --no-benchmark --recover-minutes 0.05 --export f16"
    model_cards.main(options.split())
    for domain in ("law", "medicine"):
        name = f"SmolLM2-135M-{domain}"
        card = ModelCard.load(tmp_path / "cards" / f"{name}.md")
        check_structure(card, picture=f"{name}.png")
        assert (tmp_path / "cards" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert domain in card.data.tags
        assert f"| domain: {domain}/corpus.validation.jsonl.gz |" in card.text
        assert "| general: general/corpus.train.jsonl.gz |" in card.text
        assert "accuracy, " in card.text
        assert "it was then trained on text of the domain" in card.text
        export = ModelCard.load(tmp_path / "cards" / "exports" / f"{name}-gguf.md")
        assert "as gguf with f16 weights" in export.text
    files = [path for path in (tmp_path / "cards").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    monkeypatch.setattr(model_cards, "smollm2", lambda: pytest.fail("pruned again"))
    model_cards.main(options.split())
    assert {path: path.read_bytes() for path in files} == before


def test_figures_of_publishing(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    result = prune(
        tiny_model("llama"),
        texts(),
        PrunerConfig(mlp_ratio=0.25, **OPTIONS),
        tokenizer=tiny_tokenizer(),
        eval_options=EvalOptions(max_tokens=300, benchmark=False, memory=False),
    )
    folder = result.save_pretrained(tmp_path / "mini")
    publishing.main(["--folder", str(folder), "--megabytes", "40", "--repeats", "1"])
    text = (tmp_path / "RESULTS.md").read_text()
    peaks = [int(found) for found in re.findall(r"(\d+) MB,", text)]
    assert len(peaks) == 2
    assert max(peaks) < 400
