"""Two runs with one output: the second is refused from the start of the first to its end, and told who it is."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hf_context_prune.errors import SaveError
from hf_context_prune.storage.staging import staged_folder
from hf_context_prune.utils import locks
from hf_context_prune.utils.locks import hold_lock, reserve_output, reserves

RUN = """
import sys
from hf_context_prune.utils.locks import reserve_output
with reserve_output(sys.argv[1]):
    print("at work", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def locks_of_this_test(tmp_path_factory, monkeypatch):
    folder = str(tmp_path_factory.mktemp("locks"))
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", folder)


def start(output, *options):
    """Another process that is at work for an output, until its input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = subprocess.Popen([sys.executable, "-c", RUN, output, *options], **pipes)
    assert child.stdout.readline() == "at work\n"
    return child


def save(target):
    with staged_folder(target, required_bytes=0) as folder:
        (folder / "config.json").write_text("{}")


def test_the_second_run_is_told_which_command_is_at_work(tmp_path):
    secret = "hf_" + "a" * 34
    options = ["--max-eval-tokens", "500", "--new-tokens=9", "--tokenizer", "mine"]
    options += ["--hub-token", "swordfish", "--api-key=swordfish", "--note", secret, "HF_TOKEN=swordfish"]
    options += ["--token", "swordfish", "--client-secret", "swordfish", "--password=swordfish"]
    options += ["https://me:swordfish@example.org/x"]
    with start(tmp_path / "out", *options) as child:
        (tmp_path / "link").symlink_to(tmp_path / "out")
        for output in (tmp_path / "out", tmp_path / "link", os.path.relpath(tmp_path / "out")):
            with pytest.raises(SaveError, match="wait for it to end, or choose another --output") as caught:
                reserve_output(output).__enter__()
        message = str(caught.value)
        with pytest.raises(SaveError, match="Another run"):
            save(tmp_path / "out")
        with reserve_output(tmp_path / "other"):
            save(tmp_path / "other")
        child.communicate("")
    assert f"Another run is saving to {tmp_path / 'out'} (process {child.pid} since 20" in message
    shown = (
        "--max-eval-tokens 500 --new-tokens=9 --tokenizer mine --hub-token ... --api-key=... --note ... HF_TOKEN=..."
    )
    assert f"{shown} --token ... --client-secret ... --password=... https://...@example.org/x)" in message
    assert "swordfish" not in message
    assert secret not in message
    with reserve_output(tmp_path / "out"):
        save(tmp_path / "out")


def test_a_killed_run_holds_nothing(tmp_path):
    with start(tmp_path / "out") as child:
        child.kill()
    with reserve_output(tmp_path / "out"):
        pass


def test_a_run_saves_to_its_own_output_once_at_a_time(tmp_path):
    target = tmp_path / "out"
    with reserve_output(target):
        with reserve_output(target):  # a command and the function that it calls
            save(target)
        save(target)
        with (
            staged_folder(target, required_bytes=0),
            pytest.raises(SaveError, match="Another run"),
            staged_folder(target, required_bytes=0),
        ):
            pytest.fail("entered twice")
    save(target)


def test_a_function_reserves_the_output_that_it_is_given(tmp_path):
    @reserves("output")
    def run(data, output=None):
        if output is not None:
            with start_refused(output):
                pass
        return data

    def start_refused(output):
        child = subprocess.run([sys.executable, "-c", RUN, output], stdin=subprocess.DEVNULL, capture_output=True)
        assert b"Another run is saving to" in child.stderr
        return hold_lock(tmp_path / "other")

    assert run(1) == 1
    assert run(2, tmp_path / "out") == 2
    assert run(3, output=tmp_path / "out") == 3


def test_of_several_processes_the_main_one_holds_the_lock(tmp_path, monkeypatch):
    with start(tmp_path / "out") as child:
        monkeypatch.setattr(locks, "is_main_process", lambda: False)
        with reserve_output(tmp_path / "out"):
            pass
        child.communicate("")


def test_a_note_that_says_nothing_is_no_hindrance(tmp_path, subtests):
    with hold_lock(tmp_path / "out"):
        (note,) = Path(tempfile.gettempdir()).glob("*/*.json")
        for content in (b"", b"\xff", b"[]", b"{}", b'{"pid": "x", "since": 1, "command": 2}', b"[" * 60_000):
            note.write_bytes(content)
            with subtests.test(content[:9]), pytest.raises(SaveError, match=r"Another run is saving to [^(]*: wait"):
                hold_lock(tmp_path / "out").__enter__()
        note.unlink()
        os.mkfifo(note)
        with pytest.raises(SaveError, match=r"Another run is saving to [^(]*: wait"):
            hold_lock(tmp_path / "out").__enter__()


def test_the_folder_of_locks_is_of_this_user_alone(tmp_path, monkeypatch):
    with hold_lock(tmp_path / "out"):
        (folder,) = Path(tempfile.gettempdir()).iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / folder.name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SaveError, match="not a folder of this user"):
        hold_lock(tmp_path / "out").__enter__()
    assert not os.listdir(tmp_path / "elsewhere")
