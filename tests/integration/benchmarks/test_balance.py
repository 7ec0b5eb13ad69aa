"""The benchmark of balanced sources on a tiny model, and the texts on the worst source."""

from __future__ import annotations

import argparse
import gzip
import json
import random

import pytest

from benchmarks import balance, common
from benchmarks.by_source import changes_by_source, mean_and_worst, read_sources, sources_of, worst_change
from benchmarks.frontier_text import BASE, sources_table
from benchmarks.one_shot import worst_line
from hf_context_prune.storage.loading import LoadedModel
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import model_for, shared_tokenizer
from tests.support.tiny_tokenizers import WORDS


def write_sources(folder, name, sources):
    """A domain of random words, with so many train and validation documents of each source."""
    draw = random.Random(0)
    (folder / name).mkdir()
    for turn, split in enumerate(("train", "validation")):
        records = [
            {"text": " ".join(draw.choices(WORDS[:20], k=60)), "doc": f"{split}-{source}-{i}", "source": source}
            for source, counts in sources.items()
            for i in range(counts[turn])
        ]
        with gzip.open(folder / name / f"corpus.{split}.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, records)))


@pytest.mark.slow
@TINY_TEXT
def test_rows_tables_and_resume(tmp_path, monkeypatch):
    write_sources(tmp_path, "law", {"acts": (80, 12), "cases": (20, 6), "notes": (10, 1)})
    tokenizer = shared_tokenizer("smollm2")
    loaded = LoadedModel(model_for("llama", tokenizer, intermediate_size=160), tokenizer, "tiny", None, None)
    monkeypatch.setattr(balance, "smollm2", lambda: loaded)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    sizes = "--domains law --removed 0.2 --num-samples 16 --length 32 --eval-tokens 900 --fewest 5"
    options = f"--data {tmp_path} --work {tmp_path / 'rows'} {sizes}".split()
    balance.main(options)
    rows = {row["key"]["way"]: row for row in map(json.loads, (tmp_path / "rows/balance.jsonl").open())}
    assert set(rows) == {"", "by size", "balanced"}
    for way in ("by size", "balanced"):
        assert rows[way]["parameters"] <= 0.8 * rows[""]["parameters"]
        for text in ("domain", "sources"):
            assert rows[way][text]["sources"] == rows[""][text]["sources"]
            assert [doc for doc, *_ in rows[way][text]["documents"]] == [doc for doc, *_ in rows[""][text]["documents"]]
    assert rows["by size"]["domain"]["nll"] != rows["balanced"]["domain"]["nll"]
    text = (tmp_path / "RESULTS.md").read_text()
    for part in ("| law | worst source |", "| law | notes | 1 |", "- law: the worst source ", "balance_sources"):
        assert part in text
    monkeypatch.setattr(balance.BalancedDomain, "score", lambda *_: pytest.fail("measured again"))
    balance.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text


@TINY_TEXT
def test_a_single_source_has_nothing_to_balance(tmp_path, monkeypatch):
    write_sources(tmp_path, "law", {"acts": (8, 3)})
    monkeypatch.setattr(balance, "smollm2", lambda: pytest.fail("loaded"))
    options = f"--data {tmp_path} --work {tmp_path / 'rows'} --domains law".split()
    with pytest.raises(SystemExit, match="law has a single source"):
        balance.main(options)


SOURCES = ["acts"] * 10 + ["cases"] * 5 + ["notes"]
BEFORE = [1.0] * 16
AFTER = [1.1] * 10 + [1.2, 1.4, 1.3, 1.2, 1.4] + [2.0]


def rows_of(**losses):
    """Rows of a domain at 20 %, with a loss per document."""
    documents = [[f"d{place}", 10, 40] for place in range(len(SOURCES))]
    rows = {("law", method, 0.0 if method == BASE else 0.2): {"nll": nll} for method, nll in losses.items()}
    rows["law", BASE, 0.0]["documents"] = documents
    return rows


def test_changes_by_source_begin_with_the_worst():
    found = changes_by_source(BEFORE, AFTER, SOURCES, 0)
    assert [(one.source, one.documents) for one in found] == [("notes", 1), ("cases", 5), ("acts", 10)]
    assert [round(one.change.value, 6) for one in found] == [1.0, 0.3, 0.1]
    assert [one.change.interval is None for one in found] == [True, True, False]
    assert str(found[0]) == "+100.0 % (notes, 1 document)"


def test_the_worst_source_of_each_draw_and_the_paired_difference():
    better = [1.1] * 10 + [1.1, 1.3, 1.2, 1.1, 1.3] + [2.0]
    one, other, gap = worst_change(BEFORE, (AFTER, better), SOURCES, 0, fewest=5)
    assert (round(one.value, 6), round(other.value, 6), round(gap.value, 6)) == (0.3, 0.2, -0.1)
    assert one.interval[0] < 0.3 < one.interval[1]
    assert gap.interval == pytest.approx((-0.1, -0.1))
    assert worst_change(BEFORE, (AFTER,), SOURCES, 0)[0].value == 1.0
    with pytest.raises(ValueError, match="no source has 11 test documents"):
        worst_change(BEFORE, (AFTER,), SOURCES, 0, fewest=11)


def test_the_section_on_loss_by_size_names_the_worst_source():
    args = argparse.Namespace(domains=["law"], shares=[0.2], seed=0)
    rows = rows_of(base=BEFORE, default=AFTER)
    rows["law", BASE, 0.0]["sources"] = SOURCES
    text = sources_table(rows, args)
    assert "| asked | law, mean | law, worst source |" in text
    assert "| 20% | +21.9 % (+10.0 to +100.0) | +100.0 % (notes, 1 document) |" in text
    assert text.count("one source") == 0
    rows["law", BASE, 0.0]["sources"] = ["acts"] * len(SOURCES)
    assert "| one source |" in sources_table(rows, args)
    assert mean_and_worst(BEFORE, AFTER, ["acts"] * len(SOURCES), 0)[1] is None
    with pytest.raises(SystemExit, match="'d0', which --data does not have"):
        sources_of(rows["law", BASE, 0.0], {})


def test_one_shot_names_the_worst_source_of_our_best_method():
    dense = {"nll": BEFORE, "documents": [[f"d{place}", 10, 40] for place in range(16)], "sources": SOURCES}
    rows = {("law", "", "dense"): dense, ("law", "mlp25", "ours"): {"nll": AFTER}}
    args = argparse.Namespace(domains=["law"], methods=["obs", "ours"], seed=0)
    line = worst_line(rows, args, "mlp25")
    assert line.startswith("ours: `obs` + `sequential`, change of the loss by source of the text: law +21.9 %")
    assert line.endswith("at worst +100.0 % (notes, 1 document).")
    args.methods = ["obs"]
    assert worst_line(rows, args, "mlp25") == ""


def test_sources_are_read_from_the_data(tmp_path):
    write_sources(tmp_path, "law", {"acts": (1, 2), "cases": (1, 1)})
    found = read_sources(argparse.Namespace(data=tmp_path), ["law"])
    assert found == {"law": {"validation-acts-0": "acts", "validation-acts-1": "acts", "validation-cases-0": "cases"}}
