"""What a run needs, and what it says where it may not have it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from hf_context_prune import EvalOptions, PrunerConfig, prune, prune_to_folder
from hf_context_prune.errors import BudgetError, ConfigError, SaveError
from hf_context_prune.pipelines import needs as needs_module
from hf_context_prune.pipelines.dry_run import dry_run
from hf_context_prune.pipelines.needs import Needs, estimate_needs
from hf_context_prune.utils.memory import free_memory, own_memory, parse_bytes, reserve_memory
from hf_context_prune.utils.temporary import own_temporary_folder
from tests.support.marks import TINY_TEXT
from tests.support.tiny import model_and_text, tiny_config, tiny_model

pytestmark = TINY_TEXT
CONFIG = PrunerConfig(mlp_ratio=0.5, max_seq_length=32, num_calibration_samples=16)
QUICK = EvalOptions(max_tokens=300, benchmark=False, memory=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_and_text(tmp_path_factory.mktemp("needs"), "data.jsonl")


@pytest.mark.parametrize("limit", [1, "1MB"])
def test_a_limit_below_what_one_step_needs_is_refused_and_names_the_least_that_can(place, limit):
    with pytest.raises(BudgetError, match=r"Allow \d+\.\d\d GiB in all \(max_memory\)") as caught:
        prune(place / "base", place / "data.jsonl", CONFIG, eval_options=QUICK, max_memory=limit)
    found = dry_run(place / "base", CONFIG, max_memory=limit)  # sizes can be worked out for another machine
    assert "(max_memory)" in found.missing_memory
    assert dry_run(place / "base", CONFIG).missing_memory is None
    least = float(re.search(r"Allow (\S+) GiB", str(caught.value)).group(1)) + 0.02
    prune(place / "base", place / "data.jsonl", CONFIG, eval_options=QUICK, max_memory=f"{int(least * 1024)}MiB")


def test_a_limit_changes_no_bit(place):
    free, tight = (
        prune(place / "base", place / "data.jsonl", CONFIG, eval_options=QUICK, max_memory=limit)
        for limit in (None, own_memory() + 40 * 2**20)
    )
    assert free.plan.layers == tight.plan.layers
    for name, tensor in free.model.state_dict().items():
        assert torch.equal(tensor, tight.model.state_dict()[name]), name
    assert free.report.loss == tight.report.loss


@pytest.mark.parametrize("value", ["8 things", "", "0", 0, -5, True, "GiB"])
def test_a_limit_that_is_no_size_is_refused(place, value):
    with pytest.raises(ConfigError, match=r"max_memory.*'8GiB'"):
        prune(place / "base", place / "data.jsonl", CONFIG, max_memory=value)


def test_without_room_on_a_disk_nothing_begins(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache"))
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("hf_context_prune.pipelines.needs.shutil.disk_usage", lambda path: full)
    monkeypatch.setattr("hf_context_prune.pipelines.prune.Comparison", None)  # the first long work
    with pytest.raises(SaveError, match=r"0\.0 GB free.*result and finished layers will need.*HF_CONTEXT_PRUNE_CACHE"):
        prune_to_folder(place / "base", place / "data.jsonl", tmp_path / "new" / "out", CONFIG, eval_options=QUICK)
    assert not (tmp_path / "new").exists()


def test_disks_of_their_own(tmp_path, monkeypatch):
    needs = Needs("a step", 1, resume_disk=10, output_disk=20)
    for folder in ("cache", "target"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(needs_module, "_disk", lambda folder: folder.name)
    free = {}
    monkeypatch.setattr(needs_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path.name]))

    def refused(cache, target, needs=needs):
        free.update(cache=cache, target=target)
        try:
            needs.check_disk(tmp_path / "target" / "out", tmp_path / "cache")
        except SaveError as error:
            return str(error)
        return None

    assert refused(10, 20) is None
    assert "finished layers" in refused(9, 20)
    assert "result" in refused(10, 19)
    large = Needs("a step", 1, resume_disk=10, output_disk=3 * 10**9)  # its layers lie in the cache until the end
    assert "finished layers" in refused(3 * 10**9, 3 * 10**9, large)
    assert refused(3 * 10**9 + 10, 3 * 10**9, large) is None


def test_two_runs_share_the_memory_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = free_memory()
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        with reserve_memory(300 * 2**20):
            (note,) = own_temporary_folder().glob("memory-*.json")
            assert free_memory() > before - 100 * 2**20  # its own reservation does not count
            about = {"started": psutil.Process(other.pid).create_time(), "most": 4 * 2**30}
            (note.parent / f"memory-{other.pid}.json").write_text(json.dumps(about))
            assert free_memory() < before - 3 * 2**30
            (note.parent / f"memory-{other.pid}.json").write_text(json.dumps(about | {"started": 0}))
            (note.parent / "memory-x.json").write_text("{")
            assert free_memory() > before - 200 * 2**20  # another process that got the same number
            assert not (note.parent / f"memory-{other.pid}.json").exists()
            (note.parent / f"memory-{other.pid}.json").write_text(json.dumps(about))
        assert not note.exists()
    finally:
        other.communicate()
    assert free_memory() > before - 200 * 2**20
    assert [path.name for path in note.parent.glob("memory-*.json")] == ["memory-x.json"]  # of no killed run


def test_sizes():
    assert [parse_bytes(value) for value in (None, "8GiB", "800MB", 10**9)] == [None, 8 * 2**30, 8 * 10**8, 10**9]


def shape_of_8b():
    big = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = tiny_config("llama", **big, head_dim=128, vocab_size=128256, num_hidden_layers=32)
    with torch.device("meta"):
        return type(tiny_model("llama"))(config).to(torch.bfloat16)


def test_a_model_of_8b_fits_into_8_gib(subtests):
    model = shape_of_8b()
    for samples in (8, 128):
        for config in (
            PrunerConfig(pruning_ratio=0.2, allocation="uniform", num_calibration_samples=samples),
            PrunerConfig(pruning_ratio=0.2, num_calibration_samples=samples),
        ):
            with subtests.test(samples=samples, allocation=config.allocation):
                needs = estimate_needs(model, config, int(0.8 * model.num_parameters()))
                assert 2 * 2**30 < needs.step_memory < 7.5 * 2**30
                assert needs.output_disk == 2 * int(0.8 * model.num_parameters())
                assert needs.resume_disk < needs.output_disk
    few, many = (
        estimate_needs(model, PrunerConfig(mlp_ratio=0.2, num_calibration_samples=samples), model.num_parameters())
        for samples in (8, 128)
    )
    assert few.step_memory < many.step_memory
    assert "GiB of memory" in str(many)


def test_the_experts_of_a_layer_count():
    model, found = tiny_model("mixtral"), {}
    for name in ("none", "sequential"):
        config = PrunerConfig(num_experts=4, reconstruction=name, num_calibration_samples=1, max_seq_length=32)
        found[name] = estimate_needs(model, config, 1000)
    weights = 4 * 48 * 40  # of the experts that stay, of one layer
    assert found["sequential"].resume_disk == 3 * 4 * weights
    assert found["none"].resume_disk == 0
    assert found["sequential"].step_memory >= 8 * weights
