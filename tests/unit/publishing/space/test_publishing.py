"""A Space to the Hub and back: the command line in a fresh process, against a local server; models by id and commit."""

from __future__ import annotations

import pytest
import yaml

from hf_context_prune.storage.manifest import verify_folder
from tests.support.hub.client import client
from tests.support.hub.process import HubProcess
from tests.support.hub.server import files_of

pytestmark = pytest.mark.slow

CODE = """
from hf_context_prune.cli import app as cli
from hf_context_prune.publishing.space.compare import Comparer
from hf_context_prune.publishing.space.facts import domain_table, read_facts
from hf_context_prune.publishing.space.generation import Request
from hf_context_prune.publishing.space.settings import read_space_settings
from hf_context_prune.publishing.space.store import ModelStore

def run(*words):
    sys.argv = ["hf-context-prune", *words]
    try:
        cli.main()
    except SystemExit as exit_:
        return exit_.code or 0

push = ["space", "org/mini", "--base", "org/dense@main", "--output", "out", "--push", "org/app"]
codes = [run(*push, "--private"), run(*push)]
codes.append(run("space", "org/none", "--base", "org/dense", "--output", "none"))
codes.append(run("space", "org/mini", "--output", "none"))
settings = read_space_settings("out/space.yaml")
*_, last = Comparer(settings, ModelStore()).compare("Mini", Request("the court", new_tokens=5))
facts = {entry.name: read_facts(entry) for entry in settings.entries}
print(json.dumps({
    "codes": codes,
    "texts": [side.progress.text for side in last.sides],
    "problems": [side.problem for side in last.sides],
    "matrix": domain_table(facts)[1],
}))
"""


def test_to_the_hub_and_back(tiny_space, tmp_path):
    with HubProcess() as hub:
        hub.ask("allow", "hf_token_of_org", "org")
        commits = {}
        for name, folder in (("dense", "base"), ("mini", "variable")):
            commits[name] = hub.repo("models", f"org/{name}", files_of(tiny_space / folder)).resolve("main")
        found = client(hub, tmp_path, tmp_path / "home", CODE, HF_TOKEN="hf_token_of_org")
        assert found["codes"] == [0, 0, 1, 2]
        app = hub.at("spaces", "org/app")
        assert app.private
        assert sum("/commit/" in request.path for request in hub.log) == 1  # the second push had nothing to do
        sent = app.commits[app.refs["main"]]
    assert found["problems"] == ["", ""]
    assert all(found["texts"])
    assert found["matrix"][0][0] == "Mini"
    folder = tmp_path / "out"
    assert sent.items() >= files_of(folder).items()
    assert "out" in {path.name for path in tmp_path.iterdir()}
    assert "none" not in {path.name for path in tmp_path.iterdir()}
    verify_folder(folder)
    settings = yaml.safe_load(sent["space.yaml"])
    assert settings["models"][0] | {"prompts": None} == {
        "name": "Mini",
        "repo": "org/mini",
        "revision": commits["mini"],
        "base": {"repo": "org/dense", "revision": commits["dense"]},
        "prompts": None,
        "example": "examples/0.json",
    }
