"""Imports go downward only (DESIGN.md), read from the sources with `ast`: nothing is imported to find out.

Imports inside functions count. Those under ``if TYPE_CHECKING:`` don't, except where a module may not even know a
library: they are gone when the code runs. What is imported by a computed name is not seen.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "hf_context_prune"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the bottom to the top: a module imports from the layers below its own.
LAYERS = [
    {"errors"},
    {"files"},
    # Helpers and values that know nothing else of the package.
    {
        *("bars", "cache", "distributed", "embeddings", "leaks", "linalg", "manifest", "markdown", "rows", "sources"),
        *("special_tokens", "stats"),
    },
    {"modeling", "config", "architectures", "forwards", "plan", "data", "overlap", "questions", "unfinished"},
    {
        *("criteria", "allocation", "reconstruction", "calibration", "magnitudes", "surgery", "vocabulary"),
        *("figures", "sensitivity", "staging", "demo_assets", "model_checks", "streams", "walk_state"),
    },
    {"evaluation", "saving", "loading", "sequential", "width_search", "calibration_text"},
    {"base_card", "widths"},
    {"budget_search", "search_text"},
    {"planning"},
    {"thresholds"},
    {"card", "global_budget", "hub"},
    {"outline", "result"},
    {"pipeline", "measuring", "rendering", "recovery", "callback", "tables", "cli_options", "export", "space"},
    {"scores", "cells"},
    {"matrix_facts"},
    {"sweep", "matrix"},
    {"cli_output", "cli_questions"},
    {"cli_evaluate", "cli_export", "cli_proof", "cli_publish", "cli_recover", "cli_report", "cli_serve", "cli_space"},
    {"cli", "demo"},
    {"__main__"},
]
# Modules of one layer don't import one another, but for these: (importer, what it may import).
ALLOWED_SIBLINGS = {
    *(("architectures", "modeling"), ("plan", "modeling.specs"), ("overlap", "data")),
    *(("loading", "saving"), ("cli", "demo"), ("forwards", "architectures")),
    *(("vocabulary", "surgery"), ("magnitudes", "calibration"), ("recovery", "pipeline"), ("measuring", "pipeline")),
}
# Those on top use the public API; nothing below them imports the package's own __init__.
MAY_IMPORT_PUBLIC_API = {"cli", "demo", "__main__"}

SHIPPED_LIBRARIES = {"torch", "transformers", "huggingface_hub"}
PURE_MODULES = {"criteria", "allocation", "reconstruction", "linalg"}
MAY_PRINT = {"cli_output"}


def is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", None)
    return name == "TYPE_CHECKING"


def import_nodes(node: ast.AST, *, type_checking: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif is_type_checking(child) and not type_checking:
            for other in child.orelse:
                yield from import_nodes(ast.Module([other], []))
        else:
            yield from import_nodes(child, type_checking=type_checking)


def imports(module: str, source: str, *, is_package: bool = False, type_checking: bool = False) -> set[str]:
    """Absolute dotted names that a module imports, with the imported attribute: ``hf_context_prune.modeling.plan.LayerPlan``."""
    names = set()
    for node in import_nodes(ast.parse(source), type_checking=type_checking):
        base = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = module.split(".")
            package = parts[: len(parts) - node.level + is_package]
            base = ".".join([*package, *filter(None, [node.module])])
        names |= {f"{base}.{alias.name}" if base else alias.name for alias in node.names}
    return names


def layer_of(name: str) -> int:
    found = [index for index, layer in enumerate(LAYERS) if name in layer]
    assert found, f"{name} is in no layer: add it to LAYERS in tests/test_layering.py (see DESIGN.md for which)"
    return found[0]


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Why a module breaks the layering; empty if it does not."""
    own = module.split(".")[1]
    own_layer, found = layer_of(own), []
    for name in sorted(imports(module, source, is_package=is_package)):
        package, _, path = name.partition(".")
        top = path.split(".")[0]
        if package != PACKAGE or top in (own, "__version__"):
            continue
        if not any(top in layer for layer in LAYERS) and top not in MODULES:
            if own not in MAY_IMPORT_PUBLIC_API:
                found.append(f"{module} imports {name} through the package's __init__: import it from its own module")
        elif layer_of(top) > own_layer:
            found.append(f"{module} (layer {own_layer}) imports {name}, which is above it (layer {layer_of(top)})")
        elif layer_of(top) == own_layer and not any(
            own == importer and f"{path}.".startswith(f"{allowed}.") for importer, allowed in ALLOWED_SIBLINGS
        ):
            found.append(f"{module} imports {name}, its sibling in layer {own_layer}")
    return found


def dotted(path: Path) -> str:
    return ".".join([PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


# Templates are data: files of the Space, which the package never imports.
FILES = sorted(path for path in ROOT.rglob("*.py") if "templates" not in path.relative_to(ROOT).parts)
MODULES = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
BELOW_INIT = [path for path in FILES if path != ROOT / "__init__.py"]


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


@pytest.mark.parametrize("path", BELOW_INIT, ids=names(BELOW_INIT))
def test_imports_go_downward(path):
    found = violations(dotted(path), path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_only_the_command_line_prints(path):
    if path.stem in MAY_PRINT:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    lines = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not lines, f"{path.name} calls print() on line {lines}: only cli_output.py prints"


SHIPPED = sorted((ROOT / "modeling").glob("*.py"))


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_shipped_files_stand_alone(path):
    siblings = {f"{PACKAGE}.modeling.{sibling.stem}" for sibling in SHIPPED}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in import_nodes(tree):
        absolute = isinstance(node, ast.ImportFrom) and node.level == 0
        tops = {node.module.split(".")[0]} if absolute else {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.Import) or absolute:
            foreign = tops - SHIPPED_LIBRARIES - sys.stdlib_module_names
            assert not foreign, (
                f"{path.name} imports {foreign}; it travels with saved models, so only {SHIPPED_LIBRARIES}"
            )
        else:
            bases = {f"{PACKAGE}.modeling.{name}" for name in ([node.module] if node.module else tops)}
            assert node.level == 1, f"{path.name} imports from above modeling/: it travels without the package"
            assert bases <= siblings, f"{path.name} imports {bases - siblings}, which does not travel with it"


@pytest.mark.parametrize("name", sorted(PURE_MODULES & MODULES))
def test_tensor_maths_knows_no_models_and_no_hub(name):
    found = imports(f"{PACKAGE}.{name}", (ROOT / f"{name}.py").read_text(encoding="utf-8"), type_checking=True)
    assert not {target.split(".")[0] for target in found} & {"transformers", "huggingface_hub"}


# --- the checker itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "from .plan import PruningPlan"),
        ("criteria", "def score():\n    from .pipeline import prune"),
        ("criteria", "from . import surgery"),
        ("criteria", "import hf_context_prune.pruning.surgery"),
        ("criteria", "from hf_context_prune.pruning.surgery import apply"),
        ("criteria", "from hf_context_prune import prune"),
        ("criteria", "try:\n    from .cli import main\nexcept ImportError:\n    raise"),
        ("plan", "from .modeling import SPECS"),
        ("plan", "from .modeling.specs_other import SPECS"),
        ("evaluation.speed", "from ..saving import verify_folder"),
        ("evaluation.speed", "from ..pipeline import prune"),
        ("config", "if TYPE_CHECKING:\n    import os\nelse:\n    from .cli import main"),
    ],
)
def test_violations_are_seen(module, source):
    assert len(violations(f"{PACKAGE}.{module}", source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("criteria", "import torch\nfrom .errors import ConfigError\nfrom .plan import PruningPlan"),
        ("plan", "from .modeling.specs import SPECS"),
        ("plan", "from .modeling import specs"),
        ("architectures", "from .modeling import SPECS"),
        (
            "evaluation.speed",
            "from .perplexity import x\nfrom ..errors import y\nfrom . import report\nfrom .. import data",
        ),
        ("config", "if typing.TYPE_CHECKING:\n    from .cli import main"),
        ("card", "from . import __version__"),
        ("cli", "from hf_context_prune import prune"),
    ],
)
def test_allowed_imports_pass(module, source):
    assert violations(f"{PACKAGE}.{module}", source) == []


def test_relative_imports_of_a_package_start_at_itself():
    source = "from ._bootstrap import Estimate\nfrom ..card import render"
    assert imports(f"{PACKAGE}.evaluation", source, is_package=True) == {
        f"{PACKAGE}.evaluation._bootstrap.Estimate",
        f"{PACKAGE}.card.render",
    }


def test_a_new_module_must_be_given_a_layer():
    with pytest.raises(AssertionError, match="add it to LAYERS"):
        violations(f"{PACKAGE}.brand_new", "import os")
