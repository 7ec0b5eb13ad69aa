"""Two runs with one output: the second is refused at its start, before any long work, and told who is at work."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from hf_context_prune.storage import loading
from hf_context_prune.utils.locks import reserve_output
from tests.support.tiny import model_and_text

FIRST = """
import sys
from hf_context_prune.utils.locks import reserve_output
with reserve_output(sys.argv[1]):
    print("at work", flush=True)
    sys.stdin.read()
"""
DATA = ("--data", "@data.jsonl")
COMMANDS = {
    "prune": ("prune", "@base", *DATA, "--output", "@out"),
    "recover": ("recover", "@base", *DATA, "--output", "@out"),
    "evaluate": ("evaluate", "@base", *DATA, "--output", "@out"),
    "bench": ("bench", "@base", "@base", "--output", "@out"),
    "cross-domain": ("cross-domain", "@base", "--domain", "a=x", "--domain", "b=y", "--output", "@out"),
    "paper-grid": ("paper-grid", "@base", *DATA, "--output", "@out"),
    "report": ("report", "@base", "--output", "@out"),
    "card": ("card", "@out"),
    "export": ("export", "@base", "--to", "onnx", "--output", "@out"),
    "space": ("space", "@base", "--output", "@out"),
    "demo": ("demo", "--output", "@out"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_and_text(tmp_path_factory.mktemp("two-runs"), "data.jsonl")


@pytest.fixture
def first(place, tmp_path, monkeypatch):
    """A run that is at work for ``out``."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    words = [sys.executable, "-c", FIRST, str(place / "out"), "--seed", "3"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "at work\n"
        yield child
        child.communicate("")


def test_every_command_refuses_an_output_at_which_another_run_is_at_work(run, place, first, monkeypatch, subtests):
    def too_late(*_, **__):
        pytest.fail("the model was loaded first")

    monkeypatch.setattr(loading, "_load", too_late)
    for name, words in COMMANDS.items():
        with subtests.test(name):
            code, out, err = run(*words)
            assert (code, out) == (1, "")
            assert f"process {first.pid} since" in err
            assert "--seed 3): wait for it to end, or choose another --output" in err
    assert sorted(os.listdir(place)) == ["base", "data.jsonl"]


def test_a_run_keeps_its_output_until_it_ends(run, place, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def load(*arguments, **options):
        seen.append(
            subprocess.run([sys.executable, "-c", FIRST, str(place / "evaluated")], capture_output=True, text=True)
        )
        return real(*arguments, **options)

    real = loading._load
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(loading, "_load", load)
    words = ("evaluate", "@base", *DATA, "--no-benchmark", "--max-eval-tokens", 200, "--max-seq-length", 32)
    code, _, err = run(*words, "--output", "@evaluated")
    assert code == 0, err
    assert "Another run is saving to" in seen[0].stderr
    assert "evaluate" in seen[0].stderr
    with reserve_output(place / "evaluated"):
        pass
