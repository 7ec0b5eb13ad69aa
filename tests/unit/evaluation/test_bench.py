"""Two models measured in turns: what is in the table, and what is left out."""

from __future__ import annotations

import pytest

from hf_context_prune.errors import ConfigError
from hf_context_prune.evaluation import bench as module
from hf_context_prune.evaluation.bench import bench
from hf_context_prune.evaluation.reports.run_report import RunReport, load_report
from hf_context_prune.evaluation.speed import MemoryMeasurement
from tests.support.tiny import tiny_model

QUICK = {"prompts": (8, 300, 400), "batches": (1, 2), "new_tokens": 2, "repeats": 2, "memory_repeats": 2}


@pytest.fixture
def pair():
    return tiny_model("llama"), tiny_model("llama", intermediate_size=16, max_position_embeddings=200)


def test_rows_and_values(pair, monkeypatch, tmp_path):
    order = []

    def memory(folder):
        order.append(folder.name)
        big = folder.name == "base"
        return MemoryMeasurement(1, 4_000_000 if big else 3_000_000, 2.0 if big else 1.0, 8, 2, "float32", "VmHWM")

    monkeypatch.setattr(module, "measure_peak_memory", memory)
    for name, size in (("base", 3000), ("pruned", 2000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * size)
    folders = {"base_folder": tmp_path / "base", "pruned_folder": tmp_path / "pruned"}
    result = bench(*pair, **folders, **QUICK)
    assert order == ["base", "base", "pruned", "pruned", "base"]  # the first one is not counted
    rows = {row[0]: row[1:] for row in result.table_rows()}
    assert list(rows) == [
        "prefill, 8 tokens (tokens/s)",
        "prefill, 127 tokens (tokens/s)",  # the shortest context, less the new token; longer prompts are the same
        "decode, batch 1 (tokens/s)",
        "decode, batch 2 (tokens/s)",
        "load time (s)",
        "peak RSS (MB)",
        "weights on disk (MB)",
    ]
    assert rows["load time (s)"] == ("2.00", "1.00", "x0.50 (0.50 to 0.50)")
    assert rows["peak RSS (MB)"] == ("4", "3", "x0.75 (0.75 to 0.75)")
    assert rows["weights on disk (MB)"] == ("0.0", "0.0", "x0.67")
    assert result.decode[1].base.batch_size == 2
    report = result.run_report("big", "small")
    report.save(tmp_path / "eval_report.json")
    again = load_report(tmp_path / "eval_report.json")
    assert isinstance(again, RunReport)
    assert again.to_dict() == report.to_dict()
    assert (again.figures["base_bytes"], again.figures["pruned"], again.model) == (3000, "small", "big")
    assert again.tables[0].rows == tuple(result.table_rows())
    assert report.tables[0].caption == result.caption()
    assert result.run_report("big", "small", notes=("A note.",)).tables[0].caption.endswith(" A note.")
    assert "1 threads, float32; base and pruned in turns" in result.caption()


def test_models_without_folders(pair):
    rows = [row[0] for row in bench(*pair, **QUICK).table_rows()]
    assert len(rows) == 4


def test_other_devices(pair):
    base, pruned = pair
    with pytest.raises(ConfigError, match="The base is on cpu, the pruned model on meta"):
        bench(base, pruned.to("meta"), **QUICK)
