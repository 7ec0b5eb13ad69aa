"""What import-linter (see pyproject.toml) can't say of the sources. Nothing is imported to find out."""

import ast
import sys
from pathlib import Path

from hf_context_prune.modeling.modeling_context_pruned import MODELING_FILES

ROOT = Path(__file__).parents[2] / "hf_context_prune"
# Templates are data: files of the Space, which the package never imports.
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
    if "templates" not in path.relative_to(ROOT).parts
}
SHIPPED_LIBRARIES = {"torch", "transformers", "huggingface_hub"}


def imports(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_only_the_output_module_prints():
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert [place for place in found if not place.startswith("cli/output.py")] == []


def test_no_module_imports_a_private_name_or_module_of_another():
    found = [
        f"{name}:{node.lineno} {node.module}.{alias.name}"
        for name, tree in TREES.items()
        for node in imports(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("hf_context_prune"))
        for alias in node.names
        for part in [*(node.module or "").split("."), alias.name]
        if part.startswith("_") and not part.startswith("__")
    ]
    assert found == []


def test_no_name_has_two_doors():
    """Internal imports name the module that defines a name; subpackages re-export nothing (only the root does)."""
    packages = {name.removesuffix("/__init__.py").replace("/", ".") for name in TREES if name.endswith("/__init__.py")}
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        if name.endswith("/__init__.py") and name != "modeling/__init__.py"
        for node in imports(tree)
    ]
    assert "pruning.vocabulary" in packages
    assert found == []


def test_shipped_files_stand_alone():
    """They travel with saved models, so they import each other and three libraries alone."""
    stems = {Path(name).stem for name in MODELING_FILES}
    for name in MODELING_FILES:
        for node in imports(TREES[f"modeling/{name}"]):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert {node.module} <= stems if node.module else {alias.name for alias in node.names} <= stems
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                foreign = {module.split(".")[0] for module in modules} - SHIPPED_LIBRARIES - sys.stdlib_module_names
                assert not foreign, f"{name} imports {foreign}"
