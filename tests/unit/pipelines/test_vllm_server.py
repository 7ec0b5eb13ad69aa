"""How vLLM is started, and what is refused before; tests/integration/test_vllm.py has the server itself."""

from __future__ import annotations

import json

import pytest

from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.pipelines.vllm_server import serve_with_vllm
from tests.support.export_folders import save

STATUS = 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    return {kind: save(root / kind, variable=kind == "variable") for kind in ("native", "variable")}


@pytest.fixture
def environment(tmp_path):
    """A stand-in for the Python of an environment: it says what is installed there, and writes down its arguments."""

    def make(version="0.32.0", plugin=False):
        python = tmp_path / "python"
        answer = json.dumps({"version": version, "plugin": plugin})
        python.write_text(
            f"#!/bin/sh\nif [ \"$1\" = -c ]; then echo '{answer}'; exit; fi\n"
            f"printf '%s\\n' \"$@\" > {tmp_path}/arguments\nexit {STATUS}\n"
        )
        python.chmod(0o755)
        return python

    make.arguments = lambda: (tmp_path / "arguments").read_text().split()
    return make


@pytest.mark.parametrize(
    ("kind", "plugin", "added"),
    [
        ("variable", False, ["--model-impl", "transformers", "--trust-remote-code"]),
        ("variable", True, ["--model-impl", "transformers"]),
        ("native", False, []),
    ],
)
def test_the_command(folders, environment, kind, plugin, added):
    folder = folders[kind]
    status = serve_with_vllm(folder, ["--port", "8001"], python=environment(plugin=plugin))
    expected = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *added, "--port", "8001"]
    assert environment.arguments() == expected
    assert status == STATUS


@pytest.mark.parametrize(
    ("version", "says"), [(None, "has no vLLM"), ("0.31.4", "has vLLM 0.31.4, which takes all layers for equal")]
)
def test_a_missing_or_old_vllm_is_named_with_the_way_to_install_it(folders, environment, version, says):
    with pytest.raises(ConfigError, match=says + r".*pip install vllm.*--python"):
        serve_with_vllm(folders["variable"], python=environment(version))


def test_no_python(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"no Python that runs.*--python"):
        serve_with_vllm(folders["variable"], python=tmp_path / "none")


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        (["--tensor-parallel-size", "2"], True),
        (["--tensor-parallel-size=2"], True),
        (["-tp", "2"], True),
        (["-tp", "1"], False),
        (["--tensor-parallel-size", "many"], False),
        (["--tensor-parallel-size"], False),
    ],
)
def test_kv_groups_that_processes_cannot_share(folders, environment, given, refused):
    folder = folders["variable"]
    groups = {values.get("num_key_value_heads") for values in read(folder)["per_layer_config"].values()}
    assert 1 in groups
    if refused:
        with pytest.raises(ConfigError, match=r"layer \d has 1 KV groups.*Of this folder, 1 can"):
            serve_with_vllm(folder, given, python=environment())
    else:
        assert serve_with_vllm(folder, given, python=environment()) == STATUS


def test_a_folder_of_an_older_version_needs_the_package(folders, environment, monkeypatch, tmp_path):
    from hf_context_prune.pipelines import vllm_server

    folder = folders["variable"]
    config = vllm_server.read_config(str(folder), folder, None)
    del config.auto_map["AutoModel"]
    monkeypatch.setattr(vllm_server, "read_config", lambda *given: config)
    with pytest.raises(ConfigError, match=r"older version.*install hf-context-prune in vLLM's environment"):
        serve_with_vllm(folder, python=environment())
    assert serve_with_vllm(folder, python=environment(plugin=True)) == STATUS


def test_damaged_folders_and_exports_are_refused(folders, environment, tmp_path, monkeypatch):
    with pytest.raises(LoadError):
        serve_with_vllm(tmp_path, python=environment())
    from hf_context_prune.pipelines import vllm_server

    monkeypatch.setattr(vllm_server, "verify_folder", lambda folder: {"files": {"export_report.json": {}}})
    with pytest.raises(ConfigError, match="is an export"):
        serve_with_vllm(folders["native"], python=environment())


def read(folder):
    return json.loads((folder / "config.json").read_text())
