"""A folder that claims to be of this package is checked, whatever the state of its manifest; other folders are not."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from hf_context_prune.errors import LoadError
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.loading import load_meta_model, load_model, load_pruned
from hf_context_prune.storage.manifest import claims_to_be_ours, verify_folder, verify_if_ours
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.training.callback.checkpoints import load_checkpoint
from hf_context_prune.utils.file_names import MANIFEST_NAME, PLAN_NAME
from tests.support.limits import within
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tokenizer):
    """A folder of varying widths, with its plan."""
    model = tiny_model("llama")
    widths = read_geometry(model.config, spec_of(model.config)).layers
    layers = tuple(LayerPlan(tuple(range(30 - i)), (0, 2)) for i in range(3))
    plan = PruningPlan("llama", widths, layers, fingerprint(model))
    folder = tmp_path_factory.mktemp("pruned") / "model"
    save_pruned(apply_plan(model, plan), folder, tokenizer=tokenizer, plan=plan)
    return folder


def truncated(path):
    path.write_bytes(path.read_bytes()[:60])


def edited(**changes):
    def edit(path):
        manifest = json.loads(path.read_text())
        files = {**manifest["files"], **changes.pop("files", {})}
        path.write_text(json.dumps({**manifest, "files": files, **changes}))

    return edit


def instead(make):
    def replace(path):
        path.unlink()
        make(path)

    return replace


DAMAGES = {
    "truncated": truncated,
    "version 2": edited(version=2),
    "a path out of the folder": edited(files={"../../x": {"sha256": "0" * 64, "bytes": 1}}),
    "NaN": lambda path: path.write_bytes(b'{"format": NaN, "version": NaN}'),
    "no text": lambda path: path.write_bytes(b"\x7f\xf8\x00\x00" * 40),
    "blanks": lambda path: path.write_bytes(b" " * 20_000_000),
    "deep": lambda path: path.write_bytes(b"[" * 15_000_000),
    "parts": lambda path: path.write_bytes(b"[" + b"[],{}," * 2_500_000 + b"0]"),
    "a named pipe": instead(os.mkfifo),
    "a device": instead(lambda path: path.symlink_to("/dev/zero")),
    "a folder": instead(lambda path: path.mkdir()),
    "a dangling link": instead(lambda path: path.symlink_to("absent.json")),
    "another program's": lambda path: path.write_text('{"name": "a web app"}'),
    "absent": instead(lambda path: None),
}


def test_a_damaged_manifest_is_an_error_at_once(tmp_path, pruned, subtests):
    folder = shutil.copytree(pruned, tmp_path / "out")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    whole = (folder / MANIFEST_NAME).read_bytes()
    for what, damage in DAMAGES.items():
        damage(folder / MANIFEST_NAME)
        for load in (load_model, load_pruned, load_meta_model, verify_folder, verify_if_ours):
            with subtests.test(what, load=load.__name__), within(), pytest.raises(LoadError, match=MANIFEST_NAME):
                load(folder)
        path = folder / MANIFEST_NAME
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)


def test_what_a_folder_claims_by(tmp_path, pruned, subtests):
    cases = {
        ("a manifest that was cut", True): lambda folder: truncated(folder / MANIFEST_NAME),
        ("the model type beside another manifest", True): lambda folder: (folder / MANIFEST_NAME).write_text("{}"),
        ("the model type of a damaged config", True): lambda folder: [
            (folder / MANIFEST_NAME).write_text("{}"),
            truncated(folder / "config.json"),
            (folder / "config.json").open("a").write(' "model_type": "context_pruned_llama"'),
        ],
        ("a folder that transformers saved", False): lambda folder: (folder / MANIFEST_NAME).unlink(),
        ("the report of an export", True): lambda folder: [
            (folder / MANIFEST_NAME).unlink(),
            (folder / "export_report.json").write_text("{}"),
        ],
    }
    for number, ((what, expected), change) in enumerate(cases.items()):
        folder = shutil.copytree(pruned, tmp_path / str(number))
        (folder / PLAN_NAME).unlink()
        change(folder)
        with subtests.test(what):
            assert claims_to_be_ours(folder) is expected


def test_a_manifest_of_another_program_does_not_hinder_a_base_model(tmp_path, tokenizer, subtests):
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    contents = {
        "a web app": '{"name": "demo of hf_context_prune", "icons": []}',
        "a list": "[]",
        "no JSON": "web: app",
        "another format": '{"format": "other", "version": 1, "files": {}}',
    }
    for what, content in contents.items():
        (tmp_path / MANIFEST_NAME).write_text(content)
        with subtests.test(what):
            assert verify_if_ours(tmp_path) is None
            assert load_model(tmp_path).model.num_parameters()
    (tmp_path / MANIFEST_NAME).unlink()
    os.mkfifo(tmp_path / MANIFEST_NAME)
    with within():
        assert verify_if_ours(tmp_path) is None


def test_a_named_pipe_in_place_of_a_listed_file_is_told_at_once(tmp_path, pruned, subtests):
    for name in ("model.safetensors", "config.json", PLAN_NAME, "tokenizer.json"):
        folder = shutil.copytree(pruned, tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        for load in (load_model, load_pruned, load_meta_model):
            with (
                subtests.test(name, load=load.__name__),
                within(),
                pytest.raises(LoadError, match=f"{name} in .* is a named pipe"),
            ):
                load(folder)


def test_a_checkpoint_of_a_trainer_is_told_its_way(tmp_path, pruned):
    folder = shutil.copytree(pruned, tmp_path / "checkpoint-10")
    (folder / MANIFEST_NAME).unlink()
    (folder / "training_args.bin").write_bytes(b"")
    with pytest.raises(LoadError, match=r"callback\.save_pretrained\(folder\).*load_checkpoint\(folder\)"):
        load_model(folder)


def test_a_saved_folder_is_no_checkpoint_of_a_trainer_once_it_is_damaged(tmp_path, pruned):
    assert load_checkpoint(pruned).num_parameters()
    folder = shutil.copytree(pruned, tmp_path / "out")
    truncated(folder / MANIFEST_NAME)
    with pytest.raises(LoadError, match="not a manifest of this package"):
        load_checkpoint(folder)
