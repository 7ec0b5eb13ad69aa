"""The staged write and the manifest, on plain files and on tiny models."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_context_prune.data.questions import QuestionSet
from hf_context_prune.errors import ContextPruneError, LoadError, SaveError
from hf_context_prune.evaluation.harness import write_harness_task
from hf_context_prune.evaluation.reports.files import check_report_folder
from hf_context_prune.storage import staging
from hf_context_prune.storage.cache import CACHE_VARIABLE, cache_dir
from hf_context_prune.storage.files import check_writable
from hf_context_prune.storage.loading import load_model
from hf_context_prune.storage.manifest import read_manifest, verify_folder
from hf_context_prune.storage.own_folders import MARKER
from hf_context_prune.storage.saving import estimate_bytes, save_pruned, write_model_folder
from hf_context_prune.storage.staging import check_target, staged_folder
from hf_context_prune.utils.file_names import MANIFEST_NAME, PLAN_NAME, REPORT_NAME

SIZES = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def _locks_of_this_test(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("locks")))


@pytest.fixture
def target(tmp_path):
    return tmp_path / "mini-gpt"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {f"w{index}": index for index in range(11)}
    backend = Tokenizer(WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


class Facts:
    """Stands for a plan or a report."""

    def save(self, path):
        Path(path).write_text('{"facts": 1}')


def save(target, content=b"weights", name="model.safetensors"):
    with staged_folder(target, required_bytes=0) as folder:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def fail_midway(target, error):
    with staged_folder(target, required_bytes=2**20) as folder:
        (folder / "vocab.txt").write_bytes(b"half")
        raise error


def snapshot(folder):
    """Everything in a folder: name -> bytes (files) or None (folders)."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def edit_manifest(folder, change):
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# --- a good save -----------------------------------------------------------------------------------------------------


def test_manifest_lists_every_file_with_sha256_and_size(target):
    with staged_folder(target, required_bytes=0) as folder:
        assert folder.parent.parent == target.parent
        assert folder.name == target.name
        assert not os.listdir(folder)
        assert not target.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "größe 模型.txt").write_bytes(b"abc")
        (folder / "empty").write_bytes(b"")
    assert json.loads((target / MANIFEST_NAME).read_text()) == {
        "format": "hf_context_prune",
        "version": 1,
        "files": {
            "empty": {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0},
            "sub/größe 模型.txt": {"sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3},
        },
    }
    assert verify_folder(target) == read_manifest(target)
    assert list(target.parent.iterdir()) == [target]


def test_files_are_as_readable_as_the_folder(target):
    with staged_folder(target, required_bytes=0) as folder:
        (folder / "model.safetensors").write_bytes(b"x")
        (folder / "model.safetensors").chmod(0o600)  # as safetensors does
        folder_mode = stat.S_IMODE(folder.stat().st_mode)
    assert stat.S_IMODE((target / "model.safetensors").stat().st_mode) == folder_mode & 0o666


@pytest.mark.parametrize("exchange", [True, False])
def test_replaces(tmp_path, exchange, monkeypatch, subtests):
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    for older in ("absent", "empty", "ours"):
        with subtests.test(older=older):
            target = tmp_path / older / "mini-gpt"
            if older == "empty":
                target.mkdir(parents=True)
            elif older == "ours":
                save(target, b"old", "old.txt")
            save(target, b"new")
            assert set(snapshot(target)) == {"model.safetensors", MANIFEST_NAME}
            assert list(target.parent.iterdir()) == [target]


def test_relative_target_trailing_slash_and_missing_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("a/b/out/")
    save("./c/../out2")
    assert verify_folder(tmp_path / "a" / "b" / "out")
    assert verify_folder("out2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out2"]


def test_unusual_names(tmp_path, subtests):
    for number, name in enumerate(("größe 模型", "with space", ".hidden", "a[b]*?", "ends.previous.txt", "x" * 200)):
        with subtests.test(name=name):
            parent = tmp_path / str(number)
            save(parent / name, b"old")
            save(parent / name, b"new")
            assert (parent / name / "model.safetensors").read_bytes() == b"new"
            assert [path.name for path in parent.iterdir()] == [name]


def test_link_to_an_older_folder_of_ours_is_followed(tmp_path, target):
    save(target, b"old")
    link = tmp_path / "link"
    link.symlink_to(target)
    save(link, b"new")
    assert link.is_symlink()
    assert (target / "model.safetensors").read_bytes() == b"new"


# --- targets that are refused ----------------------------------------------------------------------------------------


def make_file(path):
    path.write_text("mine")


def make_folder(path):
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def make_folder_with_other_manifest(path):
    make_folder(path)
    (path / MANIFEST_NAME).write_text('{"name": "a web app", "files": {}}')


def make_ours_with_added_file(path):
    save(path)
    (path / ".git").mkdir()
    (path / ".git" / "HEAD").write_text("mine")


def make_link_to_folder(path):
    make_folder(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def make_dangling_link(path):
    path.symlink_to(path.with_name("nowhere"))


def make_mount(path):
    path.mkdir()


REFUSED = {
    "is a file": make_file,
    "was not made by this package": make_folder,
    "it has no manifest": make_folder_with_other_manifest,
    r"\.git/HEAD": make_ours_with_added_file,
    "elsewhere exists": make_link_to_folder,
    "is a link to": make_dangling_link,
    "is a mount point": make_mount,
}


def test_refused_target_is_untouched(tmp_path, monkeypatch, subtests):
    for number, (reason, make) in enumerate(REFUSED.items()):
        with subtests.test(reason=reason):
            parent = tmp_path / str(number)
            parent.mkdir()
            target = parent / "mini-gpt"
            make(target)
            if reason == "is a mount point":
                monkeypatch.setattr(os.path, "ismount", lambda path, target=target: Path(path) == target)
            before = snapshot(parent)
            with pytest.raises(SaveError, match=reason) as caught:
                check_target(target)
            assert "--output" in str(caught.value)
            with pytest.raises(SaveError, match=reason):
                save(target)
            assert snapshot(parent) == before


def test_files_that_tools_make_do_not_count_as_added(target):
    save(target)
    (target / "__pycache__").mkdir()
    (target / "__pycache__" / "modeling.pyc").write_bytes(b"")
    (target / ".DS_Store").write_bytes(b"")
    save(target, b"new")
    assert set(snapshot(target)) == {"model.safetensors", MANIFEST_NAME}


def test_current_folder_and_those_that_hold_it_are_refused(tmp_path, monkeypatch, subtests):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in ("", ".", "..", "../here", "../here/", "/"):
        with subtests.test(place=place):
            with pytest.raises(SaveError, match="current folder"):
                check_target(place)
            with pytest.raises(SaveError, match="current folder"):
                save(place)
            assert snapshot(tmp_path) == {"here": None}


def test_a_target_inside_a_saved_folder_is_refused(tmp_path, target, monkeypatch, subtests):
    """That folder could not be loaded again, since its manifest does not list the target."""
    save(target)
    (tmp_path / "link").symlink_to(target)
    before = snapshot(tmp_path)
    questions = QuestionSet((), {}, "quiz", None)
    uses = {
        "check_target": check_target,
        "save": save,
        "report": lambda path: check_report_folder(path, "evaluate"),
        "run": lambda path: check_report_folder(path, "matrix"),
        "task": lambda path: write_harness_task(questions, path),
    }
    for place in (target / "sub", target / "a" / "b", tmp_path / "link" / "sub"):
        for name, use in uses.items():
            with subtests.test(name, place=place):
                with pytest.raises(SaveError, match=r"lies in .*mini-gpt, a folder that this package saved.*--output"):
                    use(place)
                assert snapshot(tmp_path) == before
    monkeypatch.chdir(target)
    with pytest.raises(SaveError, match="lies in"):
        check_target("sub")


def test_a_target_beside_saved_folders_and_below_foreign_manifests_is_saved(tmp_path):
    make_folder_with_other_manifest(tmp_path / "app")
    for name in ("one", "two"):
        save(tmp_path / "app" / "models" / name)
        assert verify_folder(tmp_path / "app" / "models" / name)


def test_names_that_cannot_be_staged_are_refused(tmp_path, subtests):
    for name in ("x" * 240, "模" * 80, ".m.staging-0123456789abcdef", ".m.previous"):
        with subtests.test(name=name):
            with pytest.raises(SaveError, match=r"too long|unfinished runs"):
                check_target(tmp_path / name)
            assert snapshot(tmp_path) == {}


def test_parent_that_is_a_file_or_not_writable(tmp_path, monkeypatch):
    make_file(tmp_path / "file")
    with pytest.raises(SaveError, match="is not a folder"):
        check_target(tmp_path / "file" / "sub" / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for name in ("out", "missing/out"):
        with pytest.raises(SaveError, match="can't be written by this user"):
            check_target(tmp_path / name)


def test_check_target_leaves_nothing_behind(tmp_path):
    before = tmp_path.stat().st_mtime_ns
    for name in ("out", "missing/parent/out"):
        check_target(tmp_path / name)
        assert snapshot(tmp_path) == {}
        assert tmp_path.stat().st_mtime_ns == before


def test_target_filled_by_another_during_the_block_is_kept(target):
    target.mkdir()
    with pytest.raises(SaveError, match="not made by this package"), staged_folder(target, required_bytes=0):
        make_file(target / "thesis.tex")
    assert snapshot(target.parent) == {"mini-gpt": None, "mini-gpt/thesis.tex": b"mine"}


# --- failures leave the target as it was -----------------------------------------------------------------------------


@pytest.mark.parametrize("older", [True, False])
def test_exceptions_of_the_block_pass_unchanged(target, older, subtests):
    if older:
        save(target, b"old")
    before = snapshot(target.parent)
    for error in (ValueError("x"), KeyboardInterrupt(), SystemExit(3), ConnectionRefusedError(111, "")):
        with subtests.test(error=repr(error)):
            with pytest.raises(type(error)) as caught:
                fail_midway(target, error)
            assert caught.value is error
            assert snapshot(target.parent) == before


def test_missing_parents_are_removed_again(tmp_path):
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "a" / "b" / "out", required_bytes=0):
        raise ZeroDivisionError
    assert snapshot(tmp_path) == {}


def test_write_errors_become_save_errors(target, subtests):
    save(target, b"old")
    before = snapshot(target.parent)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO):
        with subtests.test(number=number):
            with pytest.raises(SaveError, match=os.strerror(number)) as caught:
                fail_midway(target, OSError(number, os.strerror(number)))  # as file.write does: without a name
            message = str(caught.value)
            assert f"Could not write vocab.txt of {target}" in message
            assert "choose another --output" in message
            if number == errno.ENOSPC:
                assert re.search(r"Free \d+ bytes", message)
            assert snapshot(target.parent) == before


def test_error_of_a_file_elsewhere_is_not_blamed_on_the_target(tmp_path, target):
    with pytest.raises(PermissionError), staged_folder(target, required_bytes=0):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "source.txt"))
    with pytest.raises(FileNotFoundError), staged_folder(target, required_bytes=0):
        (tmp_path / "missing.txt").read_bytes()


def input_output_error(*arguments):
    raise OSError(errno.EIO, "Input/output error")


def test_disk_failure_while_finishing(target, monkeypatch, subtests):
    for call, older in (
        *(("os.fsync", False), ("os.rename", False)),
        *(("os.fsync", True), ("os.rename", True), ("staging._exchange", True)),
    ):
        with subtests.test(call=call, older=older), monkeypatch.context() as patch:
            if older and not target.exists():
                save(target, b"old")
            before = snapshot(target.parent)
            if call == "os.rename":
                patch.setattr(staging, "_exchange", lambda first, second: False)
            owner, name = call.split(".")
            patch.setattr({"os": os, "staging": staging}[owner], name, input_output_error)
            with pytest.raises(SaveError, match="Input/output error"):
                save(target, b"new")
            assert snapshot(target.parent) == before


def test_disk_failure_after_the_rename_only_warns(target, monkeypatch, caplog):
    save(target, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "fsync_folder", input_output_error)
        save(target, b"new")
    assert "Input/output error" in caplog.text
    assert (target / "model.safetensors").read_bytes() == b"new"
    save(target, b"newer")
    assert list(target.parent.iterdir()) == [target]


def test_second_of_two_renames_fails(target, monkeypatch):
    save(target, b"old")
    before, real = snapshot(target.parent), os.rename

    def rename(source, destination):
        if ".staging-" in str(source) and Path(destination) == target:
            raise OSError(errno.EIO, "Input/output error", str(source))
        real(source, destination)

    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(SaveError, match="Input/output error"):
        save(target, b"new")
    assert snapshot(target.parent) == before


def test_free_space_is_checked_first(target, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = 100 * 2**20 + 5 * 2**20 + 16 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(SaveError) as caught, staged_folder(target, required_bytes=100 * 2**20):
        pytest.fail("entered without room")
    assert str(needed) in str(caught.value)
    assert str(needed - 1) in str(caught.value)
    assert not list(target.parent.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    with staged_folder(target, required_bytes=100 * 2**20):
        pass


def test_links_in_the_staging_folder_are_refused(tmp_path, target):
    make_file(tmp_path / "elsewhere")
    with pytest.raises(SaveError, match="regular files"), staged_folder(target, required_bytes=0) as folder:
        (folder / "weights").symlink_to(tmp_path / "elsewhere")
    assert not target.exists()


def test_one_target_twice_in_one_process(target):
    with staged_folder(target, required_bytes=0) as folder:
        with pytest.raises(SaveError, match="Another run"), staged_folder(target, required_bytes=0):
            pytest.fail("entered twice")
        (folder / "x").write_bytes(b"x")
    assert verify_folder(target)["files"].keys() == {"x"}


def test_sweep_takes_only_what_is_its_own(tmp_path, target):
    ours = [".mini-gpt.staging-0123456789abcdef", ".mini-gpt.staging-ffffffffffffffff"]
    others = [
        ".mini-gpt.staging-1111111111111111",  # of another program, by chance under such a name
        ".mini-gpt.staging-notes",
        ".mini-gpt.staging-0123456789abcdef.notes",
        ".mini-gpt.staging-x.staging-0123456789abcdef",
        ".other.staging-0123456789abcdef",
    ]
    for name in [*ours, *others]:
        make_folder(tmp_path / name)
    for name in [ours[0], *others[1:]]:
        (tmp_path / name / MARKER).touch()
    (tmp_path / ours[1] / "thesis.tex").unlink()  # killed before it was marked
    (tmp_path / others[0] / "link").symlink_to(tmp_path / ours[0] / MARKER)
    (tmp_path / ".mini-gpt.staging-2222222222222222").symlink_to(tmp_path / others[1])
    save(target)
    left = {"mini-gpt", ".mini-gpt.staging-2222222222222222", *others}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert (tmp_path / others[0] / "thesis.tex").read_text() == "mine"


def test_the_marker_is_in_no_finished_folder(target):
    save(target)
    save(target, b"new")
    assert set(snapshot(target.parent)) == {"mini-gpt", "mini-gpt/model.safetensors", f"mini-gpt/{MANIFEST_NAME}"}


def make_ours_with_added_file_by_rename(path):
    make_ours_with_added_file(path.with_name("elsewhere"))
    path.with_name("elsewhere").rename(path)


def make_link_to_ours(path):
    save(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def test_previous_that_is_not_ours_is_kept(tmp_path, subtests):
    for number, make in enumerate(
        (make_folder, make_ours_with_added_file_by_rename, make_link_to_ours, make_dangling_link)
    ):
        with subtests.test(make.__name__):
            parent = tmp_path / str(number)
            parent.mkdir()
            make(parent / ".mini-gpt.previous")
            before = snapshot(parent)
            with pytest.raises(SaveError, match="in the way"):
                save(parent / "mini-gpt")
            assert snapshot(parent) == before


KINDS = {"a model": None, "an export": "export_report.json", "a Space": "space.yaml", "a rendered report": "report.md"}


def test_a_folder_is_replaced_only_by_one_of_its_kind(tmp_path, subtests):
    for (held, there), (wanted, written) in itertools.product(KINDS.items(), KINDS.items()):
        with subtests.test(held=held, wanted=wanted):
            target = tmp_path / f"{held} {wanted}"
            with staged_folder(target, required_bytes=0, replaces=there) as folder:
                (folder / (there or "config.json")).write_bytes(b"{}")
            before = snapshot(tmp_path)
            if held == wanted:
                check_target(target, replaces=written)
                continue
            with pytest.raises(SaveError, match=rf"another kind of folder \({held}, not {wanted}\)"):
                check_target(target, replaces=written)
            with (
                pytest.raises(SaveError, match="another kind"),
                staged_folder(target, required_bytes=0, replaces=written),
            ):
                pytest.fail("entered")
            assert snapshot(tmp_path) == before


def test_a_disk_without_inodes_is_told_so(target, monkeypatch):
    real, full = os.statvfs, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def count(*numbers):
        """Let the disk have so many inodes, and so many of them free, call by call; then as many as the last."""
        left = list(numbers)

        def statvfs(path):
            found = real(path)
            files, free = left.pop(0) if len(left) > 1 else left[0]
            same = {name: getattr(found, name) for name in ("f_frsize", "f_blocks", "f_bfree", "f_bavail")}
            return SimpleNamespace(**same, f_files=files, f_favail=free)

        monkeypatch.setattr(os, "statvfs", statvfs)

    count((1000, 0))
    with pytest.raises(SaveError, match="no inodes left"), staged_folder(target, required_bytes=0):
        pytest.fail("entered without an inode")
    count((0, 0))  # a file system that counts none
    with pytest.raises(SaveError, match=r"No space left.*Free \d+ bytes"):
        fail_midway(target, full)
    count((1000, 5), (1000, 5), (1000, 0))
    with pytest.raises(SaveError, match="no inodes left") as caught:
        fail_midway(target, full)
    assert "Free" not in str(caught.value)
    assert snapshot(target.parent) == {}


def test_previous_that_was_changed_is_kept(tmp_path, target, subtests):
    """A run was killed between two renames, and the older folder was tuned in place since."""
    save(target, b"old")
    previous = target.rename(tmp_path / ".mini-gpt.previous")
    changes = {
        "another size": lambda path: path.write_bytes(b"tuned"),
        "the same size": lambda path: path.write_bytes(b"new"),
        "a link": lambda path: path.symlink_to(tmp_path / "nowhere"),
        "a folder": lambda path: path.mkdir(),
    }
    for occupied, (name, change) in itertools.product((False, True), changes.items()):
        with subtests.test(name, occupied=occupied):
            path = previous / "model.safetensors"
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            change(path)
            if occupied and not target.exists():
                save(tmp_path / "new", b"new")
                (tmp_path / "new").rename(target)
            before = snapshot(tmp_path)
            with pytest.raises(SaveError, match=r"previous is in the way.*model\.safetensors in it was changed since"):
                save(target, b"newer")
            assert snapshot(tmp_path) == before


def test_previous_is_kept_beside_a_target_of_another_program(tmp_path, target):
    save(target, b"old")
    target.rename(tmp_path / ".mini-gpt.previous")
    make_folder(target)
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match="was not made by this package"):
        save(target, b"new")
    assert snapshot(tmp_path) == before


def test_damaged_previous_is_not_put_back(tmp_path, target):
    save(target, b"old")
    target.rename(tmp_path / ".mini-gpt.previous")
    (tmp_path / ".mini-gpt.previous" / "model.safetensors").unlink()
    save(target, b"new")
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "model.safetensors").read_bytes() == b"new"


# --- the manifest ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(target):
    with staged_folder(target, required_bytes=0) as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_bytes(b"{}")
    return target


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_changed_missing_and_resized_files_are_named(saved, name):
    original = (saved / name).read_bytes()
    (saved / name).write_bytes(b"x" + original[1:])
    with pytest.raises(LoadError, match=f"{name}.*sha256"):
        verify_folder(saved)
    (saved / name).write_bytes(original + b"x")
    with pytest.raises(LoadError, match=f"{name}.*bytes"):
        verify_folder(saved, hash_weights=False)
    (saved / name).unlink()
    with pytest.raises(LoadError, match=f"{name} is missing"):
        verify_folder(saved, hash_weights=False)
    (saved / name).mkdir()
    with pytest.raises(LoadError, match=f"{name} in .* is a folder"):
        verify_folder(saved)


def test_hash_weights_false_still_hashes_the_rest(saved):
    (saved / "model.safetensors").write_bytes(b"WEIGHTS")
    verify_folder(saved, hash_weights=False)
    (saved / "config.json").write_bytes(b"[]")
    with pytest.raises(LoadError, match=r"config\.json"):
        verify_folder(saved, hash_weights=False)


def test_unlisted_weights_code_and_pickles(saved, subtests):
    for name in (
        *("extra.safetensors", "sub/evil.py", "pytorch_model.bin", "a.PT", "x.pkl"),
        *("zipfile.pyc", "zipfile.so", "zipfile.cpython-311-x86_64-linux-gnu.so", "zipfile.PYD", "other-1.0.whl"),
        *("chat_template.jinja", "additional_chat_templates/tool.jinja", "adapter_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "tokenizer.model", "generation_config.json", "Vocab.json", "merges.txt"),
        *("models/a/config.json", "model.safetensors.index.json", "pruning_plan.json"),
    ):
        with subtests.test(name=name):
            (saved / name).parent.mkdir(exist_ok=True, parents=True)
            (saved / name).write_bytes(b"")
            with pytest.raises(LoadError, match="not in the manifest"):
                verify_folder(saved)
            (saved / name).unlink()
            verify_folder(saved)


def test_unlisted_text_is_fine(saved):
    (saved / "README.md").write_text("a card")
    verify_folder(saved)


def test_paths_that_leave_the_folder(tmp_path, saved, subtests):
    (tmp_path / "outside").write_bytes(b"")
    entry = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}
    original = (saved / MANIFEST_NAME).read_bytes()
    for path in (
        *("../outside", "/etc/passwd", "sub/../../outside", "..", ".", "", "a//b", "a/./b"),
        *("..\\outside", "C:/x", "C:x", "a\0"),
    ):
        with subtests.test(path=path):
            (saved / MANIFEST_NAME).write_bytes(original)
            edit_manifest(saved, lambda manifest, path=path: manifest["files"].update({path: entry}))
            with pytest.raises(LoadError, match="plain relative path"):
                verify_folder(saved)
            assert read_manifest(saved) is None


def test_malformed_manifests(saved, subtests):
    original = (saved / MANIFEST_NAME).read_bytes()
    for number, change in enumerate(
        (
            lambda manifest: manifest.update(format="other"),
            lambda manifest: manifest.update(version=2),
            lambda manifest: manifest.update(version=True),
            lambda manifest: manifest.update(files=[]),
            lambda manifest: manifest.pop("files"),
            lambda manifest: manifest["files"].update({"config.json": None}),
            lambda manifest: manifest["files"]["config.json"].update(bytes="2"),
            lambda manifest: manifest["files"]["config.json"].update(bytes=-1),
            lambda manifest: manifest["files"]["config.json"].update(sha256="0" * 63),
            lambda manifest: manifest["files"]["config.json"].pop("sha256"),
        )
    ):
        with subtests.test(number=number):
            (saved / MANIFEST_NAME).write_bytes(original)
            edit_manifest(saved, change)
            with pytest.raises(LoadError, match="not a manifest of this package"):
                verify_folder(saved)
            assert read_manifest(saved) is None
            before = snapshot(saved)
            with pytest.raises(SaveError, match="not made by this package"):
                save(saved)
            assert snapshot(saved) == before


def test_manifests_that_are_no_object(saved, subtests):
    for content in (b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b" " * (16 * 2**20 + 1)):
        (saved / MANIFEST_NAME).write_bytes(content)
        with subtests.test(content=content[:8]), pytest.raises(LoadError, match="not a manifest of this package"):
            verify_folder(saved)


def test_no_manifest(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert read_manifest(folder) is None
        with pytest.raises(LoadError, match=MANIFEST_NAME):
            verify_folder(folder)


# --- models ----------------------------------------------------------------------------------------------------------


def test_saved_model_reloads_bit_equal(target, model, tokenizer):
    returned = save_pruned(model, str(target), tokenizer=tokenizer, plan=Facts(), report=Facts())
    assert returned == target
    files = verify_folder(target)["files"]
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", PLAN_NAME, REPORT_NAME}
    assert expected <= files.keys()
    assert not [name for name in files if name.endswith(".py")], "a native model needs no code"
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert type(loaded) is LlamaForCausalLM
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert AutoTokenizer.from_pretrained(target).encode("w3 w4") == [3, 4]


def test_estimate_counts_tied_weights_once(model):
    tied = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert tied < estimate_bytes(model) - 8 * 2**20 < tied + 1024  # and the rotary buffers
    untied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    assert estimate_bytes(untied) - estimate_bytes(model) == 11 * 16 * 4


def test_unsavable_model_is_refused_before_anything_is_written(tmp_path, target, model, monkeypatch):
    monkeypatch.setattr(model, "_context_prune_unsavable", "down_proj has a bias.", raising=False)
    with pytest.raises(SaveError, match="down_proj has a bias"):
        save_pruned(model, target)
    with pytest.raises(SaveError, match="down_proj has a bias"):
        write_model_folder(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_pickles_are_never_saved(target, model):
    class Pickling:
        def save_pretrained(self, folder):
            (Path(folder) / "vocab.pkl").write_bytes(b"")

    with pytest.raises(SaveError, match=r"vocab\.pkl"):
        save_pruned(model, target, tokenizer=Pickling())
    assert not list(target.parent.iterdir())


def variable_width_model():
    from hf_context_prune.modeling.registry import get_config_class, get_model_class
    from hf_context_prune.modeling.specs import SPECS

    config = get_config_class(SPECS["llama"])(**SIZES, per_layer_config={1: {"intermediate_size": 8}})
    return get_model_class(SPECS["llama"])(config)


def test_variable_width_model_travels_with_its_code(target):
    from hf_context_prune.modeling import modeling_context_pruned
    from hf_context_prune.modeling.registry import build_auto_map
    from hf_context_prune.modeling.specs import SPECS

    model = variable_width_model()
    model.config.auto_map = build_auto_map(SPECS["llama"])
    save_pruned(model, target)
    package = Path(modeling_context_pruned.__file__).parent
    code = {name: (package / name).read_bytes() for name in modeling_context_pruned.MODELING_FILES}
    assert {path.name: path.read_bytes() for path in target.glob("*.py")} == code
    assert code.keys() <= verify_folder(target)["files"].keys()


def test_code_of_others_is_not_replaced_by_the_modeling_files(tmp_path, subtests):
    model = variable_width_model()
    model.save_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "ours")
    golden = Path(__file__).parents[2] / "support" / "golden" / "variable_3369b6e.zip"
    with zipfile.ZipFile(golden) as archive:  # the files of an older version
        archive.extractall(tmp_path / "older")
    (older,) = {path.parent for path in (tmp_path / "older").rglob("specs.py")}
    model.save_pretrained(older)
    assert (older / "specs.py").read_bytes() == (tmp_path / "ours" / "specs.py").read_bytes()
    whats = ("RATE = 2", "# how to use hf_context_pruned\nRATE = 2", "", "a link", "a dangling link")
    for index, what in enumerate(whats):
        folder = tmp_path / str(index)
        folder.mkdir()
        if "link" not in what:
            (folder / "specs.py").write_text(what)
        else:
            (tmp_path / "notes.txt").write_text("mine")
            (folder / "specs.py").symlink_to(tmp_path / ("notes.txt" if what == "a link" else "absent"))
        before = snapshot(tmp_path)
        with subtests.test(what):
            with pytest.raises(ValueError, match=r"specs\.py is a link, or no modeling file"):
                model.save_pretrained(folder)
            assert snapshot(tmp_path) == before


def test_variable_width_model_without_its_code_is_refused(target, subtests):
    model = variable_width_model()
    for auto_map in (None, {"AutoConfig": "elsewhere.Config"}, {"AutoConfig": "user/repo--specs.Config"}):
        with subtests.test(auto_map=auto_map):
            if auto_map:
                model.config.auto_map = auto_map
            with pytest.raises(SaveError, match="auto_map"):
                save_pruned(model, target)
            assert not list(target.parent.iterdir())


def test_a_folder_of_ours_that_was_changed_is_not_replaced(tmp_path):
    """Weights that were tuned in place would be lost."""
    target = tmp_path / "out"
    with staged_folder(target, required_bytes=1) as staging:
        (staging / "a.txt").write_text("as saved")
    (target / "a.txt").write_text("as tuned")
    with pytest.raises(SaveError, match="was changed since"):
        check_target(target)
    with pytest.raises(SaveError, match="was changed since"), staged_folder(target, required_bytes=1):
        pass
    assert (target / "a.txt").read_text() == "as tuned"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with staged_folder("~/out", required_bytes=1) as staging:
        (staging / "a.txt").write_text("x")
    assert (tmp_path / "out" / "a.txt").is_file()


def test_the_home_of_an_unknown_user_is_refused(tmp_path, monkeypatch, subtests):
    """It would name a folder ``~nobody-known`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    for path in ("~nobody-known/x", Path("~nobody-known"), "~nobody-known"):
        for use in (check_target, check_writable, load_model, cache_in, lambda path: save(path)):
            with subtests.test(path=path, use=use), pytest.raises(ContextPruneError, match="no home folder"):
                use(path)
    assert not os.listdir(tmp_path)


def cache_in(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(path))
        cache_dir()
