"""The comparison with the vendor's smaller model, on tiny models: rows, the line, the table, and resuming."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import common, vendor_line
from benchmarks.vendor_line import accuracy, against_the_line, all_parameters, bits_per_byte, layer_parameters
from hf_context_prune.storage.loading import LoadedModel
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import model_for, shared_tokenizer, write_domains

pytestmark = [pytest.mark.slow, TINY_TEXT]


def test_rows_table_and_resume(tmp_path, monkeypatch):
    write_domains(tmp_path, ("law",))
    questions = [
        {
            "id": str(i),
            "question": f"Which is {i}?",
            "choices": ["one", "two"],
            "answer": i % 2,
            "source": "s",
            "split": "test",
        }
        for i in range(4)
    ]
    (tmp_path / "law" / "mcq.jsonl").write_text("\n".join(map(json.dumps, questions)))
    tokenizer = shared_tokenizer("smollm2")

    def loaded(neurons):
        model = model_for("llama", tokenizer, intermediate_size=neurons)
        return LoadedModel(model, tokenizer, "tiny", None, None)

    small, large = loaded(40), loaded(160)
    monkeypatch.setitem(vendor_line.MODELS, "qwen-coder-0.5b", ("Small", lambda dtype: small))
    monkeypatch.setitem(vendor_line.MODELS, "qwen-coder-1.5b", ("Large", lambda dtype: large))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    target = int(0.8 * large.model.num_parameters())
    sizes = f"--domains law --trained law --asked law --questions 4 --targets {target} --minutes 0.05"
    sizes += " --num-samples 16 --length 32 --eval-tokens 900"
    options = f"--data {tmp_path} --work {tmp_path / 'rows'} {sizes}".split()
    vendor_line.main(options)
    rows = {row["key"]["kind"]: row for row in map(json.loads, (tmp_path / "rows/vendor_line.jsonl").open())}
    assert list(rows) == ["large", "small", f"pruned {target:g}", f"healed {target:g}"]
    assert rows[f"pruned {target:g}"]["parameters"] <= target
    assert rows["large"]["embeddings"] == 2 * large.model.get_input_embeddings().weight.numel()  # the head is untied
    assert all(len(row["nll"]) == len(rows["large"]["nll"]) and len(row["right"]["law"]) == 4 for row in rows.values())
    text = (tmp_path / "RESULTS.md").read_text()
    assert f"law, healed {target:g}: " in text
    monkeypatch.setattr(vendor_line.VendorLine, "score", lambda *_: pytest.fail("measured again"))
    vendor_line.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_the_line_meets_both_models():
    small = {"parameters": 100, "embeddings": 0, "nll": [math.log(2)], "documents": [["a", "s", 1]]}
    large = {"parameters": 400, "embeddings": 240, "nll": [math.log(2)], "documents": [["a", "s", 2]]}
    assert bits_per_byte(small) == pytest.approx(1.0)
    assert bits_per_byte(large) == pytest.approx(0.5)
    for size in (all_parameters, layer_parameters):
        assert against_the_line(small, large, small, size) == pytest.approx(0)
        assert against_the_line(small, large, large, size) == pytest.approx(0)
    half = {**large, "parameters": 200}  # half of the way, in the logarithm
    assert against_the_line(small, large, half, all_parameters) == pytest.approx(0.5 / 0.75 - 1)
    assert layer_parameters(large) == 160
    assert accuracy([1, 0, 1, 1]) == "75.0 [30.1, 95.4]"
