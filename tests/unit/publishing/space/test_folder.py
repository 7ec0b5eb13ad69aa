"""The folder of a Space: whole or absent, with all that the Hub and a fresh environment need."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard

from hf_context_prune import __version__
from hf_context_prune.errors import ConfigError, LoadError, SaveError
from hf_context_prune.evaluation.reports.report import EvalReport
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pipelines.export import export_model
from hf_context_prune.publishing.space.compare import Comparer
from hf_context_prune.publishing.space.example import Example
from hf_context_prune.publishing.space.facts import read_facts
from hf_context_prune.publishing.space.folder import demo_files, make_space_settings, write_space
from hf_context_prune.publishing.space.generation import Request
from hf_context_prune.publishing.space.settings import Entry, Limits, Settings, Source, read_space_settings
from hf_context_prune.publishing.space.store import ModelStore
from hf_context_prune.publishing.space.wheel import write_wheel
from hf_context_prune.storage.manifest import verify_folder
from tests.unit.publishing.space.test_settings import COMMIT

ROOT = Path(__file__).parents[4]


@pytest.fixture
def place(tiny_space, tmp_path):
    (tmp_path / "models").symlink_to(tiny_space)
    return tmp_path


@pytest.fixture(scope="module")
def folder(tiny_space, tmp_path_factory):
    models = [str(tiny_space / name) for name in ("uniform", "variable")]
    target = tmp_path_factory.mktemp("space") / "out"
    return write_space(make_space_settings(models, base=str(tiny_space / "base"), title="Ours"), target)


def test_what_is_in_it(folder):
    listed = verify_folder(folder)["files"]
    wheel = f"hf_context_prune-{__version__}-py3-none-any.whl"
    assert {name for name in listed if not name.startswith("models/")} == {
        "examples/0.json",
        "examples/1.json",
        "README.md",
        "app.py",
        "requirements.txt",
        "space.yaml",
        wheel,
    }
    for name in ("base", "uniform", "variable"):
        assert f"models/{name}/model.safetensors" in listed
    for name in ("uniform", "variable"):
        verify_folder(folder / "models" / name)
    settings = read_space_settings(folder / "space.yaml")
    assert [entry.name for entry in settings.entries] == ["Uniform", "Variable"]
    assert {entry.base for entry in settings.entries} == {Source(path=folder / "models/base")}
    assert all(entry.prompts for entry in settings.entries)


def test_front_matter_and_requirements(folder):
    import gradio

    card = SpaceCard.load(folder / "README.md").data
    assert (card.title, card.sdk, card.sdk_version, card.app_file) == ("Ours", "gradio", gradio.__version__, "app.py")
    assert card.python_version == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert card.models is None
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)
    assert f"gradio=={gradio.__version__}" in lines
    names = {line.partition("==")[0] for line in lines}
    assert {"torch", "transformers", "safetensors"} <= names
    assert not names & {"pytest", "ruff", "playwright", "lm-eval"}


def test_the_wheel_is_a_wheel(folder, tmp_path):
    (wheel,) = folder.glob("*.whl")
    assert write_wheel(tmp_path).read_bytes() == wheel.read_bytes()  # the same every time
    names = zipfile.ZipFile(wheel).namelist()
    own = {Path(name).suffix for name in names if name.startswith("hf_context_prune/")}
    assert own == {".py", ".typed", ".jinja", ".css"}  # nothing that an editor or a run left in the package
    for name in (
        "publishing/space/page.py",
        "publishing/templates/space/style.css",
        "publishing/templates/space/app.py",
        "py.typed",
    ):
        assert f"hf_context_prune/{name}" in names
    assert not [name for name in names if "__pycache__" in name]
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(command, check=True, timeout=120)
    installed = metadata.Distribution.at(next(target.glob("*.dist-info")))
    assert installed.version == __version__
    assert all(file.locate().is_file() for file in installed.files if ".." not in file.parts)  # as RECORD says


def test_hub_models_are_named_and_not_copied(tmp_path):
    settings = Settings("Hub", (Entry("Law", Source("us/mini", COMMIT), Source("us/dense", COMMIT)),))
    out = write_space(settings, tmp_path / "out", examples=False)
    assert not (out / "models").exists()
    assert SpaceCard.load(out / "README.md").data.models == ["us/dense", "us/mini"]
    assert read_space_settings(out / "space.yaml") == settings


def test_a_yaml_with_reports(run, place):
    (place / "mine.yaml").write_text(
        "base: {path: models/base}\n"
        "models:\n"
        "  - {name: Law, path: models/uniform, reports: {other: models/variable/eval_report.json}}\n"
        "limits: {seconds: 5}\n"
    )
    code, out, _ = run("space", "@mine.yaml", "--output", "@out")
    assert code == 0
    assert str(place / "out") in out
    settings = read_space_settings(place / "out/space.yaml")
    assert settings.limits.seconds == 5
    (report,) = settings.entries[0].reports.values()
    assert json.loads(report.read_text()) == json.loads((place / "models/variable/eval_report.json").read_text())
    assert run("space", "@mine.yaml", "--output", "@out")[0] == 0  # an older one of ours is replaced
    code, _, err = run("space", "@mine.yaml", "--output", "@out2", "--title", "X")
    assert (code, "leave out --title" in err) == (2, True)


def test_the_finished_example_is_what_a_visitor_would_get(folder, tiny_space):
    settings = read_space_settings(folder / "space.yaml")
    entry = settings.entries[1]
    example = Example.load(entry.example)
    assert example.can_chat
    assert example.prompt == entry.prompts[0]
    *_, live = Comparer(settings, ModelStore()).compare("Variable", Request(example.prompt, new_tokens=64))
    for shown, now in zip(example.view.sides, live.sides, strict=True):
        assert (shown.name, shown.progress.text) == (now.name, now.progress.text)
    assert example.view.spans == live.spans
    assert "".join(span.text for span in live.spans).startswith(example.prompt)
    assert read_facts(entry).example == example


def test_examples_that_are_no_examples(folder, tmp_path):
    values = json.loads((folder / "examples/0.json").read_text())
    for number, (broken, message) in enumerate(
        (
            (values | {"schema_version": 9}, "Write the Space again"),
            (values | {"prompt": 7}, "example.prompt is 7"),
            (values | {"html": "<b>"}, "example.html is unknown"),
            ([], "Write the Space again"),
        )
    ):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(broken))
        with pytest.raises(LoadError, match=message):
            Example.load(file)
        entry = Entry("Law", Source(path=folder / "models/uniform"), Source(), example=file)
        assert message in read_facts(entry).problems[0]
        with pytest.raises(LoadError, match=message):
            write_space(Settings("X", (entry,)), tmp_path / "out", examples=False)


def test_an_example_that_cant_be_made_names_the_way_out(tiny_space, tmp_path):
    settings = make_space_settings([str(tiny_space / "uniform")], base=str(tiny_space / "base"))
    settings = replace(settings, limits=Limits(prompt_tokens=1))
    with pytest.raises(ConfigError, match="--no-examples"):
        write_space(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_space(settings, tmp_path / "out", examples=False)
    assert read_space_settings(tmp_path / "out/space.yaml").entries[0].example is None


def test_name_prompts_and_sizes_come_from_the_plan(tiny_space, monkeypatch):
    load = PruningPlan.load

    def load_named(path):
        plan = load(path)
        made = {**plan.provenance, "config": {**plan.provenance["config"], "domain": "contracts"}}
        return replace(plan, provenance=made)

    monkeypatch.setattr(PruningPlan, "load", load_named)
    base = str(tiny_space / "base")
    folders = [str(tiny_space / name) for name in ("uniform", "variable")]
    one = make_space_settings(folders[:1], base=base)
    assert one.title == "Mini-GPT: Contracts"
    assert one.entries[0].name == "Contracts"
    assert one.entries[0].prompts[0].startswith("This Agreement")
    both = make_space_settings(folders, base=base)
    reports = [EvalReport.load(Path(folder) / "eval_report.json").size.achieved_ratio for folder in folders]
    assert [entry.name for entry in both.entries] == [f"Contracts, {share:.0%} removed" for share in sorted(reports)]
    assert list(both.domains) == ["Contracts"]


@pytest.mark.parametrize(
    ("provenance", "base"),
    [
        ({"base_model": "us/dense", "base_revision": COMMIT}, Source("us/dense", COMMIT)),
        ({"base_model": "SmolLM2-135M-Instruct.Q4_1.gguf", "base_revision": None}, Source()),
        ({"base_model": "SmolLM2-135M-Instruct.Q4_1.gguf", "base_card": {"id": "else/where"}}, None),
        ({"base_model": "dense", "base_revision": None}, None),
        ({"base_model": "us/dense", "base_revision": None}, None),
        ({}, None),
    ],
)
def test_the_base_comes_from_the_plan(tiny_space, monkeypatch, provenance, base):
    real = PruningPlan.load(tiny_space / "uniform/pruning_plan.json")
    plan = PruningPlan(real.model_type, real.dense, real.layers, provenance=provenance)
    monkeypatch.setattr(PruningPlan, "load", lambda path: plan)
    if base is None:
        with pytest.raises(ConfigError, match="--base"):
            make_space_settings([str(tiny_space / "uniform")])
    else:
        assert make_space_settings([str(tiny_space / "uniform")]).entries[0].base == base


def test_what_is_refused(run, place, tiny_space):
    for number, (arguments, code, words) in enumerate(
        (
            (["@none"], 2, "neither a folder nor a Hub id"),
            (["@models/base", "--base", "demo", "--no-examples"], 0, ""),  # not ours, but a model folder
            (["@models/uniform", "@models/uniform", "--base", "demo"], 2, "names that differ"),
            (["@models/uniform", "--base", "@models"], 1, "no config.json"),
            (["us/mini", "--base", "demo"], 1, "us/mini@COMMIT"),
            (["@models/uniform", "--base", "demo", "--private"], 2, "about --push"),
            (
                ["@models/uniform", "--base", "demo", "--push", "us/space"],
                2,
                "/models/uniform owner/name`",
            ),
            (["@none.yaml"], 2, "can't be read"),
        )
    ):
        got, _, err = run("space", *arguments, "--output", f"@out{number}")
        assert (got, words in " ".join(err.split())) == (code, True), (arguments, err)


def test_an_export_is_no_model_of_a_space(tiny_space, tmp_path):
    export_model(tiny_space / "uniform", tmp_path / "exported", format="quanto", tolerance=10.0)
    with pytest.raises(LoadError, match="is an export, which a Space can't load"):
        write_space(make_space_settings([str(tmp_path / "exported")], base="demo"), tmp_path / "out")


def test_failures_leave_nothing(tiny_space, tmp_path):
    broken = shutil.copytree(tiny_space / "uniform", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x")
    with pytest.raises(LoadError):
        write_space(make_space_settings([str(broken)], base="demo"), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(SaveError):
        write_space(make_space_settings([str(tiny_space / "uniform")], base="demo"), tmp_path / "mine")
    entry = Entry("Law", Source(path=tiny_space / "uniform"), Source(), reports={"x": tmp_path / "none.json"})
    with pytest.raises(LoadError, match="report"):
        write_space(Settings("X", (entry,)), tmp_path / "out")
    entry = replace(entry, reports={"x": tmp_path / "mine/notes.txt"})
    with pytest.raises(LoadError, match="not a readable evaluation report"):
        write_space(Settings("X", (entry,)), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "mine"]


def test_the_repositorys_own_space():
    """To write it anew: see CONTRIBUTING.md."""
    pins = re.compile(r"(sdk_version|python_version): .*")
    for name, text in demo_files().items():
        assert pins.sub("", (ROOT / "spaces" / name).read_text(encoding="utf-8")) == pins.sub("", text), name
