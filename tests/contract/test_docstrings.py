"""The public names say what they take, give and raise; examples are true as far as that can be told without a model."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re

import pytest

import hf_context_prune
from hf_context_prune import PrunerConfig, RecoveryConfig, ThresholdConfig
from hf_context_prune.utils.options import help_of

PUBLIC = {name: getattr(hf_context_prune, name) for name in hf_context_prune.__all__ if name != "__version__"}
FUNCTIONS = {name: item for name, item in PUBLIC.items() if inspect.isfunction(item)}
CLASSES = {name: item for name, item in PUBLIC.items() if inspect.isclass(item)}
WITH_EXAMPLE = {
    *("prune", "prune_to_folder", "PrunerConfig", "evaluate", "recover", "load_pruned", "load_documents"),
    *("ContextPruneCallback", "export_model", "push_folder"),
}
RAISE_NOTHING = {"batches_of"}


def section(doc, title):
    found = re.search(rf"^{title}:\n((?:(?: .*)?\n)*(?: .*)?)", doc, re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_take_give_and_raise(name):
    doc, signature = inspect.getdoc(FUNCTIONS[name]), inspect.signature(FUNCTIONS[name])
    told = re.findall(r"^    \*{0,2}(\w+): ", section(doc, "Args"), re.MULTILINE)
    assert told == list(signature.parameters)
    assert bool(section(doc, "Returns").strip()) == (signature.return_annotation not in ("None", None))
    assert bool(section(doc, "Raises").strip()) == (name not in RAISE_NOTHING)


@pytest.mark.parametrize("config", [PrunerConfig, RecoveryConfig, ThresholdConfig])
def test_help_describes_every_option(config):
    told = section(inspect.getdoc(config), "Attributes")
    for item in dataclasses.fields(config):
        assert f"    {item.name}: {help_of(item)}" in told


def test_classes_have_a_docstring_of_their_own():
    for name, item in CLASSES.items():
        assert item.__doc__, name
        assert not item.__doc__.startswith(f"{name}("), name  # what `dataclass` writes


def examples(doc):
    found = section(doc, "Example")
    return [inspect.cleandoc(code) for code in re.findall(r"```python\n(.*?)```", found, re.DOTALL)]


def test_the_most_used_names_have_an_example():
    assert {name for name, item in PUBLIC.items() if examples(inspect.getdoc(item) or "")} >= WITH_EXAMPLE


@pytest.mark.parametrize("name", [name for name, item in PUBLIC.items() if examples(inspect.getdoc(item) or "")])
def test_examples_are_true(name):
    """They compile, import names that exist, use what they are about, and call it with parameters that it has."""
    for code in examples(inspect.getdoc(PUBLIC[name])):
        tree = ast.parse(code)
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "hf_context_prune"
            for alias in node.names
        }
        assert name in imported <= set(PUBLIC)
        assert max(map(len, code.splitlines())) <= 116
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in imported:
                keywords = {keyword.arg: None for keyword in call.keywords}
                inspect.signature(PUBLIC[call.func.id]).bind(*call.args, **keywords)
