"""A visitor's request, and the store of models behind it."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from hf_context_prune.errors import LoadError
from hf_context_prune.publishing.space import compare
from hf_context_prune.publishing.space.compare import Comparer
from hf_context_prune.publishing.space.generation import CHAT, COLOUR, Request, race
from hf_context_prune.publishing.space.settings import Limits, Source
from hf_context_prune.publishing.space.store import ModelStore, load_source
from tests.support.space_models import settings_of


@pytest.fixture(scope="module")
def comparer(tiny_space):
    return Comparer(settings_of(tiny_space), ModelStore())


@pytest.mark.parametrize("domain", ["Law", "Medicine"])
def test_both_sides(comparer, domain):
    views = list(comparer.compare(domain, Request("the court", new_tokens=10)))
    dense, pruned = views[-1].sides
    assert (dense.kind, pruned.kind) == ("dense", "pruned")
    assert dense.progress.tokens == pruned.progress.tokens == 10
    assert dense.progress.text
    assert dense.megabytes > pruned.megabytes > 0
    assert "times as fast" in views[-1].status
    assert not views[-1].refused


def test_the_text_is_compared_in_every_mode(comparer):
    *_, told = comparer.compare("Law", Request("the court", new_tokens=6))
    assert "".join(span.text for span in told.spans) == "the court" + told.sides[0].progress.text
    *_, answered = comparer.compare("Law", Request("the court", mode=CHAT, new_tokens=6))
    assert "".join(span.text for span in answered.spans) == answered.sides[0].progress.text
    *_, coloured = comparer.compare("Law", Request("the court finds", mode=COLOUR))
    assert "".join(span.text for span in coloured.spans) == "the court finds"
    assert {side.progress.tokens for side in coloured.sides} == {0}
    assert coloured.status == "Done."


def test_a_text_that_cant_be_coloured_is_still_written(tiny_space):
    def load(source):
        loaded = load_source(source)
        loaded.tokenizer.bos_token = loaded.tokenizer.eos_token = None
        return loaded

    *_, last = Comparer(settings_of(tiny_space), ModelStore(load)).compare("Law", Request("the court", new_tokens=4))
    assert last.sides[1].progress.tokens == 4
    assert last.spans == ()
    assert "The text can't be coloured: The tokenizer has neither" in last.status


def test_a_model_that_fails_leaves_the_other(comparer):
    *_, last = comparer.compare("Lost", Request("the court", new_tokens=4))
    dense, pruned = last.sides
    assert dense.progress.tokens == 4
    assert pruned.problem.startswith("lost does not exist")  # not where on the server it was looked for
    assert pruned.progress.tokens == 0


def test_an_unforeseen_failure_shows_no_insides(tiny_space, caplog):
    def load(source):
        if source.path.name == "base":
            raise RuntimeError("secret of the machine")
        return load_source(source)

    *_, last = Comparer(settings_of(tiny_space), ModelStore(load)).compare("Law", Request("the", new_tokens=2))
    assert "secret" not in last.sides[0].problem
    assert "secret" in caplog.text
    assert last.sides[1].progress.tokens == 2


def test_neither_can_write(tiny_space):
    def load(source):
        raise LoadError("gone")

    *_, last = Comparer(settings_of(tiny_space), ModelStore(load)).compare("Law", Request("the"))
    assert [side.problem for side in last.sides] == ["gone", "gone"]
    assert last.status == "Neither model could write."


def test_only_the_domains_of_the_settings(comparer, subtests):
    for domain in ("../secret", "", None, ["Law"], "law"):
        with subtests.test(domain=str(domain)):
            (view,) = comparer.compare(domain, Request("the court"))
            assert view.refused
            assert "Law, Medicine, Lost" in view.status


def test_the_time_limit_is_told(tiny_space, monkeypatch):
    now = iter(range(1_000))
    monkeypatch.setattr(compare, "race", partial(race, clock=lambda: next(now)))
    comparer = Comparer(settings_of(tiny_space, limits=Limits(seconds=9)), ModelStore())
    *_, last = comparer.compare("Law", Request("the court", new_tokens=100))
    assert "Stopped after 9 seconds" in last.status
    assert sum(side.progress.tokens for side in last.sides) == 8
    assert {side.progress.stopped for side in last.sides} == {"time"}


def test_one_copy_for_everybody(tiny_space):
    loads = []

    def load(source):
        loads.append(source)
        return load_source(source)

    store, source = ModelStore(load), Source(path=tiny_space / "base")
    assert not store.has(source)
    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(lambda _: store.get(source), range(16)))
    assert len(loads) == 1
    assert len({id(copy) for copy in copies}) == 1


def test_a_failed_load_is_tried_again(tiny_space):
    attempts = iter([LoadError("the Hub is away"), None])

    def load(source):
        if error := next(attempts):
            raise error
        return load_source(source)

    store, source = ModelStore(load), Source(path=tiny_space / "base")
    with pytest.raises(LoadError):
        store.get(source)
    assert store.get(source).model is not None


def test_damaged_weights_are_not_loaded(tiny_space, tmp_path):
    folder = shutil.copytree(tiny_space / "uniform", tmp_path / "damaged")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(LoadError, match="sha256"):
        load_source(Source(path=folder))
