"""Nothing leaves by a link: files of other places are neither copied nor uploaded, and pipes are not opened."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from hf_context_prune.errors import LoadError, PublishError, SaveError
from hf_context_prune.evaluation.reports.rendering import read_folder
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.modeling_context_pruned import add_companions
from hf_context_prune.modeling.plan import PruningPlan, fingerprint
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.publishing.card.card import make_card
from hf_context_prune.publishing.hub import files_to_push
from hf_context_prune.publishing.space import wheel
from hf_context_prune.publishing.space.folder import make_space_settings, write_space
from hf_context_prune.publishing.space.settings import read_space_settings
from hf_context_prune.storage.loading import load_model
from hf_context_prune.storage.provenance import read_base_card
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.utils.links import list_inside, resolve_inside
from hf_context_prune.utils.upload_check import refuse_upload
from tests.support.export_folders import VARIABLE
from tests.support.limits import within
from tests.support.tiny import tiny_model, tiny_tokenizer

OUT = "outside of the folder"


@pytest.fixture
def secret(tmp_path):
    """A folder with a file that must stay where it is."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "vocab.txt").write_text("password 1234")
    return folder / "vocab.txt"


@pytest.fixture
def base(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def pruned(tmp_path):
    """A folder of this package, with a card."""
    model = tiny_model("llama")
    geometry = read_geometry(model.config, spec_of(model.config))
    plan = PruningPlan("llama", geometry.layers, VARIABLE, fingerprint(model))
    folder = save_pruned(apply_plan(model, plan), tmp_path / "pruned", tokenizer=tiny_tokenizer(), plan=plan)
    make_card(folder)
    return folder


def cache_of_the_hub(folder, place):
    """The same files as the Hub's client keeps them: a snapshot of links to blobs."""
    repository = place / "models--org--x"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    for number, name in enumerate(list_inside(folder)):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, repository / "blobs" / str(number))
        (snapshot / name).symlink_to(repository / "blobs" / str(number))
    return snapshot


def test_where_a_file_lies(tmp_path, secret):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_text("x")
    (folder / "inside").symlink_to("file")
    (folder / "chain").symlink_to("inside")
    (folder / "direct").symlink_to(secret)
    (folder / "chained").symlink_to("direct")
    (folder / "sub/up").symlink_to("../../private/vocab.txt")
    (folder / "linked").symlink_to(secret.parent)
    (folder / "nowhere").symlink_to("absent")
    (folder / "round").symlink_to("round")
    os.mkfifo(folder / "pipe")
    (folder / "null").symlink_to("/dev/null")
    for name in ("file", "inside", "chain"):
        assert resolve_inside(folder, name) == folder / "file"
    (tmp_path / "link").symlink_to(folder)
    assert resolve_inside(tmp_path / "link", "chain") == folder / "file"
    for name in ("direct", "chained", "sub/up", "linked/vocab.txt", "null", "../private/vocab.txt", str(secret)):
        with pytest.raises(LoadError, match=OUT):
            resolve_inside(folder, name)
    for name, words in (("pipe", "not a regular file"), ("sub", "not a regular file"), ("nowhere", "can't be read")):
        with pytest.raises(SaveError, match=words):
            resolve_inside(folder, name, SaveError)
    with pytest.raises(LoadError):
        resolve_inside(folder, "round")
    with pytest.raises(LoadError, match=OUT):
        list_inside(folder)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_own_blobs(tmp_path, base, secret):
    snapshot = cache_of_the_hub(base, tmp_path)
    assert list_inside(snapshot) == list_inside(base)
    out = write_space(make_space_settings([str(snapshot)], base=str(snapshot)), tmp_path / "space")
    assert (out / "models" / snapshot.name / "config.json").is_file()
    assert load_model(snapshot).tokenizer is not None
    other = tmp_path / "models--org--other/blobs/1"
    other.parent.mkdir(parents=True)
    other.write_text("of another repository")
    (snapshot / "vocab.txt").symlink_to(other)
    with pytest.raises(LoadError, match=OUT):
        resolve_inside(snapshot, "vocab.txt")
    shutil.rmtree(tmp_path / "models--org--x/blobs")
    (tmp_path / "models--org--x/blobs").symlink_to(secret.parent)
    (snapshot / "merges.txt").symlink_to(tmp_path / "models--org--x/blobs/vocab.txt")
    with pytest.raises(LoadError, match=OUT):
        resolve_inside(snapshot, "merges.txt")


def test_a_space_copies_nothing_of_other_places(tmp_path, base, secret, subtests):
    (tmp_path / "chain").symlink_to(secret)
    for number, name in enumerate(("vocab.txt", "README.md", "tokenizer.model")):
        with subtests.test(name):
            (base / name).symlink_to((secret, tmp_path / "chain", secret)[number])
            with pytest.raises(LoadError, match=OUT):
                write_space(make_space_settings([str(base)], base="demo"), tmp_path / "out")
            (base / name).unlink()
    os.mkfifo(base / "vocab.txt")
    with pytest.raises(LoadError, match=r"vocab\.txt in .* is not a regular file"), within(seconds=20, megabytes=500):
        write_space(make_space_settings([str(base)], base="demo"), tmp_path / "out")
    (base / "vocab.txt").unlink()
    entry = "base: demo\nmodels:\n- {{name: Law, path: {path}{more}}}\n"
    yaml = tmp_path / "space.yaml"
    for path, more, words in (
        ("private/vocab.txt", "", "neither a model folder nor a GGUF file"),
        ("base", ", reports: {x: base/eval_report.json}", OUT),
    ):
        (base / "eval_report.json").unlink(missing_ok=True)
        yaml.write_text(entry.format(path=path, more=more))
        if more:
            (tmp_path / "elsewhere.json").write_text("{}")
            (base / "eval_report.json").symlink_to(tmp_path / "elsewhere.json")
        with subtests.test(path), pytest.raises(LoadError, match=words):
            write_space(read_space_settings(yaml), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wheel_packs_nothing_of_other_places(tmp_path, secret, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "own.py").symlink_to(secret)
    monkeypatch.setattr(wheel, "files", lambda _: package)
    with pytest.raises(SaveError, match=OUT):
        wheel.write_wheel(tmp_path)


def test_loading_takes_over_no_template_of_another_place(base, secret, subtests):
    for name in ("chat_template.jinja", "generation_config.json", "additional_chat_templates/x.jinja"):
        with subtests.test(name):
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).unlink(missing_ok=True)
            (base / name).symlink_to(secret)
            with pytest.raises(LoadError, match=OUT):
                load_model(base)
            (base / name).unlink()
    (base / "model.gguf").touch()
    (base / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(LoadError, match=OUT):
        load_model(base / "model.gguf")  # transformers reads the template beside the file
    (base / "chat_template.jinja").unlink()
    weights = base / "model.safetensors"
    weights.rename(secret.parent / "weights")
    weights.symlink_to(secret.parent / "weights")
    (base / "README.md").symlink_to(secret)
    assert "leads out" in read_base_card(load_model(base))["unknown"]  # linked weights are what many people have


def test_nothing_of_other_places_is_pushed(tmp_path, secret, pruned, subtests):
    for name in ("config.json", "README.md", "manifest.json"):
        with subtests.test(name):
            kept = (pruned / name).read_bytes()
            (pruned / name).rename(secret.parent / name)  # the very file that the manifest lists
            (pruned / name).symlink_to(secret.parent / name)
            with pytest.raises(PublishError, match=f"{OUT}.*Nothing was uploaded"):
                files_to_push(pruned, "model")
            with pytest.raises(PublishError, match=f"{OUT}.*Nothing was uploaded"):
                refuse_upload(pruned)
            (pruned / name).unlink()
            (pruned / name).write_bytes(kept)
    (pruned / "sub").symlink_to(secret.parent)
    with pytest.raises(PublishError, match=OUT):
        refuse_upload(pruned)
    (pruned / "sub").unlink()
    os.mkfifo(pruned / "vocab.txt")
    with pytest.raises(PublishError, match="not a regular file"), within(seconds=20, megabytes=500):
        refuse_upload(pruned)


def test_a_card_and_a_report_take_nothing_of_other_places(tmp_path, secret, pruned):
    weights = pruned / "model.safetensors"
    weights.rename(secret.parent / "weights")
    weights.symlink_to(secret.parent / "weights")
    with pytest.raises(LoadError, match=OUT):
        make_card(pruned)
    weights.unlink()
    (secret.parent / "weights").rename(weights)
    make_card(pruned)
    report = tmp_path / "run"
    report.mkdir()
    (secret.parent / "eval_report.json").write_text("{}")
    (report / "eval_report.json").symlink_to(secret.parent / "eval_report.json")
    with pytest.raises(LoadError, match=OUT):
        read_folder(report)


def test_a_models_own_push_takes_nothing_of_other_places_along(tmp_path, secret, pruned):
    target = tmp_path / "target"
    target.mkdir()
    shutil.copyfile(pruned / "model.safetensors", target / "model.safetensors")
    snapshot = cache_of_the_hub(pruned, tmp_path)
    for name in ("tokenizer.json", "README.md"):  # with the very content that the manifest lists
        (pruned / name).rename(secret.parent / name)
        (pruned / name).symlink_to(secret.parent / name)
    add_companions(str(pruned), str(target))
    names = set(json.loads((pruned / "manifest.json").read_text())["files"])
    assert set(list_inside(target)) == names - {"tokenizer.json", "README.md"}
    shutil.rmtree(target)
    target.mkdir()
    shutil.copyfile(pruned / "model.safetensors", target / "model.safetensors")
    add_companions(str(snapshot), str(target))
    assert "tokenizer.json" in list_inside(target)
    (pruned / "manifest.json").rename(secret.parent / "manifest.json")
    (pruned / "manifest.json").symlink_to(secret.parent / "manifest.json")
    (target / "tokenizer.json").unlink()
    add_companions(str(pruned), str(target))
    assert "tokenizer.json" not in list_inside(target)
