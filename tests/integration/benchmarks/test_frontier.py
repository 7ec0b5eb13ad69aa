"""The benchmark of loss by size on a tiny model: shared curves, both forms, verdicts, the picture, and resuming."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks import common, frontier
from benchmarks.frontier_picture import choose_ticks, spread_apart
from benchmarks.frontier_text import BASE, HEALED, changes_of, verdicts
from benchmarks.methods import DEFAULT, LAYERS
from hf_context_prune.storage.loading import LoadedModel
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import model_for, shared_tokenizer, write_domains

pytestmark = [pytest.mark.slow, TINY_TEXT]


@pytest.fixture
def options(tmp_path, monkeypatch):
    write_domains(tmp_path, ("law", "medicine", "general"))
    tokenizer = shared_tokenizer("smollm2")
    loaded = LoadedModel(model_for("llama", tokenizer, intermediate_size=160), tokenizer, "tiny", None, None)
    monkeypatch.setattr(frontier, "smollm2", lambda: loaded)
    monkeypatch.setattr(frontier, "PICTURE", tmp_path / "frontier.png")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    sizes = "--domains law medicine --shares 0.2 0.5 --peers flap+bias --minutes 0.03 --num-samples 16"
    return f"--data {tmp_path} --work {tmp_path / 'rows'} {sizes} --length 32 --eval-tokens 900".split()


def test_rows_section_picture_and_resume(options, tmp_path, monkeypatch):
    frontier.main(options)
    rows = {
        (row["key"]["domain"], row["key"]["method"], row["key"]["share"]): row
        for row in map(json.loads, (tmp_path / "rows/frontier.jsonl").open())
    }
    for domain in ("law", "medicine"):
        base = rows[domain, BASE, 0.0]
        assert ("general" in base) == (domain == "medicine")
        for share in (0.2, 0.5):
            assert all(
                rows[domain, method, share]["parameters"] <= (1 - share) * base["parameters"]
                for method in (DEFAULT, LAYERS)
            )
            default = rows[domain, DEFAULT, share]
            assert ("general" in default) == (domain == "medicine")
            assert default["native"] or default["forms"]["variable"]
            # A form is measured only where it is not what the default takes, and only up to 30 %.
            own = {form for form, same in default["forms"].items() if same is False and share == 0.2}
            assert {form for form in default["forms"] if (domain, form, share) in rows} == own
        assert rows[domain, LAYERS, 0.2]["gone"]["tokens"] == 0
        # Both sizes, with tokens and without, read the same curves of the layers, and no finished layer is left.
        (folder,) = (tmp_path / "rows/models").glob(f"frontier-{domain}-*")
        assert all(path.is_file() for path in folder.iterdir())
        assert len([path for path in folder.iterdir() if not path.name.startswith("tokens-")]) == 1
    assert all(row["seconds"] > 0 for row in rows.values())
    peer = rows["medicine", "flap+bias", 0.5]["parameters"]
    assert peer == pytest.approx(0.5 * rows["medicine", BASE, 0.0]["parameters"], rel=0.01)  # its biases are new
    healed, default = (sum(rows["medicine", method, 0.2]["nll"]) for method in (HEALED, DEFAULT))
    assert healed <= default
    text = (tmp_path / "RESULTS.md").read_text()
    for part in (
        "](frontier.png)",
        "| 20% | default without tokens |",
        "(goal: at most +0%)",
        "never more than 1% worse",
    ):
        assert part in text
    assert "Time of all rows, on cores that other work may have shared: " in text
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(frontier, "_measure", lambda *_, **__: pytest.fail("measured again"))
    frontier.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_the_domain_to_compare_on_is_measured(options, capsys):
    with pytest.raises(SystemExit):
        frontier.main([*options, "--compared", "finance"])
    assert "none of --domains (law, medicine)" in capsys.readouterr().err


def rows_of(**losses):
    """Rows of one domain by method, with a loss per document."""
    rows = {("law", method, 0.0 if method == BASE else 0.2): {"nll": nll} for method, nll in losses.items()}
    rows["law", BASE, 0.0]["sources"] = [f"source {place % 5}" for place in range(len(losses["base"]))]
    return rows


def test_the_mean_has_the_range_over_the_domains():
    rows = rows_of(base=[1.0, 2.0], default=[1.5, 3.0])
    rows |= {("finance", *place[1:]): row for place, row in rows_of(base=[2.0, 4.0], default=[2.0, 4.0]).items()}
    law, finance, mean = changes_of(rows, ("law", "finance"), DEFAULT, 0.2, 0)
    assert (law.value, finance.value, mean.value) == (0.5, 0.0, 0.25)
    assert (mean.interval, mean.span) == (None, (0.0, 0.5))


def test_the_default_is_held_against_the_best_other_choice():
    args = argparse.Namespace(domains=["law"], shares=[0.2], seed=0, minutes=8.0)
    base = [1.0, 2.0] * 5
    changed = {"default": 1.03, "native": 1.0, "layers": 1.5, "healed": 0.5}
    rows = rows_of(base=base, **{name: [factor * one for one in base] for name, factor in changed.items()})
    text = verdicts(rows, args)
    assert "+3.0 % bits per byte (goal: at most +0%): missed by 3.0 points." in text
    assert "at worst +3.0 % [+3.0, +3.0] against `native_architecture=True` (law, 20%): missed by 2.0 points." in text


def test_labels_and_ticks_have_room():
    assert spread_apart([0.5, 0.1, 0.5], [1, 1, 1]) == pytest.approx([0.471, 0.1, 0.529])
    ticks = choose_ticks(-0.12, 1.4)
    assert ticks == sorted(ticks)
    assert {0.0, 0.5, 1.0} <= set(ticks)
