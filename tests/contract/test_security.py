"""SECURITY.md and docs/your-data.md: every promise names tests that exist; downloads are pinned by their sha256."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks import models as benchmark_models
from hf_context_prune.data.demo import LICENCE_WHEEL
from hf_context_prune.storage.known_models import MODEL_WHEEL, SMOLLM2_GGUF_SHA256

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
YOUR_DATA = (ROOT / "docs/your-data.md").read_text(encoding="utf-8").partition("## What nobody")[0]
_PROMISE = re.compile(r"^- \*\*(.+?)\*\*(.*(?:\n  .+)*)", re.M)
PROMISES = [
    *_PROMISE.findall(PAGE.partition("## What is promised")[2].partition("## What is not")[0]),
    *_PROMISE.findall(YOUR_DATA),
]
FETCHING = {"fetch_wheel", "download_package", "urlopen", "urlretrieve", "requests.get", "httpx.get", "httpx.stream"}


def functions(path):
    return {
        node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    }


def test_every_promise_names_tests_that_exist(subtests):
    assert len(PROMISES) >= 25
    for promise, text in PROMISES:
        with subtests.test(promise):
            named = re.findall(r"`((?:tests/|\.ci/)[^`]+)`", text)
            assert named
            for name in named:
                file, _, function = name.partition("::")
                assert (ROOT / file).is_file()
                assert not function or function in functions(ROOT / file)


@pytest.mark.parametrize("folder", ["hf_context_prune", "benchmarks", "examples", "spaces"])
def test_only_pinned_files_are_fetched(folder):
    places = {
        (path.relative_to(ROOT).as_posix(), ast.unparse(node.func))
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FETCHING
    }
    allowed = {
        ("hf_context_prune/storage/packages.py", "download_package"),  # by fetch_wheel, which compares the sha256
        ("hf_context_prune/storage/known_models.py", "fetch_wheel"),
        ("hf_context_prune/data/demo.py", "fetch_wheel"),
        ("benchmarks/models.py", "fetch_wheel"),
    }
    assert places == {place for place in allowed if place[0].startswith(f"{folder}/")}


def test_pins_are_sha256():
    pins = [MODEL_WHEEL[2], LICENCE_WHEEL[2], SMOLLM2_GGUF_SHA256]
    for model in (benchmark_models._GEMMA, benchmark_models._QWEN_05B, benchmark_models._QWEN_15B):
        pins += [model.sha256, *model.wheels]
    assert all(re.fullmatch("[0-9a-f]{64}", pin) for pin in pins)
    assert len(set(pins)) == len(pins)
