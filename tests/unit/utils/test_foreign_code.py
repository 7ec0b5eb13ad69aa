"""No code of others is named by what this package saves, pushes, exports or recommends."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import transformers
from transformers import AutoTokenizer

from hf_context_prune import PrunerConfig, RecoveryConfig, prune
from hf_context_prune.errors import LoadError, PublishError, SaveError
from hf_context_prune.evaluation.harness import format_harness_command
from hf_context_prune.modeling.registry import build_auto_map
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.pipelines.export import export_model
from hf_context_prune.pipelines.recover import recover_folder
from hf_context_prune.publishing.card.card import build_card, make_card
from hf_context_prune.publishing.card.facts import read_facts
from hf_context_prune.publishing.hub import files_to_push
from hf_context_prune.publishing.space.folder import make_space_settings, write_space
from hf_context_prune.storage.loading import load_model, load_pruned
from hf_context_prune.storage.manifest import write_manifest
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.storage.staging import staged_folder
from hf_context_prune.training.callback.callback import ContextPruneCallback
from hf_context_prune.utils.foreign_code import drop_foreign_code, find_foreign_code
from hf_context_prune.utils.upload_check import refuse_upload
from tests.support.callback_cases import SCHEDULE, arguments, config_for, dataset
from tests.support.foreign_code import make_base, name_foreign_code
from tests.support.limits import within
from tests.support.marks import TINY_TEXT
from tests.support.runs import OPTIONS, QUICK
from tests.support.tiny import texts, tiny_model, tiny_tokenizer
from tests.unit.export.test_export import EASY

KINDS = {
    "stock": {"mlp_ratio": 0.25},
    "variable": {"pruning_ratio": 0.2, "units": "neurons,kv_groups", "native_architecture": False},
    "vocabulary": {"vocab_size": 280, "pad_to_multiple_of": 8},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base that names foreign code, and what was pruned from it."""
    place = tmp_path_factory.mktemp("foreign")
    base = load_model(make_base(place))
    for name, config in KINDS.items():
        prune(base, texts(), PrunerConfig(**OPTIONS, **config), eval_options=QUICK).save_pretrained(place / name)
    return place


def older(folder, target):
    """A folder as an earlier version saved it: with the reference, and a manifest that fits."""
    shutil.copytree(folder, target)
    name_foreign_code(target, "attacker/repo--evil.EvilTok")
    (target / "manifest.json").unlink()
    write_manifest(target)
    return target


def test_the_base_runs_code_of_others_and_what_is_pruned_from_it_does_not(place, subtests):
    for name in KINDS:
        with subtests.test(name):
            assert find_foreign_code(place / name) == []
            reopened = AutoTokenizer.from_pretrained(place / name, trust_remote_code=True)
            assert type(reopened).__module__.startswith("transformers.")
            own = load_model(place / name).tokenizer
            assert reopened("the court finds").input_ids == own("the court finds").input_ids
            transformers.AutoModelForCausalLM.from_pretrained(place / name, trust_remote_code=True)
            assert not (place / "mark").exists()
    AutoTokenizer.from_pretrained(place / "base", trust_remote_code=True)  # last: transformers runs a module once
    assert (place / "mark").exists()
    config = json.loads((place / "variable/config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_context_pruned.")


@TINY_TEXT
def test_recovered_and_trained_models_name_none(place, tmp_path):
    recovery = RecoveryConfig(max_steps=1, batch_size=2, max_seq_length=32, num_evals=1)
    recover_folder(place / "variable", texts(), recovery, eval_options=QUICK).save_pretrained(tmp_path / "recovered")
    assert find_foreign_code(tmp_path / "recovered") == []
    base = load_model(place / "base")
    hook = ContextPruneCallback(config_for(), SCHEDULE)
    options = arguments(tmp_path / "out", save_strategy="steps", save_steps=4)
    trainer = transformers.Trainer(
        base.model, options, train_dataset=dataset(), callbacks=[hook], processing_class=base.tokenizer
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trainer.save_model(str(tmp_path / "theirs"))
    hook.save_pretrained(tmp_path / "ours")
    for folder in ("ours", "theirs", "out/checkpoint-4", "out/checkpoint-8"):
        assert (tmp_path / folder / "tokenizer_config.json").is_file()
        assert find_foreign_code(tmp_path / folder) == [], folder


@pytest.fixture(scope="module")
def hub_base(place, tmp_path_factory):
    """A base of a native class that names foreign code in every way that a model of the Hub can."""
    folder = tmp_path_factory.mktemp("hub") / "base"
    shutil.copytree(place / "base", folder)
    evil = f"{place / 'evil'}--evil.EvilTok"
    for name, more in (
        (
            "config.json",
            {"auto_map": {"AutoConfig": evil, "AutoModelForCausalLM": evil}, "custom_pipelines": {"x": evil}},
        ),
        ("generation_config.json", {"auto_map": {"x": evil}}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | more))
    (folder / "custom_generate").mkdir()
    shutil.copyfile(place / "evil/evil.py", folder / "custom_generate/generate.py")
    (folder / "modeling_phi9.py").write_text((place / "evil/evil.py").read_text())
    return folder


def test_exports_name_none_and_refuse_a_folder_of_this_package_that_does(place, hub_base, tmp_path, subtests):
    export_model(place / "variable", tmp_path / "out", format="quanto", **EASY)
    assert find_foreign_code(tmp_path / "out") == []
    assert len(find_foreign_code(hub_base)) == 6
    mark = place / "mark"
    before = mark.exists()
    for format in ("quanto", "gguf"):  # what is left out is the same for all
        with subtests.test(format=format):
            export_model(hub_base, tmp_path / format, format=format, **EASY)
            assert find_foreign_code(tmp_path / format) == []
            assert not list((tmp_path / format).rglob("*.py"))
            assert mark.exists() == before
    assert len(find_foreign_code(hub_base)) == 6  # only the copy is changed
    with pytest.raises(
        LoadError, match=r"tokenizer_config\.json names .*evil\.EvilTok.* in auto_map.*context-prune card"
    ):
        export_model(older(place / "stock", tmp_path / "older"), tmp_path / "again", format="quanto", **EASY)


def test_what_names_foreign_code_is_not_published(place, tmp_path):
    folder = older(place / "variable", tmp_path / "older")
    with pytest.raises(PublishError, match=r"tokenizer_config\.json names 'attacker/repo--evil\.EvilTok' in auto_map"):
        files_to_push(folder, "model")
    with pytest.raises(PublishError, match=r"evil\.EvilTok"):
        refuse_upload(folder)  # of the model's own push_to_hub
    with pytest.raises(LoadError, match=r"evil\.EvilTok.*hf-context-prune card"):
        write_space(make_space_settings([str(folder)], base=str(place / "variable")), tmp_path / "space")
    assert not (tmp_path / "space").exists()
    with staged_folder(tmp_path / "app", required_bytes=0) as staging:  # a Space that holds a model
        (staging / "app.py").touch()
        (staging / "models/law").mkdir(parents=True)
        shutil.copyfile(folder / "tokenizer_config.json", staging / "models/law/tokenizer_config.json")
    with pytest.raises(PublishError, match=r"models/law names code .*evil\.EvilTok"):
        files_to_push(tmp_path / "app", "space")


def test_a_space_leaves_the_foreign_code_of_a_base_out(place, hub_base, tmp_path):
    write_space(make_space_settings([str(place / "variable")], base=str(hub_base)), tmp_path / "space")
    for folder in (tmp_path / "space/models").iterdir():
        assert find_foreign_code(folder) == []
        load_model(folder)
    assert not list((tmp_path / "space/models").rglob("modeling_phi9.py"))
    assert len(find_foreign_code(hub_base)) == 6


def test_a_models_own_push_takes_no_foreign_code_along(place, tmp_path):
    model = load_pruned(older(place / "variable", tmp_path / "older"))
    (tmp_path / "working").mkdir()
    model.save_pretrained(tmp_path / "working")
    with pytest.raises(PublishError, match=r"evil\.EvilTok"):
        model._upload_modified_files(str(tmp_path / "working"), "org/x", {}, commit_message="x")


def test_a_card_and_the_harness_never_advise_to_run_code_of_others(place, tmp_path):
    assert "trust_remote_code=True" in str(build_card(read_facts(place / "variable")))
    assert "trust_remote_code=True" in format_harness_command(str(place / "variable"), "q.jsonl", "task")
    assert "trust_remote_code" not in format_harness_command(str(place / "stock"), "q.jsonl", "task")
    assert ",trust_remote_code" not in format_harness_command("org/x", "q.jsonl", "task")
    folder = older(place / "variable", tmp_path / "older")
    assert ",trust_remote_code" not in format_harness_command(str(folder), "q.jsonl", "task")
    card = str(build_card(read_facts(folder)))
    assert "trust_remote_code=True" not in card
    assert "Don't load it with `trust_remote_code`" in card
    weights = folder / "tokenizer_config.json"
    os.link(weights, tmp_path / "before.json")
    make_card(folder)  # which mends the folder
    assert find_foreign_code(folder) == []
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    assert "evil.EvilTok" in (tmp_path / "before.json").read_text()  # a file of another name is not written to
    files_to_push(folder, "model")


def test_a_class_of_others_is_not_saved(place, tmp_path):
    theirs = AutoTokenizer.from_pretrained(place / "base", trust_remote_code=True)
    assert type(theirs).__name__ == "EvilTok"
    with pytest.raises(SaveError, match=r"Saving wrote evil\.py"):
        save_pruned(tiny_model("llama"), tmp_path / "out", tokenizer=theirs)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_would_reopen_as_another_one_is_not_saved(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": [None, "attacker/repo--evil.EvilTok"]}
    save_pruned(tiny_model("llama"), tmp_path / "same", tokenizer=tokenizer)
    other = tiny_tokenizer()
    other.add_tokens(["zebra"])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: other)
    with pytest.raises(SaveError, match=r"opens the saved files as a .* with other tokens"):
        save_pruned(tiny_model("llama"), tmp_path / "other", tokenizer=tokenizer)


def test_every_place_that_transformers_reads(tmp_path, subtests):
    foreign, own = "evil.Evil", "modeling_context_pruned.ContextPrunedLlamaForCausalLM"
    for name, values, left in (
        ("config.json", {"a": 1, "auto_map": {"AutoModel": foreign}}, {"a": 1}),
        ("config.json", {"auto_map": {"AutoModel": foreign, "Own": own}}, {"auto_map": {"Own": own}}),
        ("config.4.0.0.json", {"text_config": {"auto_map": {"AutoConfig": f"a/b--{own}"}}}, {"text_config": {}}),
        ("config.json", {"custom_pipelines": {"x": {"impl": foreign}}}, {}),
        ("tokenizer_config.json", {"auto_map": [None, foreign]}, {}),
        (
            "processor_config.json",
            {"image_processor": {"auto_map": {"AutoProcessor": foreign}}},
            {"image_processor": {}},
        ),
        ("preprocessor_config.json", {"auto_map": {"AutoFeatureExtractor": f"sub.{own}"}}, {}),
        ("generation_config.json", {"auto_map": foreign}, {}),
    ):
        with subtests.test(name=name, values=values):
            file = tmp_path / name
            file.write_text(json.dumps(values))
            (found,) = find_foreign_code(tmp_path)
            assert found.startswith(f"{name} names ")
            assert drop_foreign_code(tmp_path) == [found]
            assert json.loads(file.read_text()) == left
            file.unlink()
    for name, text in (
        ("tokenizer.json", '{"model": {"vocab": {"auto_map": 7}}}'),  # a token of that name
        ("config.json", "[" * 100_000),  # transformers can't read it either
        ("config.json", '{"auto_map": null}'),
        ("tokenizer_config.json", '{"chat_template": "auto_map"}'),
    ):
        with subtests.test(name=name, text=text[:40]):
            (tmp_path / name).write_text(text)
            assert find_foreign_code(tmp_path) == []
            (tmp_path / name).unlink()
    (tmp_path / "data.json").write_text(json.dumps({"auto_map": foreign}))  # transformers reads configs alone
    assert find_foreign_code(tmp_path) == []
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(LoadError, match="can't be searched"), within(seconds=2, megabytes=500):
        find_foreign_code(tmp_path)
    (tmp_path / "config.json").write_text('{"x": NaN, "auto_map": {"AutoConfig": "evil.Evil"}}')
    assert len(find_foreign_code(tmp_path)) == 1  # no strict JSON, and still read by transformers
    (tmp_path / "config.json").unlink()
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate/generate.py").touch()
    assert find_foreign_code(tmp_path) == ["custom_generate/generate.py replaces generate()"]


def test_the_packages_own_references_are_no_foreign_code(tmp_path):
    for spec in SPECS.values():
        (tmp_path / "config.json").write_text(json.dumps({"auto_map": build_auto_map(spec)}))
        assert find_foreign_code(tmp_path) == []
