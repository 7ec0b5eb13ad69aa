"""What may leave the machine: decided from the folder, before any connection."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from hashlib import sha256

import pytest
from huggingface_hub import RepoUrl

from hf_context_prune.errors import ConfigError, LoadError, PublishError
from hf_context_prune.modeling.modeling_context_pruned import add_companions
from hf_context_prune.publishing import push
from hf_context_prune.publishing.hub import files_to_push, push_folder
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.storage.staging import staged_folder
from hf_context_prune.utils.secret_scan import refuse_tokens
from hf_context_prune.utils.upload_check import is_allowed
from tests.support.tiny import tiny_model, tiny_tokenizer

A_TOKEN = "hf" + "_" + "aB3" * 11 + "x"


@pytest.fixture
def folder(tmp_path):
    return save_pruned(tiny_model("llama"), tmp_path / "model", tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    "name",
    [
        *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "x.pkl"),
        *(
            "pytorch_model.bin",
            ".env",
            ".git/config",
            "notes.txt",
            "sub/model.safetensors",
            "setup.py",
            "events.tfevents",
        ),
    ],
)
def test_files_that_never_go_to_a_model_repository(name):
    assert not is_allowed(name, "model")


@pytest.mark.parametrize("name", ["training_args.bin", "model.safetensors", "x.pkl", ".env", "a/b.sh", "data.gz"])
def test_files_that_never_go_to_a_space(name):
    assert not is_allowed(name, "space")


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md"),
        *("modeling_context_pruned.py", "pruning_plan.json", "eval_report.json", "widths.png", "manifest.json"),
        ".eval_results/questions.yaml",
    ],
)
def test_files_of_a_model(name):
    assert is_allowed(name, "model")


def test_what_the_manifest_does_not_list_is_left_out(folder):
    (folder / "notes.txt").write_text(A_TOKEN)
    (folder / "trainer_state.json").write_text("{}")
    files, left_out = files_to_push(folder, "model")
    assert left_out == ("notes.txt", "trainer_state.json")
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= files.keys()
    refuse_tokens(folder, list(files))


def test_pickles_beside_the_weights_stop_a_push(folder):
    (folder / "training_args.bin").write_bytes(b"a pickle")
    with pytest.raises(LoadError, match=r"training_args\.bin"):
        push_folder(folder, "org/x")


def test_a_listed_file_that_may_not_go_stops_a_push(tmp_path):
    with staged_folder(tmp_path / "model", required_bytes=0) as staging:
        (staging / "config.json").write_text("{}")
        (staging / "server.sh").write_text("true")
    with pytest.raises(PublishError, match=r"server\.sh.*may not go to a model repository"):
        push_folder(tmp_path / "model", "org/x")


def test_a_card_that_is_a_link_to_another_file_stops_a_push(tmp_path):
    with staged_folder(tmp_path / "model", required_bytes=0) as staging:
        (staging / "README.md").write_text("The card.")
    card = tmp_path / "model" / "README.md"
    (tmp_path / "model/notes.txt").write_text("machine example.org password 1234")
    card.unlink()
    card.symlink_to("notes.txt")
    with pytest.raises(PublishError, match=r"README\.md .* is a link to another file"):
        push_folder(tmp_path / "model", "org/x")


def test_a_file_that_changes_while_it_is_pushed_does_not_leave(folder, monkeypatch):
    def reached(api, *_, **__):
        (folder / "config.json").write_text(json.dumps({"note": A_TOKEN}))
        return RepoUrl("https://localhost/org/x", endpoint="https://localhost")

    monkeypatch.setattr(push.HfApi, "create_repo", reached)
    monkeypatch.setattr(push.Push, "_head", lambda *_: "a" * 40)
    monkeypatch.setattr(push.Push, "_files_at", lambda *_: {})
    monkeypatch.setattr(push.HfApi, "create_commit", lambda *_, **__: pytest.fail("it was sent"))
    with pytest.raises(PublishError, match=r"config\.json in .* changed"):
        push_folder(folder, "org/x")


def test_a_folder_of_others_or_damaged_is_refused(folder, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "theirs")
    with pytest.raises(LoadError, match=r"manifest\.json"):
        push_folder(tmp_path / "theirs", "org/x")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        push_folder(folder, "org/x")


@pytest.mark.parametrize(
    "token",
    [
        A_TOKEN,
        "ghp_" + "a1B2" * 9,
        "github_pat_" + "a1B2_" * 10,
        "glpat-" + "a1B2" * 6,
        "sk-proj-" + "a1B2" * 10,
        "sk-ant-" + "a1B2" * 10,
        "AKIA" + "ABCD" * 4,
        "AIza" + "a1B2C" * 7,
        "xoxb-" + "1234-" * 6,
        "pypi-AgE" + "a1B2" * 14,
        "nvapi-" + "a1B2" * 12,
        "-----BEGIN " + "RSA PRIVATE KEY-----",
    ],
)
def test_tokens_in_text_are_found_and_not_shown(tmp_path, token):
    (tmp_path / "config.json").write_text(f'{{\n "a": 1,\n "b": "{token}"\n}}')
    with pytest.raises(PublishError, match=r"config\.json holds .* in line 3") as caught:
        refuse_tokens(tmp_path, ["config.json"])
    assert token not in str(caught.value)


@pytest.mark.parametrize("before", ["line\n", "\t", "\u00e9", "HF_TOKEN_", "https://user:"])
@pytest.mark.parametrize("token", [A_TOKEN, "ghp_" + "a1B2" * 9, "AKIA" + "ABCD" * 4])
def test_tokens_after_an_escape_of_json_or_a_name_are_found(tmp_path, before, token):
    (tmp_path / "report.json").write_text(json.dumps({"completion": before + token}))
    with pytest.raises(PublishError, match=r"report\.json holds"):
        refuse_tokens(tmp_path, ["report.json"])
    (tmp_path / "report.json").write_text(json.dumps({"completion": f"x{token}"}))  # a word that ends like one
    refuse_tokens(tmp_path, ["report.json"])


def test_a_token_across_two_reads_is_found(tmp_path):
    (tmp_path / "x.json").write_text("\n" * (2**20 - 10) + f" {A_TOKEN} ")
    with pytest.raises(PublishError, match=f"in line {2**20 - 9:d}"):
        refuse_tokens(tmp_path, ["x.json"])


def test_the_token_of_the_upload_is_found_whatever_its_form(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "of-no-known-form"}')
    refuse_tokens(tmp_path, ["config.json"])
    with pytest.raises(PublishError, match="the token of this upload"):
        refuse_tokens(tmp_path, ["config.json"], "of-no-known-form")


def test_a_token_in_the_folder_stops_the_push(folder):
    config = json.loads((folder / "config.json").read_text()) | {"note": A_TOKEN}
    with staged_folder(folder.with_name("leaking"), required_bytes=0) as staging:
        for path in folder.iterdir():
            if path.name != "manifest.json":
                (staging / path.name).write_bytes(path.read_bytes())
        (staging / "config.json").write_text(json.dumps(config))
    with pytest.raises(PublishError, match=r"config\.json holds a Hugging Face token"):
        push_folder(folder.with_name("leaking"), "org/x")


def test_arguments_that_contradict_each_other(folder):
    with pytest.raises(ConfigError, match="pull request against main"):
        push_folder(folder, "org/x", revision="dev", create_pr=True)
    with pytest.raises(ConfigError, match="'model' or 'space'"):
        push_folder(folder, "org/x", repo_type="dataset")
    with pytest.raises(ConfigError, match="not the id of a repository"):
        push_folder(folder, "a/b/c")


def test_without_a_network_it_says_what_to_run(folder):
    """HF_HUB_OFFLINE is set for the tests."""
    with pytest.raises(PublishError, match=r"HF_HUB_OFFLINE.*hf-context-prune push .*model org/x"):
        push_folder(folder, "org/x")


def test_what_a_models_own_push_takes_along_was_saved_in_its_folder(tmp_path):
    source, target = tmp_path / "a" / "source", tmp_path / "b" / "target"
    source.mkdir(parents=True)
    target.mkdir(parents=True)
    (tmp_path / "secret").write_text("password 1234")
    (source.parent / "above.txt").write_text("of someone else")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (source / name).write_text(name)
    for name in ("README.md", "vocab.json"):
        (source / name).symlink_to(tmp_path / "secret")
    (target / "model.safetensors").write_text("model.safetensors")
    sums = {path.name: {"sha256": sha256(path.name.encode()).hexdigest()} for path in source.iterdir()}
    above = {"../above.txt": {"sha256": sha256(b"of someone else").hexdigest()}}
    manifest = json.dumps({"format": "hf_context_prune", "files": sums | above})
    (source / "manifest.json").write_text(manifest[:-9])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        add_companions(str(source), str(target))
    (source / "manifest.json").write_text(json.dumps({"files": sums, "short_name": "of another program"}))
    add_companions(str(source), str(target))
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]
    (source / "manifest.json").write_text(manifest)
    add_companions(str(source), str(target))
    assert {path.name for path in target.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_what_it_says_to_run_does_the_same_push(folder):
    spaced = folder.rename(folder.with_name("a model; id"))
    with pytest.raises(PublishError) as caught:
        push_folder(spaced, "org/x", private=True, revision="dev", commit_message="It's mine")
    words = shlex.split(str(caught.value).partition("`")[2].partition("`")[0])
    private = ["--private", "--commit-message", "It's mine", "--revision", "dev"]
    assert words == ["hf-context-prune", "push", str(spaced), "org/x", *private]
    with pytest.raises(PublishError, match=r"push '[^']*a model; id' org/x --create-pr`"):
        push_folder(spaced, "org/x", create_pr=True)


def test_a_push_loads_no_torch():
    code = "import sys, hf_context_prune.publishing.hub; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
