"""The notebooks of examples/: small and without outputs; nightly, they are run from the first cell to the last."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import hf_context_prune

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def code_of(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_both_are_there():
    assert NAMES == ["prune_inside_trainer", "prune_your_own_text"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_they_are_stripped_and_import_what_exists(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert path.stat().st_size < 20_000
    for code in code_of(notebook):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "hf_context_prune":
                assert {alias.name for alias in node.names} <= set(hf_context_prune.__all__)


@pytest.mark.nightly
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_they_run(path, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "mini-gpt/model.safetensors").is_file()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in shown if output.output_type == "error"]
    if path.stem == "prune_your_own_text":
        assert next((tmp_path / "mini-gguf").glob("*.gguf")).stat().st_size > 1e6
        assert any("bits per byte" in output.get("text", "") for output in shown)
