"""Trainings in processes of their own: one that is killed and resumed, and two that share the batches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.training.callback.checkpoints import load_checkpoint
from tests.support import callback_cases as cases
from tests.support.hub.process import HubProcess
from tests.support.marks import TINY_TEXT
from tests.support.tiny import tiny_model

pytestmark = [pytest.mark.slow, TINY_TEXT]

TOKEN = "hf_token_of_org"
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


LAUNCHER = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--main_process_ip", "127.0.0.1", "--main_process_port", "0", "--mixed_precision", "no"),
    *("--dynamo_backend", "no"),
)


def run(folder, *mode, launcher=(), **variables):
    """A training in processes of its own; none outlives the call."""
    command = [sys.executable, *launcher, "-m", "tests.support.callback_cases", str(folder), *mode]
    if launcher:
        command = [sys.executable, *launcher, str(Path(cases.__file__)), str(folder), *mode]
    environment = os.environ | ENVIRONMENT | {"HF_HOME": str(folder / "home")} | variables
    if launcher:
        environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    try:
        out, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        pytest.fail(f"the training hangs:\n{out[-3000:]}")
    assert process.returncode == 0, out[-3000:]


def test_killed_and_resumed_ends_with_the_same_weights(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    finish(run(whole))
    second = run(killed, "killed")
    deadline = time.monotonic() + 120
    while not (killed / "now").exists():  # after the checkpoint of step 3, before the pruning of step 6
        assert second.poll() is None, second.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate()
    assert not (killed / "checkpoint-6").exists()
    finish(run(killed, "resume"))
    expected, got = (torch.load(folder / "result.0.pt") for folder in (whole, killed))
    assert expected["plan"] == got["plan"]
    assert expected["final"].keys() == got["final"].keys()
    assert max(float((got["final"][name] - value).abs().max()) for name, value in expected["final"].items()) == 0.0


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Two processes that train, and then train and push: their folder, the files sent, and the Hub's requests."""
    folder = tmp_path_factory.mktemp("two")
    with HubProcess() as hub:
        hub.ask("allow", TOKEN, "org")
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
        finish(run(folder, "train", "push", launcher=LAUNCHER, HF_HUB_DISABLE_XET="1", **online))
        repo = hub.at("models", "org/two")
        return folder, repo.commits[repo.refs["main"]], hub.log


@pytest.fixture
def two(both):
    return both[0] / "train"


def test_all_processes_hold_the_same(two):
    first, second = (torch.load(two / f"result.{rank}.pt") for rank in (0, 1))
    assert first["plan"] == second["plan"]
    assert first["steps"].keys() == second["steps"].keys() == set(range(1, cases.STEPS + 1))
    for step, weights in first["steps"].items():
        assert all(torch.equal(value, second["steps"][step][name]) for name, value in weights.items())
    assert all(torch.equal(value, second["final"][name]) for name, value in first["final"].items())


def test_they_end_where_one_process_ends(two, tmp_path):
    trainer = cases.trainer_for(tmp_path, hook := cases.ContextPruneCallback(cases.config_for(), cases.SCHEDULE))
    trainer.train()
    result = torch.load(two / "result.0.pt")
    assert result["plan"]["layers"] == hook.plan.to_dict()["layers"]
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(result["final"][name], value, atol=2e-3, rtol=1e-3)


def test_their_folder_is_small(two):
    model = load_checkpoint(two / "final")
    assert {widths.neurons for widths in read_geometry(model.config, spec_of(model.config)).layers} == {20}
    assert model.num_parameters() < 0.8 * tiny_model("llama").num_parameters()
    assert model.config.use_cache
    checkpoint = load_checkpoint(two / "checkpoint-6")  # as wide as before, with zeros
    assert checkpoint.num_parameters() == tiny_model("llama").num_parameters()
    assert (checkpoint.model.layers[0].mlp.up_proj.weight == 0).all(dim=1).sum() == 20


def test_their_push_is_one_commit_of_the_end(both, tmp_path):
    folder, sent, log = both
    assert sum("/commit/" in request.path for request in log) == 1  # checkpoints are as wide as before
    assert {"README.md", "pruning_plan.json", "manifest.json", "model.safetensors"} <= sent.keys()
    assert not [name for name in sent if name.endswith((".bin", ".pt")) or "optimizer" in name]
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    arrived = load_checkpoint(tmp_path).state_dict()
    final = torch.load(folder / "push" / "result.0.pt")["final"]
    assert all(torch.equal(value, final[name]) for name, value in arrived.items())
