"""How vLLM is started, and what is refused before; tests/integration/test_vllm.py has the server itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.pipelines.architecture.contract import random_plan
from hf_context_prune.pipelines.vllm_server import vllm_command
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.saving import save_pruned
from tests.support.export_folders import save
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    return {kind: save(root / kind, variable=kind == "variable") for kind in ("native", "variable")}


@pytest.fixture
def environment(tmp_path):
    """A stand-in for the Python of an environment, which says what is installed there."""

    def make(version="0.32.0", plugin=False):
        python = tmp_path / "python"
        answer = json.dumps({"version": version, "plugin": plugin})
        python.write_text(f"#!/bin/sh\necho '{answer}'\n")
        python.chmod(0o755)
        return python

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
    python = environment(plugin=plugin)
    found = vllm_command(folder, ["--port", "8001"], python=python)
    expected = [
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        *added,
        "--port",
        "8001",
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("version", "says"), [(None, "has no vLLM"), ("0.31.4", "has vLLM 0.31.4, which takes all layers for equal")]
)
def test_a_missing_or_old_vllm_is_named_with_the_way_to_install_it(folders, environment, version, says):
    with pytest.raises(ConfigError, match=says + r".*pip install vllm.*--python"):
        vllm_command(folders["variable"], python=environment(version))


def test_no_python(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"--python .*none is no program"):
        vllm_command(folders["variable"], python=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no Python that runs \(CalledProcessError\).*--python"):
        vllm_command(folders["variable"], python=Path("false"))  # found on the path, as a shell does


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        (["--tensor-parallel-size", "2"], True),
        (["--tensor-parallel-size=2"], True),
        (["-tp", "2"], True),
        (["--tensor_parallel_size", "2"], True),
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
        with pytest.raises(ConfigError, match=r"layer \d has 1 KV groups.*no number of processes can"):
            vllm_command(folder, given, python=environment())
    else:
        assert vllm_command(folder, given, python=environment())[-len(given) :] == given


def test_a_folder_of_an_older_version_needs_the_package(folders, environment, monkeypatch, tmp_path):
    from hf_context_prune.pipelines import vllm_server

    folder = folders["variable"]
    config = vllm_server.read_config(str(folder), folder, None)
    del config.auto_map["AutoModel"]
    monkeypatch.setattr(vllm_server, "read_config", lambda *given: config)
    with pytest.raises(ConfigError, match=r"older version.*install hf-context-prune in vLLM's environment"):
        vllm_command(folder, python=environment())
    assert "--trust-remote-code" not in vllm_command(folder, python=environment(plugin=True))


def test_gpt2_is_refused_where_its_widths_vary(environment, tmp_path):
    model = tiny_model("gpt2")
    folder = save_pruned(apply_plan(model, random_plan(model)), tmp_path / "gpt2", tokenizer=tiny_tokenizer())
    with pytest.raises(ConfigError, match="stacked projections of gpt2"):
        vllm_command(folder, python=environment())


def test_the_command_line_becomes_the_server(folders, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nif [ "$1" = -c ]; then echo \'{"version": "0.32.1", "plugin": true}\'; exit; fi\n'
        f'printf "%s\\n" "$@" $HF_HUB_OFFLINE > {tmp_path}/arguments\nexit 7\n'
    )
    python.chmod(0o755)
    command = [sys.executable, "-m", "hf_context_prune", "serve", folders["native"], "--engine", "vllm"]
    done = subprocess.run([*command, "--python", python, "--port", "8001"], check=False)
    assert done.returncode == 7
    assert (tmp_path / "arguments").read_text().split()[-3:] == ["--port", "8001", "1"]
    refused = subprocess.run([*command[:-2], "--python", python], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "give --engine vllm with it" in refused.stderr.replace("\n", " ")


def test_damaged_folders_and_exports_are_refused(folders, environment, tmp_path, monkeypatch):
    with pytest.raises(LoadError, match=r"no readable manifest\.json"):
        vllm_command(tmp_path, python=environment())
    with pytest.raises(LoadError, match="--port stands where the folder should"):
        vllm_command(Path("--port"), python=environment())
    with pytest.raises(LoadError, match="There is no folder org/name"):
        vllm_command(Path("org/name"), python=environment())
    from hf_context_prune.pipelines import vllm_server

    monkeypatch.setattr(vllm_server, "verify_folder", lambda folder: {"files": {"export_report.json": {}}})
    with pytest.raises(ConfigError, match="is an export"):
        vllm_command(folders["native"], python=environment())


def read(folder):
    return json.loads((folder / "config.json").read_text())
