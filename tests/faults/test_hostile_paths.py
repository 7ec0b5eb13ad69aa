"""Paths that the system can't look up, and pipes, devices and huge files where small files should be."""

from __future__ import annotations

import os

import pytest

from hf_context_prune import PrunerConfig, load_model, load_pruned, read_space_settings
from hf_context_prune.errors import ContextPruneError, LoadError
from hf_context_prune.pipelines.prune import prune_to_folder
from hf_context_prune.storage.loading import load_meta_model
from hf_context_prune.storage.manifest import verify_folder
from tests.support.limits import within
from tests.support.tiny import model_and_text

BAD_PATHS = {"long": "a" * 300, "deep": "a/" * 3_000, "of nobody": "~nobody-here/x"}
COMMANDS = [
    "prune PATH --data @data.jsonl --output @o",
    "prune @base --data PATH --output @o",
    "prune @base --data @data.jsonl --eval-data PATH --output @o",
    "prune @base --data @data.jsonl --general-data PATH --output @o",
    "prune @base --data @data.jsonl --output PATH",
    "prune @base --data @data.jsonl --output @o --config PATH",
    "prune PATH --dry-run",
    "evaluate PATH --data @data.jsonl",
    "evaluate @base --data @data.jsonl --base PATH",
    "evaluate @base --data @data.jsonl --questions PATH",
    "evaluate @base --data @data.jsonl --output PATH",
    "recover PATH --data @data.jsonl --output @o",
    "bench @base PATH",
    "cross-domain PATH --domain a=@data.jsonl --domain b=@data.jsonl --output @o",
    "cross-domain @base --domain a=PATH --domain b=PATH --output @o",
    "paper-grid @base --data @data.jsonl --output PATH",
    "export PATH --to gguf --output @o",
    "inspect PATH",
    "card PATH",
    "report PATH",
    "push PATH owner/name",
    "space PATH --output @o",
    "space PATH.yaml --output @o",
]


def test_paths_that_can_not_be_looked_up(run, place, monkeypatch, subtests):
    monkeypatch.chdir(place)
    for command in COMMANDS:
        for name, path in BAD_PATHS.items():
            if name == "deep" and "PATH" not in command[:16]:
                continue
            words = [f"@{word[1:]}" if word[0] == "@" else word.replace("PATH", path) for word in command.split()]
            with subtests.test(command, path=name):
                code, _, err = run(*words)
                assert code in (1, 2)
                assert "Error" in err
                assert "Traceback" not in err
                assert len(err) < 2_000
    assert sorted(os.listdir(place)) == ["base", "data.jsonl"]


def test_paths_that_only_python_can_name(place, subtests):
    for path in ("a\0b", "\ud800", "", " "):
        for call in (
            load_model,
            load_meta_model,
            load_pruned,
            read_space_settings,
            PrunerConfig.from_yaml,
            verify_folder,
        ):
            with subtests.test(call.__name__, path=path), pytest.raises(ContextPruneError):
                call(path)
        with subtests.test("prune", path=path), pytest.raises(ContextPruneError):
            prune_to_folder(place / "base", place / "data.jsonl", path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_and_text(tmp_path_factory.mktemp("paths"), "data.jsonl")


def test_files_of_a_model_that_are_huge_or_no_files(place, subtests):
    folder = place / "base"
    for name in (
        "tokenizer_config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "more.json",
    ):
        path = folder / name
        whole = path.read_bytes() if path.exists() else None
        for make, said in (
            (os.mkfifo, "regular file"),
            (lambda path: path.symlink_to("/dev/zero"), "a device|outside of the folder"),
            (lambda path: path.touch() or os.truncate(path, 2**30), "at most .* are read"),
        ):
            path.unlink(missing_ok=True)
            make(path)
            with subtests.test(name, said=said), within(seconds=2), pytest.raises(LoadError, match=said):
                load_model(folder)
        path.unlink()
        if whole is not None:
            path.write_bytes(whole)
    assert load_model(folder).model is not None
