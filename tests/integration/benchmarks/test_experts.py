"""The benchmark of removed experts at tiny sizes: training, rows, tables, and resuming."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import common, experts, experts_model
from benchmarks.experts_model import QUICK, Training, divergence, draw_batch
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import write_domains

pytestmark = [pytest.mark.slow, TINY_TEXT]


class Tokens:
    """As much of a tokenizer as a model's config asks for."""

    def __len__(self):
        return 300

    def convert_tokens_to_ids(self, token):
        return 0


def test_rows_tables_and_resume(tmp_path, monkeypatch):
    write_domains(tmp_path, experts_model.SHARES)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    options = (
        f"--data {tmp_path} --work {tmp_path / 'rows'} --quick --steps 3 --num-samples 13 --eval-tokens 400".split()
    )
    experts.main(options)
    rows = {row["key"]["method"]: row for row in map(json.loads, (tmp_path / "rows/experts_quick.jsonl").open())}
    assert set(rows) == {"routing", "base", *experts.METHODS}
    for method in experts.METHODS:
        narrowed = method == experts.NEURONS  # which leaves every expert its row of the router
        assert [len(kept) for kept in rows[method]["kept"]] == ([8, 8] if narrowed else [4, 4])
        gone = rows["routing"]["parameters"] - rows[method]["parameters"]
        assert gone == 8 * rows["routing"]["expert_parameters"] - narrowed * 8 * experts_model.QUICK.hidden_size
        assert rows[method]["cut"]["medicine"] != rows[method]["repaired"]["medicine"]
        assert rows[method]["error_left"] == [None, None]  # one batch is too little to withhold any
    text = (tmp_path / "RESULTS.md").read_text()
    assert "50% of the experts removed, or of their neurons" in text
    assert "Goal of at most a third of what `reap` loses" in text
    for name in ("measure_routing", "measure_base", "measure"):
        monkeypatch.setattr(experts.Bench, name, lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(Training, "advance", lambda *_: pytest.fail("trained again"))
    experts.main(options)
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path):
    text = {name: torch.randint(1, 300, (2_000,)) for name in experts_model.SHARES}
    shape = replace(QUICK, layers=1)

    def train(folder, steps, total):
        (tmp_path / folder).mkdir(exist_ok=True)
        training = Training(tmp_path / folder, shape, Tokens(), 0)
        advance, training.total = training.advance, total
        left = iter(range(steps))

        def dies(batch):
            if next(left, None) is None:
                raise KeyboardInterrupt
            advance(batch)

        training.advance = dies
        training.run(text, 1.0, total, 0.0)  # saved after every step
        return [parameter.detach().clone() for parameter in training.model.parameters()]

    whole = train("whole", 6, 6)
    with pytest.raises(KeyboardInterrupt):
        train("killed", 3, 6)
    assert all(map(torch.equal, train("killed", 3, 6), whole))
    with pytest.raises(SystemExit, match="--fresh"):
        Training(tmp_path / "killed", QUICK, Tokens(), 0).run(text, 1.0, 6, 0.0)


def test_the_number_of_steps_follows_from_the_time(tmp_path, monkeypatch):
    text = {name: torch.randint(1, 300, (2_000,)) for name in experts_model.SHARES}
    clock = iter(range(10_000))
    monkeypatch.setattr(experts_model.time, "perf_counter", lambda: float(next(clock)))
    training = Training(tmp_path, replace(QUICK, layers=1), Tokens(), 0)
    training.run(text, 0.3, 0, 100.0)  # a step takes a second
    assert training.step == training.total == 18


def test_batches_follow_from_seed_and_step():
    text = {name: torch.full((2_000,), number) for number, name in enumerate(experts_model.SHARES)}
    first, again, later = (draw_batch(text, experts_model.Shape(), 0, step) for step in (5, 5, 6))
    assert torch.equal(first, again)
    assert first.shape == (16, 256)
    assert first[:, 0].bincount().tolist() == [7, 7, 2]
    assert torch.equal(first, later)  # made of one token per domain, whatever the places


def test_divergence():
    assert divergence([1.0, 2.0, 0.0], [2.0, 4.0, 0.0]) == pytest.approx(0)
    assert divergence([1.0, 0.0], [0.0, 3.0]) == pytest.approx(1)
