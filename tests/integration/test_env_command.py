"""`env`: what a bug report needs, and nothing that names its author."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache" / "ours"))
    return tmp_path


def test_versions_machine_and_cache(run, place):
    (place / "cache/ours/gguf/a").mkdir(parents=True)
    (place / "cache/ours/gguf/a/weights").write_bytes(bytes(3_000_000))
    (place / "cache/ours/unfinished").mkdir()
    code, out, err = run("env", "--format", "json")
    assert code == 0, err
    found = json.loads(out)
    assert found["version"] == "0.1.0"
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["transformers"] == transformers.__version__
    assert found["threads"] == torch.get_num_threads()
    assert 0 < found["memory_free"] <= found["memory_total"]
    assert found["cache_folder"] == "~/cache/ours"
    assert found["cache_bytes"] == {"gguf": 3_000_000, "unfinished": 0}
    code, out, _ = run("env")
    assert code == 0
    assert "Cache: ~/cache/ours, 0.00 GB (gguf 0.00 GB, unfinished 0.00 GB)" in out
    assert "To empty the cache, remove that folder." in out
    assert str(place) not in out
    assert run("env", "--format", "quiet")[1] == "0.1.0\n"


def test_a_cache_that_is_not_there(run, place):
    code, out, _ = run("env", "--format", "json")
    assert code == 0
    assert json.loads(out)["cache_bytes"] == {}
    assert list(place.iterdir()) == []


def test_the_name_of_the_user_is_hidden_outside_of_the_home_too(run, monkeypatch):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", f"/srv/{Path.home().name}/cache")
    code, out, _ = run("env", "--format", "json")
    assert code == 0
    assert json.loads(out)["cache_folder"] == "/srv/.../cache"
