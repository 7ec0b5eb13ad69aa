"""Finished work of a killed run: its key, its folder, and its lock."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import warnings

import pytest
import torch

from hf_context_prune.errors import PruningWarning, SaveError
from hf_context_prune.modeling.plan import fingerprint
from hf_context_prune.storage.cache import cache_dir
from hf_context_prune.storage.own_folders import MARKER
from hf_context_prune.storage.resume import open_resume_folder, resume_key
from hf_context_prune.utils.locks import hold_lock
from tests.support.tiny import VOCABULARY, tiny_model


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache"))


def tokens(seed=0):
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids}]


def rope(model):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 50.0}


def epsilon(model):
    model.config.rms_norm_eps = 0.1


def attention(model):
    model.config._attn_implementation = "eager"


def one_weight(model):
    """A value that the plan's fingerprint does not look at."""
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.view(-1)[1] += 1.0


def a_buffer(model):
    model.model.rotary_emb.inv_freq[0] *= 2


@pytest.mark.parametrize("change", [rope, epsilon, attention, one_weight, a_buffer])
def test_another_model_has_another_key(change):
    model = tiny_model("llama", intermediate_size=512)
    other = copy.deepcopy(model)
    change(other)
    assert fingerprint(other) == fingerprint(model)
    assert resume_key(other, tokens()) != resume_key(model, tokens())
    assert resume_key(copy.deepcopy(model), tokens()) == resume_key(model, tokens())


def test_dtype_text_options_and_threads_count_too(monkeypatch):
    model = tiny_model("llama").to(torch.bfloat16)
    keys = [
        resume_key(model, tokens(), "obs", 0.3),
        resume_key(model, tokens(), "obs", 0.5),
        resume_key(model, tokens(1), "obs", 0.3),
        resume_key(copy.deepcopy(model).float(), tokens(), "obs", 0.3),  # the same values
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.append(resume_key(model, tokens(), "obs", 0.3))
    assert len(set(keys)) == len(keys)


def test_it_goes_with_the_work_and_stays_for_another_try():
    with open_resume_folder("a") as folder:
        (folder / "layer").touch()
    assert not folder.exists()

    def stopped(name, *files):
        with open_resume_folder(name) as folder:
            for file in files:
                (folder / file).touch()
            (folder / "key").mkdir()
            places.append(folder)
            raise KeyboardInterrupt

    places = []
    for name, files in (("a", ["layer"]), ("b", [])):
        with pytest.raises(KeyboardInterrupt):
            stopped(name, *files)
    assert (folder / "layer").exists()
    assert places[0] == folder != places[1]
    assert not places[1].exists()  # nothing was finished
    with open_resume_folder("a") as again:
        assert again == folder
        assert (again / "layer").exists()


def test_only_marked_folders_that_nobody_took_up_are_forgotten(tmp_path):
    root = cache_dir() / "unfinished"
    stale, at_work, recent, foreign, other_name, linked = ("a" * 32, "b" * 32, "c" * 32, "d" * 32, "notes", "e" * 32)
    for name in (stale, at_work, recent, foreign, other_name):
        (root / name / "sequential").mkdir(parents=True)
        (root / name / "sequential" / "layer").touch()
        if name != foreign:
            (root / name / MARKER).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / MARKER).touch()
    (root / linked).symlink_to(tmp_path / "elsewhere")
    for path in sorted((*root.rglob("*"), tmp_path / "elsewhere" / MARKER), reverse=True):
        os.utime(path, (0, 0), follow_symlinks=False)
    os.utime(root / recent / "sequential" / "layer")
    with hold_lock(root / at_work), open_resume_folder("a") as folder:
        assert {path.name for path in root.iterdir()} - {folder.name} == {at_work, recent, foreign, other_name, linked}
    assert (root / foreign / "sequential" / "layer").exists()
    assert (tmp_path / "elsewhere" / MARKER).exists()


def test_a_folder_that_is_not_marked_is_neither_used_nor_removed(tmp_path):
    with open_resume_folder("a") as folder:
        pass
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.warns(PruningWarning, match="not a folder of this package"), open_resume_folder("a") as opened:
        assert opened is None
    assert os.listdir(folder) == ["thesis.tex"]


def test_a_second_run_of_the_same_is_refused_and_takes_nothing_away():
    def run_again():
        """Another process, which takes the lock as `open_resume_folder` does; without torch it starts fast."""
        lock = f"hold_lock(pathlib.Path({str(folder)!r}), what='doing the same')"
        code = f"import pathlib\nfrom hf_context_prune.utils.locks import hold_lock\nwith {lock}: print('went on')"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    with open_resume_folder("a") as folder:
        (folder / "layer").touch()
        with pytest.raises(SaveError, match=r"Another run is doing the same .*: wait for it"), open_resume_folder("a"):
            pass
        found = run_again()
        assert "Another run is doing the same" in found.stderr
        assert "went on" not in found.stdout
        assert (folder / "layer").exists()
        with open_resume_folder("another output"):
            pass
    assert run_again().stdout == "went on\n"


def test_a_second_run_with_another_temporary_folder_is_refused_too(tmp_path, monkeypatch):
    with open_resume_folder("a") as folder:
        (folder / "layer").touch()
        for path in (folder, *folder.iterdir()):
            os.utime(path, (0, 0))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with pytest.raises(SaveError, match="Another run is doing the same, and keeps"), open_resume_folder("a"):
            pass
        with open_resume_folder("another output"):
            pass
        assert (folder / "layer").exists()
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_is_told_and_nothing_is_kept(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with (
        pytest.warns(PruningWarning, match="HF_CONTEXT_PRUNE_CACHE"),
        open_resume_folder("a") as folder,
    ):
        assert folder is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "cache").unlink()
        with open_resume_folder("a") as folder:
            assert folder.is_dir()
