"""A save that is killed, runs out of room or meets another one: the target is absent or whole, debris is swept."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hf_context_prune.errors import SaveError
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.staging import check_target, staged_folder

CHILD = Path(__file__).with_name("saving_child.py")
ROOT = Path(__file__).parents[2]
OLD, NEW = b"old", b"new" * 1000

BEFORE = [
    "before-staging",
    "not-marked",
    "marked",
    "first-file",
    "before-manifest",
    "manifest-not-flushed",
    "before-rename",
]
PLACED = ["placed", "unmarked", "done"]
PLACED_OVER_OLDER = [
    *("removing-older", "older-removed", "two-renames-placed", "two-renames-removing-older"),
    "two-renames-removed-in-part",
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills children and sets limits as Linux does")


@pytest.fixture(autouse=True)
def _locks_of_this_test(tmp_path_factory, monkeypatch):
    folder = str(tmp_path_factory.mktemp("locks"))
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", folder)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "work" / "mini-gpt"


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, CHILD, *map(str, arguments)], stdout=subprocess.PIPE, env=environment)


@contextlib.contextmanager
def stopped_child(target, point):
    """A child that waits at a point of its save; killed at the end of the block."""
    with start("kill", target, point) as child:
        try:
            assert child.stdout.readline() == b"ready\n"
            yield
        finally:
            child.kill()


def kill_at(target, point):
    with stopped_child(target, point):
        pass


def make_older(target):
    with staged_folder(target, required_bytes=0) as folder:
        (folder / "model.safetensors").write_bytes(OLD)
        (folder / "only_in_older.txt").write_bytes(OLD)


def content(target):
    """The weights of a whole folder; None where there is none."""
    if not target.exists():
        return None
    verify_folder(target)
    return (target / "model.safetensors").read_bytes()


def failing_run(target):
    """The next run for the target, which sweeps but then fails: it shows what a run finds."""
    with pytest.raises(ZeroDivisionError), staged_folder(target, required_bytes=0):
        raise ZeroDivisionError


def assert_alone(target):
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("point", [*BEFORE, *PLACED])
def test_killed_without_older(target, point):
    target.parent.mkdir()
    kill_at(target, point)
    expected = NEW if point in PLACED else None
    assert content(target) == expected
    failing_run(target)
    assert content(target) == expected
    make_older(target)
    assert content(target) == OLD
    assert_alone(target)


@pytest.mark.parametrize("point", [*BEFORE, "two-renames-between", *PLACED, *PLACED_OVER_OLDER])
def test_killed_over_older(target, point):
    make_older(target)
    kill_at(target, point)
    if point == "two-renames-between":
        assert content(target) is None
        expected = OLD
    else:
        expected = NEW if point in [*PLACED, *PLACED_OVER_OLDER] else OLD
        assert content(target) == expected
    failing_run(target)
    assert content(target) == expected
    assert (target / "only_in_older.txt").exists() == (expected == OLD)
    assert_alone(target)


def test_older_is_put_back_over_an_empty_folder_made_since(target):
    make_older(target)
    kill_at(target, "two-renames-between")
    target.mkdir()
    failing_run(target)
    assert content(target) == OLD
    assert_alone(target)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("writer", ["python", "safetensors", "tokenizers", "copy", "numpy"])
def test_file_size_limit(target, writer, older):
    if older:
        make_older(target)
    else:
        target.parent.mkdir()
    with start("limit", target, writer) as child:
        message = child.stdout.read().decode()
    assert child.returncode == 0
    assert ("requested and" if writer == "numpy" else "File too large") in message  # numpy does not tell the reason
    assert "choose another --output" in message
    assert str(target) in message
    assert ".safetensors" in message if writer == "safetensors" else "of " in message
    assert content(target) == (OLD if older else None)
    assert [path.name for path in target.parent.iterdir()] == ([target.name] if older else [])


def test_second_process_is_refused(target):
    make_older(target)
    with stopped_child(target, "first-file"):
        with pytest.raises(SaveError, match="Another run is saving"), staged_folder(target, required_bytes=0):
            pytest.fail("entered beside another run")
        assert content(target) == OLD
        assert len(list(target.parent.glob(".mini-gpt.staging-*"))) == 1, "the live run's folder was swept"
        with staged_folder(target.with_name("other"), required_bytes=0):
            pass
    make_older(target)
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name, "other"]


@pytest.mark.parametrize("point", ["first-file", "before-manifest", "before-rename"])
def test_the_folder_of_a_live_run_with_another_temporary_folder_is_kept(target, point, tmp_path, monkeypatch):
    make_older(target)
    with stopped_child(target, point):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
        before = sorted(target.parent.rglob("*"))
        for use in (check_target, failing_run):
            with pytest.raises(SaveError, match=r"Another run is saving to .*mini-gpt .*choose another --output"):
                use(target)
        assert sorted(target.parent.rglob("*")) == before
    failing_run(target)
    assert content(target) == OLD
    assert_alone(target)
