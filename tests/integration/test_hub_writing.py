"""Folders to the Hub and back: the real client, in fresh processes, against a local server."""

from __future__ import annotations

import hashlib
import json

import pytest
from huggingface_hub import ModelCard

from hf_context_prune import PrunerConfig, prune
from hf_context_prune.pipelines.export import export_model
from hf_context_prune.publishing.card.card import make_card
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.storage.staging import staged_folder
from tests.integration.test_hub_reading import pruned_model
from tests.support.hub.client import client, digest
from tests.support.hub.process import HubProcess
from tests.support.hub.server import files_of
from tests.support.runs import OPTIONS, QUICK
from tests.support.tiny import texts, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

TOKEN, STRANGER = "hf_token_of_org", "hf_token_of_someone"
#: Retries of the client don't wait; every step's outcome is kept under its name.
STEPS = """
import time
time.sleep = lambda seconds: None
from hf_context_prune.publishing import push
from hf_context_prune.publishing.hub import push_folder

results = {}
def step(name, folder, repo, token="hf_token_of_org", **options):
    try:
        results[name] = push_folder(folder, repo, token=token, **options).to_dict()
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The server, and a folder with a variable-width model, one of stock widths and a Space."""
    folder = tmp_path_factory.mktemp("writing")
    config = PrunerConfig(mlp_ratio=0.25, **OPTIONS)
    result = prune(tiny_model("llama"), texts(), config, tokenizer=tiny_tokenizer(), eval_options=QUICK)
    result.save_pretrained(folder / "stock")
    model, plan = pruned_model(tiny_model("llama"))
    save_pruned(model, folder / "variable", tokenizer=tiny_tokenizer(), plan=plan, report=result.report)
    make_card(folder / "variable")
    for name, seed in (("fresh", 3), ("other", 4)):  # weights that the server has not seen
        save_pruned(tiny_model("llama", seed=seed), folder / name, tokenizer=tiny_tokenizer())
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name, dtype in (("gguf", "f16"), ("gguf-q8", "q8_0")):
        export_model(folder / "variable", folder / name, format="gguf", dtype=dtype, tolerance=1e6)
    with staged_folder(folder / "app", required_bytes=0) as staging:
        (staging / "app.py").write_text("print('a Space')\n")
        (staging / "README.md").write_text("---\ntitle: Minis\nsdk: gradio\n---\n")
        (staging / "ours-0.1-py3-none-any.whl").write_bytes(b"PK a wheel")
    with HubProcess() as hub:
        hub.ask("allow", TOKEN, "org")
        hub.ask("allow", STRANGER, "someone")
        yield folder, hub, {"variable": digest(model), "stock": digest(result.model)}


def run(place, code, **options):
    folder, hub, _ = place
    return client(hub, folder, folder / options.pop("home", "home"), code, **options)


@pytest.fixture(scope="module")
def pushes(place):
    """Many pushes from one process, and what the server saw."""
    _, hub, _ = place
    older = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "NOTES.md": b"mine"}
    for name in ("used", "cut", "raced"):
        hub.repo("models", f"org/{name}", older)
    hub.repo("models", "org/public", {})
    before = {name: hub.at("models", f"org/{name}").refs["main"] for name in ("used", "cut", "raced")}

    for name, number in (("once", 1), ("cut", 99), ("healed", 0)):
        hub.once_after(f"/api/models/org/{name}", "cut", number)
    hub.once_after("/api/models/org/raced", "commit", "models", "org/raced", older | {"new": b""})
    for name, status in (("faulty", 403), ("busy", 409), ("down", 500)):
        hub.once_after(f"/api/models/org/{name}", "fault", "POST", "/commit/main", status)
    results = run(
        place,
        STEPS
        + """
from pathlib import Path
step("first", "variable", "org/variable", private=True)
step("again", "variable", "org/variable", private=True)
step("short id", "variable", "variable")
step("public", "variable", "org/public", private=True)
step("used", "variable", "org/used")
step("branch", "variable", "org/used", revision="dev")
step("stock over it", "stock", "org/used", commit_message="Another model")
step("pull request", "stock", "org/variable", create_pr=True)
step("into it", "variable", "org/variable", revision="refs/pr/1")
step("stranger", "stock", "org/used", "hf_token_of_someone", revision="dev")
step("stranger's pull request", "variable", "org/used", "hf_token_of_someone", create_pr=True)
step("no token", "stock", "org/used", "hf_of_nobody")
step("other's", "stock", "else/where")
step("no branch", "stock", "org/used", revision="refs/pr/77")
step("space", "app", "org/app", repo_type="space")
step("space again", "app", "org/app", repo_type="space")
step("export", "gguf", "org/export")
step("export again", "gguf", "org/export")
step("smaller export", "gguf-q8", "org/export")
step("once", "other", "org/once")
step("cut", "fresh", "org/cut")
step("healed", "variable", "org/healed")
step("after the cut", "fresh", "org/cut")
step("raced", "stock", "org/raced")
for name in ("faulty", "busy", "down"):
    step(name, "stock", "org/" + name)
push.MAX_FILES = 4
step("large", "variable", "org/large")
step("large branch", "variable", "org/large", revision="dev")
card = Path("stock/README.md")
card.write_text(card.read_text() + "\\nBy hand.\\n")
step("edited", "stock", "org/used")
print(json.dumps(results))
""",
    )
    return results, before


def repo_of(place, name, kind="models"):
    return place[1].at(kind, f"org/{name}")


def test_the_same_folder_arrives_in_one_commit(place, pushes):
    folder, _, _ = place
    done = pushes[0]["first"]
    repo = repo_of(place, "variable")
    assert (done["repo_id"], done["changed"], done["sha"]) == ("org/variable", True, repo.refs["main"])
    assert done["url"].endswith(f"/org/variable/commit/{done['sha']}")
    assert repo.private
    ours = files_of(folder / "variable")
    assert {"README.md", "pruning_plan.json", "eval_report.json", "manifest.json"} <= ours.keys()
    assert repo.commits[repo.refs["main"]] == ours | {".gitattributes": b"*.safetensors filter=lfs\n"}
    assert len(repo.commits) == 4  # created, pushed, and the two of the pull request


def test_running_it_again_makes_no_commit(pushes):
    results, _ = pushes
    for name in ("again", "short id"):
        assert not results[name]["changed"]
        assert results[name]["sha"] == results["first"]["sha"]
        assert results[name]["repo_id"] == "org/variable"


def test_a_repository_that_is_public_is_not_taken_for_a_private_one(place, pushes):
    kind, message = pushes[0]["public"]
    assert kind == "ConfigError"
    assert "public" in message
    assert list(repo_of(place, "public").commits.values()) == [{}]


def test_older_weights_and_what_an_earlier_push_left_go_in_the_same_commit(place, pushes):
    results, before = pushes
    repo = repo_of(place, "used")
    first = repo.commits[results["used"]["sha"]]
    assert first.keys() == files_of(place[0] / "variable").keys() | {"NOTES.md"}
    assert repo.refs["dev"] == results["branch"]["sha"]  # which began where main was, with the same files
    assert not results["branch"]["changed"]
    second = repo.commits[results["stock over it"]["sha"]]
    assert second.keys() == files_of(place[0] / "stock").keys() | {"NOTES.md"}
    assert "modeling_context_pruned.py" not in second
    assert before["used"] in repo.commits


def test_pull_requests(place, pushes):
    results, _ = pushes
    repo = repo_of(place, "variable")
    asked = results["pull request"]
    assert asked["pull_request"].endswith("/org/variable/discussions/1")
    assert repo.refs["main"] == results["first"]["sha"]
    assert repo.refs["refs/pr/1"] == results["into it"]["sha"]
    assert results["into it"]["pull_request"] is None
    theirs = results["stranger's pull request"]
    assert theirs["changed"]
    assert repo_of(place, "used").refs["refs/pr/1"] == theirs["sha"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stranger", ("may not write", "--create-pr")),
        ("no token", ("hf auth login",)),
        ("other's", ("may not write",)),
        ("no branch", ("no such repository or branch",)),
        ("faulty", ("may not write",)),
        ("busy", ("busy",)),
        ("down", ("status 500", "try again later")),
        ("raced", ("someone else committed",)),
    ],
)
def test_a_refusal_says_what_to_do(pushes, name, words):
    kind, message = pushes[0][name]
    assert kind == "PublishError"
    assert all(word in message for word in words), message
    assert "Nothing changed there" in message
    assert "Then run `hf-context-prune push " in message
    assert "hf_" not in message


def test_a_cut_connection_leaves_the_old_revision_whole(place, pushes):
    results, before = pushes
    repo = repo_of(place, "cut")
    kind, message = results["cut"]
    assert kind == "PublishError"
    assert "the connection broke" in message
    assert "hf-context-prune push fresh org/cut" in message
    story = [sha for sha in repo.commits if sha != before["cut"]]
    assert story[0] == results["after the cut"]["sha"]  # nothing was committed in between
    assert repo.commits[before["cut"]].keys() == {
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "NOTES.md",
    }
    assert results["once"]["changed"]  # one cut is only tried again


def test_a_commit_of_someone_else_is_not_overwritten(place, pushes):
    repo = repo_of(place, "raced")
    assert repo.commits[repo.refs["main"]].keys() >= {"new", "NOTES.md"}


def test_too_many_files_go_to_a_pull_request_with_the_card_last(place, pushes):
    results, _ = pushes
    repo = repo_of(place, "large")
    assert results["large"]["pull_request"].endswith("/discussions/1")
    assert list(repo.commits[repo.refs["main"]]) == [".gitattributes"]
    steps = [files for files in repo.commits.values() if len(files) > 1]
    assert len(steps) > 3
    assert [("README.md" in files, "manifest.json" in files) for files in steps] == [(False, False)] * (
        len(steps) - 1
    ) + [(True, True)]
    assert repo.commits[repo.refs["refs/pr/1"]].items() >= files_of(place[0] / "variable").items()
    kind, message = results["large branch"]
    assert kind == "ConfigError"
    assert "revision='dev'" in message


def test_a_space_of_text_and_a_wheel(place, pushes):
    results, _ = pushes
    repo = repo_of(place, "app", "spaces")
    assert results["space"]["changed"]
    assert not results["space again"]["changed"]
    assert repo.commits[repo.refs["main"]].items() >= files_of(place[0] / "app").items()


def test_an_export_replaces_the_weights_of_an_earlier_one(place, pushes):
    results, _ = pushes
    assert [results[name]["changed"] for name in ("export", "export again", "smaller export")] == [True, False, True]
    repo = repo_of(place, "export")
    there = repo.commits[repo.refs["main"]]
    assert there.items() >= files_of(place[0] / "gguf-q8").items()
    assert b"base_model_relation: quantized" in there["README.md"] or b"base_model" not in there["README.md"]


def test_an_edited_card_is_pushed_as_it_is(place, pushes):
    repo = repo_of(place, "used")
    now, before = (repo.commits[pushes[0][name]["sha"]] for name in ("edited", "stock over it"))
    assert now["README.md"].endswith(b"\nBy hand.\n")
    assert {name for name in now if now[name] != before.get(name)} == {"README.md"}


READ_BACK = """
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer
def read_back(repo, **options):
    model = AutoModelForCausalLM.from_pretrained(repo, dtype="auto", token=arguments["token"], **options)
    tokenizer = AutoTokenizer.from_pretrained(repo, token=arguments["token"], **options)
    files = {name: open(hf_hub_download(repo, name, token=arguments["token"]), "rb").read() for name in
             ("README.md", "pruning_plan.json", "eval_report.json")}
    return {"digest": digest(model), "class": type(model).__name__, "ids": tokenizer("the court").input_ids,
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}}
"""


@pytest.mark.parametrize("package", [True, False], ids=["with the package", "without it"])
def test_a_fresh_process_reads_back_what_was_pushed(place, pushes, package):
    barred = """
class Barred:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_context_prune":
            raise ImportError("hf_context_prune is barred here")

sys.meta_path.insert(0, Barred())
"""
    with_it = "import hf_context_prune\n"
    remote = "" if package else ", trust_remote_code=True"
    facts = run(
        place,
        (with_it if package else barred)
        + READ_BACK
        + f"""
results = {{"variable": read_back("org/variable"{remote}), "stock": read_back("org/used")}}
if {package}:
    from huggingface_hub import snapshot_download
    from hf_context_prune import load_pruned
    folder = snapshot_download("org/variable", token=arguments["token"])
    results["verified"] = digest(load_pruned(folder))
print(json.dumps(results))
""",
        arguments={"token": TOKEN},
        package=package,
        home=f"empty cache {package}",
    )
    assert not package or facts["verified"] == place[2]["variable"]
    for name, kind in (("variable", "ContextPrunedLlamaForCausalLM"), ("stock", "LlamaForCausalLM")):
        assert (facts[name]["digest"], facts[name]["class"]) == (place[2][name], kind)
        assert facts[name]["ids"] == tiny_tokenizer()("the court").input_ids
        for file, total in facts[name]["files"].items():
            if (name, file) != ("stock", "README.md"):  # which was edited since
                assert hashlib.sha256((place[0] / name / file).read_bytes()).hexdigest() == total


def test_results_models_and_commands_push_the_same(place):
    """`PruneResult.push_to_hub`, a variable-width model's own, and the command line."""
    folder, _, _ = place
    facts = run(
        place,
        """
import contextlib, io, os, shutil
os.environ["HF_TOKEN"] = arguments["token"]
import torch
from hf_context_prune import EvalOptions, PrunerConfig, load_pruned, prune
from hf_context_prune.cli import app as cli
from hf_context_prune.errors import PublishError

model = load_pruned("variable")
model.push_to_hub("org/own", token=arguments["token"])
with torch.no_grad():
    model.lm_head.weight.mul_(2)
model.push_to_hub("org/changed", token=arguments["token"])
shutil.copytree("variable", "leaky")
with open("leaky/README.md", "a") as file:
    file.write("token: " + arguments["token"])
refused = {}
def attempt(name, call):
    try:
        call()
    except PublishError as error:
        refused[name] = " ".join(str(error).split())
attempt("own", lambda: load_pruned("leaky").push_to_hub("org/leaky", token=arguments["token"]))

config = PrunerConfig(mlp_ratio=0.25, num_calibration_samples=8, max_seq_length=32)
options = EvalOptions(benchmark=False, memory=False, max_tokens=300)
result = prune("base", arguments["texts"], config, eval_options=options)
pushed = result.push_to_hub("org/result", token=arguments["token"], commit_message="From Python")
again = result.push_to_hub("org/result", token=arguments["token"])
attempt("result", lambda: result.push_to_hub("else/where", token=arguments["token"]))

def command(*words):
    sys.argv = ["hf-context-prune", *words]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        return [end.code or 0, out.getvalue(), err.getvalue()]

open("variable/notes.txt", "w").close()
results = {
    "pushed": pushed.to_dict(), "again": again.to_dict(), "refused": refused,
    "command": command("push", "variable", "org/command"),
    "same": command("push", "variable", "org/command", "--format", "quiet"),
    "json": command("push", "variable", "org/command", "--create-pr", "--format", "json"),
    "no": command("push", "variable", "else/where"),
    "nothing": command("push", "nowhere", "org/x"),
}
os.unlink("variable/notes.txt")
print(json.dumps(results))
""",
        arguments={"token": TOKEN, "texts": texts()},
    )
    ours = files_of(folder / "variable")
    own = repo_of(place, "own")
    assert own.commits[own.refs["main"]].items() >= ours.items()
    changed = repo_of(place, "changed")
    left = changed.commits[changed.refs["main"]]
    assert "modeling_context_pruned.py" in left
    assert not left.keys() & {"eval_report.json", "pruning_plan.json", "manifest.json"}

    result = repo_of(place, "result")
    files = result.commits[facts["pushed"]["sha"]]
    assert {"README.md", "pruning_plan.json", "eval_report.json", "manifest.json"} <= files.keys()
    assert '"org/result"' in ModelCard(files["README.md"].decode()).text
    assert not facts["again"]["changed"]

    assert "README.md holds" in facts["refused"]["own"]
    assert repo_of(place, "leaky").refs.keys() == {"main"}
    assert not any("README.md" in files for files in repo_of(place, "leaky").commits.values())
    broken = facts["refused"]["result"]  # its folder is gone
    assert broken.startswith("The model was not pushed to else/where")
    assert "Then call push_to_hub again" in broken
    assert "hf-context-prune push" not in broken

    code, out, err = facts["command"]
    assert code == 0, err
    assert "Left out, as this tool did not save them: notes.txt" in out
    assert "Pushed and verified: " in out
    command = repo_of(place, "command")
    assert command.commits[command.refs["main"]].items() >= ours.items()
    assert facts["same"][1].strip().endswith(command.refs["main"])
    assert '"changed": false' in facts["json"][1]
    assert facts["no"][0] == 1
    assert "may not write" in facts["no"][2].replace("\n", " ")
    assert facts["nothing"][0] == 1


def test_trainers_push_the_card_and_no_arguments(place):
    """The mixin's Trainer at every checkpoint and at the end; a plain one warns, and its callback pushes."""
    _, hub, _ = place
    facts = run(
        place,
        """
import os, warnings
os.environ["HF_TOKEN"] = arguments["token"]
from transformers import Trainer
from hf_context_prune import ContextPruneCallback, ContextPruneTrainerMixin
from hf_context_prune.errors import PruningWarning
from hf_context_prune.errors import ConfigError
from tests.support.callback_cases import SCHEDULE, arguments as training, config_for, dataset
from tests.support.tiny import texts, tiny_model, tiny_tokenizer

class Ours(ContextPruneTrainerMixin, Trainer):
    pass

results = {}
def train(kind, name, config=None, **options):
    hook = ContextPruneCallback(config or config_for(domain="law"), SCHEDULE)
    trainer = kind(tiny_model("llama"), training("training " + name, **options), train_dataset=dataset(),
                   processing_class=tiny_tokenizer(), callbacks=[hook])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.train()
        except ConfigError as error:
            results[name + " error"] = str(error)
    results[name] = [str(w.message) for w in caught if issubclass(w.category, PruningWarning)]
    return trainer, hook

token = {"push_to_hub": True, "hub_token": arguments["token"]}
saves = {"save_strategy": "steps", "save_steps": 3, "hub_always_push": True}
trainer, hook = train(Ours, "ours", hub_model_id="org/ours", **token, **saves)
trainer.save_model()
results["digest"] = digest(trainer.model.eval())
done = trainer.push_to_hub(commit_message="The end")
results["done"] = done.to_dict()
results["future"] = trainer.push_to_hub(blocking=False).result().to_dict()
results["output"] = sorted(os.listdir("training ours"))
train(Ours, "whole checkpoints", hub_model_id="org/ours", hub_strategy="checkpoint", **token)
_, hook = train(Trainer, "plain", hub_model_id="org/plain", hub_strategy="end", **token)
adaptive = config_for(mlp_ratio=None, attention_ratio=None, pruning_ratio=0.2)
trainer, _ = train(Trainer, "on the way", adaptive, hub_model_id="org/way", **token, **saves)
trainer._finish_current_push()
results["callback"] = hook.push_to_hub("org/callback", token=arguments["token"]).to_dict()
hook.save_pretrained("from the callback")
try:
    ContextPruneCallback(config_for(), SCHEDULE).push_to_hub("org/x")
except ConfigError as error:
    results["too early"] = str(error)
Ours(tiny_model("llama"), training("training none", hub_model_id="org/none", **token), train_dataset=dataset(),
     processing_class=tiny_tokenizer()).push_to_hub()
print(json.dumps(results))
""",
        arguments={"token": TOKEN},
    )
    for name in ("ours", "callback"):
        repo = repo_of(place, name)
        for files in repo.commits.values():
            assert not [file for file in files if file.endswith((".bin", ".pt", ".pth")) or "optimizer" in file]
            assert TOKEN.encode() not in b"".join(files.values())
    ours = repo_of(place, "ours")
    messages = [request.path for request in hub.log if "/org/ours/commit/" in request.path]
    assert len(messages) >= 3  # checkpoints, and the end
    last = ours.commits[ours.refs["main"]]
    card = ModelCard(last["README.md"].decode())
    assert {"pruned", "law"} <= set(card.data.tags)
    assert "Nothing was measured" in card.text
    assert "ContextPruneCallback(PrunerConfig(" in card.text
    assert '"org/ours"' in card.text
    assert {"pruning_plan.json", "manifest.json", "tokenizer.json"} <= last.keys()
    assert b'"use_cache": false' not in last["config.json"]
    unpruned = repo_of(place, "none")  # nothing was pruned: the Trainer's own card
    assert b"generated_from_trainer" in unpruned.commits[unpruned.refs["main"]]["README.md"]
    assert facts["done"]["sha"] == facts["future"]["sha"]  # nothing changed in between
    assert {"README.md"} <= set(facts["output"])
    assert facts["ours"] == []
    assert "training_args.bin" in facts["whole checkpoints error"]
    way = repo_of(place, "way")  # what a plain Trainer pushes of its checkpoints reloads as well
    sent = way.commits[way.refs["main"]]
    config = json.loads(sent["config.json"])
    assert {f"{name.partition('.')[0]}.py" for name in config["auto_map"].values()} <= sent.keys()
    assert {"pruning_plan.json", "specs.py"} <= sent.keys()
    assert config["use_cache"]
    assert len(facts["plain"]) == 1
    assert "ContextPruneTrainerMixin" in facts["plain"][0]
    assert "callback.push_to_hub" in facts["plain"][0]
    assert "after trainer.train()" in facts["too early"].replace("\n", " ")
    assert files_of(place[0] / "from the callback").keys() >= {"README.md", "pruning_plan.json", "manifest.json"}
