"""Temporary folders: failed writes in words, and nothing left, not even by a killed run."""

import errno
import os
import subprocess
import sys
import tempfile
import threading

import pytest

from hf_context_prune.errors import ConfigError, SaveError
from hf_context_prune.utils.files import write_file
from hf_context_prune.utils.memmap import memmap_zeros
from hf_context_prune.utils.temporary import own_temporary_folder, scratch_folder

FULL = OSError(errno.ENOSPC, "No space left on device")
POSIX = pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return own_temporary_folder()


def test_a_folder_of_this_user_alone(root):
    assert root.stat().st_mode & 0o077 == 0
    with scratch_folder() as first, scratch_folder() as second:
        assert first.parent == second.parent == root
        assert first != second
        assert first.stat().st_mode & 0o077 == 0
    assert not os.listdir(root)


def test_failed_writes_in_words(root, subtests):
    for error in (FULL, Exception("No space left on device (os error 28)"), OSError("4 requested and 0 written")):
        with subtests.test(error=error):
            with pytest.raises(SaveError, match=r"could not be written: .*set TMPDIR"), scratch_folder():
                raise error
            assert not os.listdir(root)
    for error in (ConfigError("no"), KeyError("no"), SaveError("elsewhere")):
        with subtests.test(error=error), pytest.raises(type(error), match=str(error)), scratch_folder():
            raise error


def test_no_room_for_a_folder(root, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(root / "scratch"))

    monkeypatch.setattr("pathlib.Path.mkdir", fails)
    with pytest.raises(SaveError, match=r"can't be used: No space left on device\. Make room there"), scratch_folder():
        pytest.fail("made")


def test_no_folder_at_all(monkeypatch):
    def fails():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", fails)
    with pytest.raises(SaveError, match=r"No usable temporary directory found in \['/tmp'\]\. Make room"):
        own_temporary_folder()


def test_a_file_in_its_place_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
    (tmp_path / "other" / f"hf_context_prune-{os.getuid() if os.name == 'posix' else 0}").write_text("mine")
    with pytest.raises(SaveError, match="can't be used"):
        own_temporary_folder()


def test_another_thread_may_end_it(root):
    context = scratch_folder()
    folder = context.__enter__()
    thread = threading.Thread(target=context.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert not folder.exists()
    assert not os.listdir(root)


@POSIX
def test_what_killed_runs_left_is_removed(root, tmp_path):
    """Of a folder, and of a file beside its place; what a run at work has is left alone."""
    script = (
        "import os, sys, pathlib\n"
        "from hf_context_prune.utils.temporary import scratch_folder\n"
        "from hf_context_prune.utils.staged_files import staged_file\n"
        "with scratch_folder() as folder, staged_file(pathlib.Path(sys.argv[1])) as file:\n"
        "    (folder / 'model').write_bytes(b'1')\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    place = tmp_path / "work" / "report.json"
    place.parent.mkdir()
    command = [sys.executable, "-c", script, str(place)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout.readline() == b"ready\n"
        (name,) = (path.name for path in root.iterdir() if path.is_dir())
        with scratch_folder():
            write_file(place, "mine")
        assert (root / name / "model").exists()
        assert len(os.listdir(place.parent)) == 2
        child.kill()
    (place.parent / f".report.json.{'0' * 32}.tmp").write_text("another program's")
    with scratch_folder():
        write_file(place, "again")
    assert not os.listdir(root)
    assert sorted(os.listdir(place.parent)) == [f".report.json.{'0' * 32}.tmp", "report.json"]
    assert place.read_text() == "again"


def test_what_cannot_be_removed_is_tried_again(root, monkeypatch):
    with monkeypatch.context() as patch, scratch_folder() as folder:
        (folder / "file").touch()
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
    assert folder.exists()
    with scratch_folder():
        assert not folder.exists()
    assert not os.listdir(root)


def test_a_mapped_tensor_has_no_file(root):
    import torch

    tensor = memmap_zeros(1000, torch.float32)
    assert not os.listdir(root)
    assert tensor.add_(1).sum() == 1000
