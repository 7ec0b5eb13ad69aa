"""Nothing in the package can load a pickle: read off its sources."""

from __future__ import annotations

import ast
import re

import pytest
import yaml

from hf_context_prune.utils.reading import _PlainLoader, parse_yaml
from tests.contract.test_layout import ROOT, TREES

SOURCES = TREES | {  # the files of a Space are run as well
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("templates/**/*.py"))
}
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
"""Modules that load pickles, or other code."""
CALLS = {
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url"),
    *("np.load", "numpy.load", "np.fromfile", "pd.read_pickle", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"),
}
PLAIN_YAML = "utils/reading.py yaml.load(text, Loader=_PlainLoader)"
LOADERS = ("AutoModelForCausalLM", "AutoModel", "PreTrainedModel", "AutoPeftModelForCausalLM", "PeftModel", "auto")


def calls():
    """(file:line, dotted name of the function, node) of every call."""
    for name, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{name}:{node.lineno}", ast.unparse(node.func), node


def test_no_module_that_loads_pickles_is_imported():
    found = [
        f"{name}:{node.lineno} {module}"
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        if module.split(".")[0] in MODULES
    ]
    assert found == []


def test_no_function_that_loads_pickles_or_code_is_called():
    assert len(SOURCES) > 150
    found = [f"{where} {ast.unparse(node)}" for where, name, node in calls() if name in CALLS]
    found += [
        f"{where} {keyword.arg}"
        for where, _, node in calls()
        for keyword in node.keywords
        if keyword.arg in ("allow_pickle", "weights_only", "pickle_module")
    ]
    assert [re.sub(r":\d+", "", place) for place in found] == [PLAIN_YAML]


def test_the_one_loader_of_yaml_makes_plain_values_alone():
    assert issubclass(_PlainLoader, yaml.SafeLoader)
    for text in ("!!python/object/apply:os.getcwd []", "!!python/name:os.system", "a: !!set {b}"):
        with pytest.raises(ValueError, match="tag"):
            parse_yaml(text)


def test_every_model_is_loaded_from_safetensors_or_gguf():
    loads = [
        (where, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for where, name, node in calls()
        if name.endswith(".from_pretrained") and name.split(".")[0] in LOADERS
    ]
    assert len(loads) >= 5
    unsafe = [where for where, given in loads if given.get("use_safetensors") != "True" and "gguf_file" not in given]
    assert unsafe == []
