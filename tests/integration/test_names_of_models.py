"""`demo` and .gguf files are taken wherever a model is; `storage.loading` alone knows the name."""

from __future__ import annotations

import io
import json
import sys

import pytest

from hf_context_prune import load_model
from hf_context_prune.errors import ConfigError
from hf_context_prune.export import gguf as export_gguf
from hf_context_prune.publishing.space.folder import make_space_settings
from hf_context_prune.storage import loading
from tests.support.marks import TINY_TEXT
from tests.support.tiny import model_and_text

pytestmark = TINY_TEXT
TEXT = ("--data", "@data.jsonl", "--max-seq-length", 32)
QUICK = ("--no-benchmark", "--max-eval-tokens", 200)
PRUNE = (*TEXT, "--num-calibration-samples", 8, *QUICK, "--units", "neurons,kv_groups")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = model_and_text(tmp_path_factory.mktemp("names"), "data.jsonl")
    loaded = load_model(folder / "base")
    export_gguf.write(loaded, folder, "f16")
    (folder / export_gguf.FILE_NAME).rename(folder / "tiny.gguf")
    return folder


@pytest.fixture(autouse=True)
def fetched(place, monkeypatch, tmp_path):
    """A tiny model for that of the demo, which is fetched from the package index."""
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "fetch_smollm2", lambda: place / "base")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the house\n"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", pytest.param("@tiny.gguf", marks=pytest.mark.nightly)])
def test_every_command_takes_it(name, run, place, subtests):
    out = f"@of-{name.strip('@')}"
    for arguments in (
        ("prune", name, "--mlp-ratio", 0.2, "--dry-run"),
        ("prune", name, "--output", out, *PRUNE),
        ("evaluate", out, "--base", name, *TEXT, *QUICK),
        ("evaluate", name, *TEXT, *QUICK),
        ("recover", out, "--base", name, "--output", f"{out}-recovered", "--max-steps", 2, *TEXT, *QUICK),
        ("bench", name, out, "--new-tokens", 2, "--repeats", 1),
        ("chat", out, "--base", name, "--max-new-tokens", 2),
        ("export", name, "--to", "gguf", "--output", f"{out}-gguf"),
    ):
        with subtests.test(arguments):
            code, _, err = run(*arguments)
            assert code == 0, err


def test_a_folder_of_that_name_wins(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    (place / "base").rename(place / "demo")
    monkeypatch.setattr(loading, "fetch_smollm2", lambda: pytest.fail("fetched"))
    try:
        assert load_model("demo").name == "demo"
    finally:
        (place / "demo").rename(place / "base")


def test_a_space_takes_a_gguf_file_as_its_base(place):
    settings = make_space_settings([str(place / "base")], base=str(place / "tiny.gguf"))
    assert settings.entries[0].base.path == place / "tiny.gguf"
    with pytest.raises(ConfigError, match=r"neither a folder nor a Hub id .* nor a \.gguf file"):
        make_space_settings([str(place / "base")], base=str(place / "data.jsonl"))


def test_the_error_names_all_forms(run):
    code, _, err = run("evaluate", "@absent", "--data", "@data.jsonl")
    assert code == 1
    assert "a model folder, a .gguf file, a Hub id or 'demo'" in err


def test_the_plan_names_the_file_and_not_the_word(run, place):
    code, _, err = run("prune", "demo", "--output", "@named", *PRUNE)
    assert code == 0, err
    plan = json.loads((place / "named/pruning_plan.json").read_text())
    assert plan["provenance"]["base_model"] == "base"
