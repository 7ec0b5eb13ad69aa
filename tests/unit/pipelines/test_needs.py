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

from hf_context_prune import (
    EvalOptions,
    PrunerConfig,
    RecoveryConfig,
    load_model,
    prune,
    prune_to_folder,
    recover,
)
from hf_context_prune.errors import BudgetError, ConfigError, SaveError
from hf_context_prune.pipelines import needs as needs_module
from hf_context_prune.pipelines.dry_run import dry_run
from hf_context_prune.pipelines.needs import Needs, estimate_needs
from hf_context_prune.storage.staging import bytes_with_margin
from hf_context_prune.utils.memory import free_memory, memory_limit, own_memory, parse_bytes, reserve_memory
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


@pytest.mark.parametrize("value", ["8 things", "", "0", 0, -5, True, "GiB", "8G", "8_0GiB", "1e400GiB", "infGB", 1.5])
def test_a_limit_that_is_no_size_is_refused(place, value):
    with pytest.raises(ConfigError, match=r"max_memory.*'8GiB'"):
        prune(place / "base", place / "data.jsonl", CONFIG, max_memory=value)


def test_without_room_on_a_disk_nothing_begins(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache"))
    full = shutil.disk_usage(tmp_path)._replace(free=999)
    monkeypatch.setattr("hf_context_prune.pipelines.needs.shutil.disk_usage", lambda path: full)
    monkeypatch.setattr("hf_context_prune.pipelines.prune.Comparison", None)  # the first long work
    with pytest.raises(
        SaveError, match=r"has 999 bytes free.*the result and finished work will need.*--output, HF_CONTEXT_PRUNE_CACHE"
    ):
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

    result = bytes_with_margin(20)  # as saving asks for
    assert refused(10, result) is None
    assert "finished work will need 10 bytes" in refused(9, result)
    assert f"the result will need {result} bytes" in refused(10, result - 1)
    large = Needs("a step", 1, resume_disk=10, output_disk=3 * 10**9)  # its layers lie in the cache until the end
    result = bytes_with_margin(3 * 10**9)
    assert "finished work" in refused(result, result, large)
    assert refused(result + 10, result, large) is None


def test_hidden_states_that_do_not_fit_need_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(needs_module, "_disk", lambda folder: folder.name)
    free = {"tmp": 10**9 - 1, tmp_path.name: 10**12}
    monkeypatch.setattr(needs_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path.name]))
    needs = Needs("a step", 1, resume_disk=0, output_disk=0, streams=10**9)
    with memory_limit(own_memory() + 10**9):
        with pytest.raises(SaveError, match=r"hidden states will need 1000000000 bytes.*\(TMPDIR\)"):
            needs.check_disk(tmp_path / "out", None)
        assert "1.0 GB for hidden states" in str(needs)
        free["tmp"] += 1
        needs.check_disk(tmp_path / "out", None)
    with memory_limit(own_memory() + 3 * 10**9):
        free["tmp"] = 0
        needs.check_disk(tmp_path / "out", None)
        assert "hidden states" not in str(needs)


def test_a_training_counts(place, monkeypatch):
    recovery = RecoveryConfig(max_steps=1, max_seq_length=32)
    needs = {
        method: estimate_needs(shape_of_8b(), CONFIG, 10**9, RecoveryConfig(method=method))
        for method in ("full", "lora")
    }
    assert needs["full"].step == "the training"
    assert needs["full"].step_memory > needs["lora"].step_memory > 6 * 10**9
    assert needs["full"].training_disk == (2 + 32) * 10**9
    monkeypatch.setattr("hf_context_prune.pipelines.needs.training_bytes", lambda *_: 2**50)
    monkeypatch.setattr("hf_context_prune.pipelines.prune.Comparison", None)  # the first long work
    with pytest.raises(BudgetError, match=r"the training.*low-rank adapters \(method 'lora'"):
        prune(place / "base", place / "data.jsonl", CONFIG, eval_options=QUICK, recovery=recovery)
    assert "the training" in dry_run(place / "base", CONFIG, recovery=recovery).missing_memory


def test_recover_refuses_what_does_not_fit(place):
    loaded = load_model(place / "base")
    with memory_limit(own_memory() + 2**20), pytest.raises(ConfigError, match=r"Training all weights.*GiB.*'lora'"):
        recover(loaded.model, place / "data.jsonl", RecoveryConfig(max_steps=1), tokenizer=loaded.tokenizer)


def test_a_dry_run_counts_weights_that_are_converted(tmp_path):
    shape_of_8b().config.save_pretrained(tmp_path)  # float32
    same, other = (
        dry_run(tmp_path, PrunerConfig(mlp_ratio=0.5), dtype=dtype, max_memory=1) for dtype in ("auto", "bfloat16")
    )
    takes = [float(re.search(r"takes (\S+) GiB", found.missing_memory).group(1)) for found in (same, other)]
    assert takes[1] - takes[0] > 1.9 * same.base_parameters / 2**30


def test_a_dry_run_looks_at_the_disks(place, tmp_path, monkeypatch):
    found = dry_run(place / "base", CONFIG, output=tmp_path / "new" / "out")
    assert (found.missing_disk, found.conversion_disk) == (None, 0)
    monkeypatch.setattr("hf_context_prune.pipelines.needs.shutil.disk_usage", lambda _: SimpleNamespace(free=999))
    found = dry_run(place / "base", CONFIG, output=tmp_path / "new" / "out")
    assert "has 999 bytes free" in found.missing_disk
    assert not (tmp_path / "new").exists()


def test_what_the_machine_lacks_is_not_laid_to_the_limit(monkeypatch):
    needs = Needs("a step", 2**50, resume_disk=0, output_disk=0)
    monkeypatch.setattr(needs_module, "reserved_by_others", dict)  # another test may run beside this one
    assert re.fullmatch(
        r"The largest step \(a step\).*this machine has \S+ GiB free\. Close other.*", needs.missing_memory()
    )
    monkeypatch.setattr(needs_module, "reserved_by_others", lambda: {7: 2**30, 9: 2**31, 11: 0})
    assert "3.00 GiB that other runs will take. Wait for them (process 7, 9)" in needs.missing_memory()
    assert "max_memory" not in needs.missing_memory()


def test_a_limit_that_is_no_size_is_refused_before_the_model_is_read(place, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_context_prune.pipelines.prune.load_model", None)
    monkeypatch.setattr("hf_context_prune.pipelines.dry_run.load_meta_model", None)
    with pytest.raises(ConfigError, match="max_memory is 'lots'"):
        prune_to_folder(place / "base", place / "data.jsonl", tmp_path / "out", CONFIG, max_memory="lots")
    with pytest.raises(ConfigError, match="max_memory is 'lots'"):
        dry_run(place / "base", CONFIG, max_memory="lots")


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
    sizes = {None: None, "8GiB": 2**33, "8 gib ": 2**33, "1.5KiB": 1536, "800MB": 8 * 10**8, "8gb": 8 * 10**9}
    sizes |= {10**9: 10**9, "8000000000": 8 * 10**9, "2TB": 2 * 10**12}
    assert {value: parse_bytes(value) for value in sizes} == sizes


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
                assert 0 <= needs.output_disk - 2 * int(0.8 * model.num_parameters()) < 2**24
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
