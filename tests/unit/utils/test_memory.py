"""The limit of memory, and pages that are given back."""

from __future__ import annotations

import mmap
import sys
from contextlib import contextmanager

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_context_prune.utils import memory
from hf_context_prune.utils.memory import fits_in_memory, free_memory, memory_limit, own_memory, release_pages

MIB = 2**20


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No other run on this machine, whose reservation would count."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@contextmanager
def new_pages(size):
    """Hold memory of the system's own: a tensor may lie in memory that the process freed and still holds."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        for page in range(0, size, mmap.PAGESIZE):
            pages[page] = 1
        yield


def test_the_limit_counts_what_the_process_holds():
    whole = free_memory()
    with memory_limit(own_memory() + 100 * MIB):
        assert 60 * MIB < free_memory() <= 101 * MIB
        assert fits_in_memory(20 * MIB)
        assert not fits_in_memory(80 * MIB)
        with new_pages(60 * MIB):
            assert free_memory() < 60 * MIB
            with memory_limit(1):
                assert free_memory() == 0
    assert free_memory() > whole // 2
    with memory_limit(None):
        assert free_memory() <= memory.FREE_SHARE * psutil.virtual_memory().total


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, subtests):
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    whole = free_memory()
    for line, folder, limit, usage, prefix in (
        ("0::/user/run", "user/run", "memory.max", "memory.current", ""),
        ("0::/", "", "memory.max", "memory.current", ""),
        ("4:memory:/outer", "memory/outer", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ("4:cpu,memory:/outer", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        with subtests.test(line=line, folder=folder):
            group = tmp_path / folder
            group.mkdir(parents=True, exist_ok=True)
            (tmp_path / "own").write_text(f"9:pids:/\n{line}\n")
            (group / limit).write_text(f"{500 * MIB}\n")
            (group / usage).write_text(f"{300 * MIB}\n")
            (group / "memory.stat").write_text(f"{prefix}active_file {30 * MIB}\n{prefix}inactive_file {20 * MIB}\n")
            assert free_memory() == 250 * MIB
            (group / limit).write_text("max\n")
            assert free_memory() > whole // 2


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
def test_pages_of_a_file_are_given_back_and_no_value_changes(tmp_path):
    values = torch.arange(16 * MIB // 4, dtype=torch.float32)
    save_file({"a": values, "b": values.clone()}, tmp_path / "f.safetensors")
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        read, written = file.get_tensor("a"), file.get_tensor("b")
    written.add_(1)
    assert float(read.sum()) > 0
    before = psutil.Process().memory_info().shared
    release_pages([read, written, values, values[:4].view(2, 2).T, torch.empty(0, 3)])
    assert psutil.Process().memory_info().shared < before - 12 * MIB
    assert torch.equal(read, values)
    assert torch.equal(written, values + 1)


def test_memory_is_known_where_no_temporary_folder_can_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with memory.reserve_memory(MIB):
        assert free_memory() > 0


def test_pages_stay_where_the_system_has_no_such_call(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    values = torch.ones(3)
    release_pages([values])
    assert torch.equal(values, torch.ones(3))


def test_a_note_that_can_not_be_written_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "own_temporary_folder", lambda: tmp_path / "absent")
    with memory.reserve_memory(MIB):
        pass
    (said,) = caplog.messages
    assert said.startswith("Other runs can't be told of the memory that this one will take (No such file or directory)")
