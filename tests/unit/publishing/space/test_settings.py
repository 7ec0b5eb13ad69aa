"""The YAML of a Space: what it may say, and that nothing else passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hf_context_prune.errors import ConfigError
from hf_context_prune.publishing.space.folder import make_space_settings
from hf_context_prune.publishing.space.serve import choose_settings
from hf_context_prune.publishing.space.settings import (
    Entry,
    Limits,
    Source,
    demo_settings,
    read_space_settings,
    write_settings,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD = {
    "title": "Two domains",
    "base": "demo",
    "models": [
        {"name": "Law", "path": "models/law", "prompts": ["The court"], "reports": {"general": "reports/g.json"}},
        {
            "name": "Medicine, small",
            "domain": "Medicine",
            "example": "examples/m.json",
            "repo": "us/mini",
            "revision": COMMIT,
            "base": {"repo": "us/dense", "revision": COMMIT},
        },
    ],
    "limits": {"new_tokens": 64},
}


def written(place: Path, values: object) -> Path:
    path = place / "space.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def test_all_that_it_may_say(tmp_path):
    settings = read_space_settings(written(tmp_path, GOOD))
    law, medicine = settings.entries
    assert law == Entry(
        "Law", Source(path=tmp_path / "models/law"), Source(), ("The court",), {"general": tmp_path / "reports/g.json"}
    )
    assert medicine == Entry(
        *("Medicine, small", Source("us/mini", COMMIT), Source("us/dense", COMMIT)),
        domain="Medicine",
        example=tmp_path / "examples/m.json",
    )
    assert settings.domains == {"Law": (law,), "Medicine": (medicine,)}
    assert settings.limits == Limits(new_tokens=64)
    write_settings(settings, tmp_path / "again.yaml")
    assert read_space_settings(tmp_path / "again.yaml") == settings


def test_a_path_that_climbs_is_the_folder_that_it_leads_to(tmp_path, monkeypatch):
    inner = tmp_path / "mini-law" / "space"
    inner.mkdir(parents=True)
    path = written(inner, {"base": "demo", "models": [{"name": "Law", "path": ".."}]})
    assert read_space_settings(path).entries[0].model == Source(path=tmp_path / "mini-law")
    monkeypatch.chdir(inner)
    entry = make_space_settings([".."], base="demo").entries[0]
    assert (entry.name, entry.model) == ("Law", Source(path=tmp_path / "mini-law"))


def model(**values):
    return GOOD | {"models": [{"name": "Law", "path": "law"} | values]}


REFUSED = (
    ("- a list", "mapping"),
    ("models: [", "can't be read"),
    ("!!python/object/apply:os.system [id]", "can't be read"),
    ({}, "lacks models"),
    ({"models": []}, "at least one"),
    ({"models": [{"name": "Law", "path": "x"}]}, "has no base"),
    (GOOD | {"share": True}, "Unknown field 'share'"),
    (model(trust_remote_code=True), "Unknown field 'trust_remote_code'"),
    (model(name=""), "must be a text"),
    (model(name="a\nb"), "one line"),
    (model(name="x" * 61), "60 characters"),
    (model(path=7), "must be a text"),
    (model(repo="us/mini"), "or a path; it has path, repo"),
    (model(revision=COMMIT), "only a repo has a revision"),
    (model(base="other"), "must be a mapping"),
    (model(base={"repo": "us/dense"}), "must be the commit"),
    (model(base={"repo": "us/dense", "revision": "main"}), "must be the commit"),
    (model(base={"repo": "https://evil.example/x", "revision": COMMIT}), "owner/name"),
    (model(base={"repo": "../x", "revision": COMMIT}), "owner/name"),
    (model(base={}), "it has neither"),
    (model(domain="a\nb"), "one line"),
    (model(example=7), "must be a text"),
    (model(prompts="text"), "list of at most 8"),
    (model(prompts=["x"] * 9), "list of at most 8"),
    (model(prompts=[1]), "must be a text"),
    (model(reports=["x"]), "map names"),
    (GOOD | {"limits": {"seconds": 0}}, "positive integer"),
    (GOOD | {"limits": {"seconds": True}}, "positive integer"),
    (GOOD | {"limits": {"hours": 1}}, "Unknown field 'hours'"),
    (GOOD | {"models": [dict(GOOD["models"][0]) for _ in range(2)]}, "names that differ"),
)


def test_what_is_refused(tmp_path, subtests):
    for values, message in REFUSED:
        path = written(tmp_path, values)
        with subtests.test(message=message, values=str(values)[:80]), pytest.raises(ConfigError, match=message):
            read_space_settings(path)


def test_what_app_py_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    beside, other = tmp_path / "space", tmp_path / "other"
    beside.mkdir()
    other.mkdir()
    assert choose_settings([], beside) == demo_settings(tmp_path / "mini-gpt-licences")
    assert choose_settings([], beside).entries[0].base == Source()
    written(beside, GOOD)
    assert choose_settings([], beside).title == "Two domains"
    assert choose_settings([str(written(other, GOOD | {"title": "Other"}))], beside).title == "Other"
    with pytest.raises(ConfigError, match="one argument"):
        choose_settings(["a", "b"], beside)
