"""A Space's own requirements, installed in a fresh virtual environment, are all that its app.py needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv

import pytest
from gradio_client import Client

from hf_context_prune.publishing.space.folder import make_space_settings, write_space

pytestmark = pytest.mark.nightly


def test_requirements_suffice(tiny_space, tmp_path):
    models = [str(tiny_space / name) for name in ("uniform", "variable")]
    space = write_space(make_space_settings(models, base=str(tiny_space / "base")), tmp_path / "space")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"GRADIO_SERVER_NAME": "127.0.0.1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    subprocess.run([*install, "--requirement", space / "requirements.txt"], check=True, timeout=600, env=environment)
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "list"], check=True, capture_output=True, text=True
    ).stdout
    assert "hf-context-prune" not in listed.replace("_", "-")  # it comes from the wheel in the folder
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([python, space / "app.py"], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        client = Client(_address(process, tmp_path / "log"), verbose=False)
        for name in ("Uniform", "Variable"):
            last = client.predict(name, "the court", new_tokens=3, api_name="/compare")
            assert last["dense"]["tokens"] == last["pruned"]["tokens"] == 3
    finally:
        process.terminate()  # an interrupt is ignored where the tests run in the background
        process.wait(timeout=60)


def _address(process, log) -> str:
    while True:
        text = log.read_text()
        if found := re.search(r"http://127\.0\.0\.1:\d+", text):
            return found.group()
        assert process.poll() is None, text
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
