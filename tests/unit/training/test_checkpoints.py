"""Checkpoints that a kill cut short, or that hold a pickle: refused in words that name the last whole one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_context_prune.errors import LoadError
from hf_context_prune.training.callback import wholeness
from hf_context_prune.training.callback.callback import ContextPruneCallback
from hf_context_prune.training.callback.checkpoints import load_checkpoint
from hf_context_prune.training.callback.wholeness import check_resumable, check_whole
from tests.support.callback_cases import SCHEDULE, OurTrainer, config_for, trainer_for
from tests.support.marks import TINY_TEXT
from tests.support.tiny import tiny_tokenizer

pytestmark = TINY_TEXT

VARIABLE = {"mlp_ratio": None, "attention_ratio": None, "pruning_ratio": 0.2, "allocation": "adaptive"}
READ = {  # file: what the model or the resumed training reads it for
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "pruning_plan.json",
}


def callback():
    return ContextPruneCallback(config_for(**VARIABLE), SCHEDULE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training with the checkpoints 3 and 6, and its end."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = trainer_for(folder, callback(), save_strategy="steps", save_steps=3)
    trainer.processing_class = tiny_tokenizer()
    trainer.train()
    trainer.save_model(str(folder / "final"))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(trained / name, tmp_path / name)
    return tmp_path


def refused_everywhere(folder, whole):
    """Return the message about a checkpoint; the same for loading, a path to resume, and True."""
    said = []
    for attempt in (
        lambda: load_checkpoint(folder),
        lambda: check_resumable(str(folder), folder.parent),
        lambda: check_resumable(True, folder.parent),
    ):
        with pytest.raises(LoadError) as caught:
            attempt()
        said.append(str(caught.value))
    assert len(set(said)) == 1
    assert said[0].startswith(f"{folder} is not a whole checkpoint: ")
    assert (f"The last whole checkpoint is {whole}:" if whole else "start the training again") in said[0]
    return said[0]


def cuts(content):
    """(what happened, the bytes that are left) of a file that a kill or a full disk cut."""
    return [("empty", b""), ("half", content[: len(content) // 2]), ("all but the end", content[:-2])]


def test_a_checkpoint_that_was_cut_names_the_last_whole_one(folder, subtests):
    cut, whole = folder / "checkpoint-6", (folder / "checkpoint-3").resolve()
    assert load_checkpoint(cut).num_parameters()
    check_resumable(True, folder)
    names = sorted(path.name for path in cut.iterdir())
    assert set(names) >= READ
    for name in names:
        content = (cut / name).read_bytes()
        with subtests.test(f"{name} is missing"):
            (cut / name).unlink()
            if name in READ - {"pruning_plan.json"}:  # the same plan is in trainer_state.json
                assert f"{name} is missing" in refused_everywhere(cut, whole).replace("rng_state*", "rng_state")
            else:  # and tokenizer, modeling files and training_args.bin are read by nobody here
                check_whole(cut, to_resume=True)
        for kind, left in cuts(content):
            if name not in READ or (name.endswith(".json") and kind == "all but the end"):
                left = content[:-3] if name in READ else left  # the last byte is a newline
            with subtests.test(f"{name} is cut: {kind}"):
                (cut / name).write_bytes(left)
                if name in READ:
                    assert name in refused_everywhere(cut, whole)
                else:
                    check_whole(cut, to_resume=True)
        (cut / name).write_bytes(content)
    assert load_checkpoint(cut).num_parameters()


def test_a_kill_at_every_file_of_a_save(folder, subtests):
    """A Trainer writes file by file; what is there when it is killed after each of them."""
    cut, whole = folder / "checkpoint-6", (folder / "checkpoint-3").resolve()
    kept = folder / "kept"
    shutil.copytree(cut, kept)
    order = sorted((path.stat().st_mtime_ns, path.name) for path in kept.iterdir())
    # The callback adds pruning_plan.json at the end, and replaces config.json once more.
    names = ["config.json", *(name for _, name in order if name not in ("config.json", "pruning_plan.json"))]
    assert names[-1] == "trainer_state.json"
    assert names.index("model.safetensors") < names.index("optimizer.pt") < names.index("trainer_state.json")
    for count in range(len(names)):
        with subtests.test(f"killed after {count} files"):
            shutil.rmtree(cut)
            cut.mkdir()
            for name in names[:count]:
                shutil.copy2(kept / name, cut / name)
            refused_everywhere(cut, whole)


def test_where_no_checkpoint_is_whole(folder):
    for name in ("checkpoint-3", "checkpoint-6"):
        (folder / name / "trainer_state.json").write_text('{"global_step": 3, "log')
    assert "trainer_state.json is not whole JSON" in refused_everywhere(folder / "checkpoint-6", None)
    with pytest.raises(LoadError, match=r"holds no checkpoint to resume from\. Start the training again"):
        check_resumable(True, folder / "nothing")
    with pytest.raises(LoadError, match="not a whole checkpoint: there is no such folder"):
        load_checkpoint(folder / "checkpoint-9")


def test_a_whole_one_after_a_cut_one_is_named(folder):
    (folder / "checkpoint-3/optimizer.pt").unlink()
    with pytest.raises(LoadError, match=r"optimizer.pt is missing.*last whole checkpoint is .*checkpoint-6: take"):
        load_checkpoint(folder / "checkpoint-3")


def test_shards_are_checked(folder, subtests):
    cut, whole = folder / "checkpoint-6", (folder / "checkpoint-3").resolve()
    model = load_checkpoint(cut)
    (cut / "model.safetensors").unlink()
    model.save_pretrained(cut, max_shard_size="40KB")
    shards = sorted(path.name for path in cut.glob("model-*.safetensors"))
    assert len(shards) > 1
    again = load_checkpoint(cut)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    for name in (shards[1], "model.safetensors.index.json"):
        content = (cut / name).read_bytes()
        for left in (b"", content[: len(content) // 2]):
            with subtests.test(name):
                (cut / name).write_bytes(left)
                assert name in refused_everywhere(cut, whole)
        (cut / name).write_bytes(content)
    with subtests.test("a shard without one of its tensors"):
        tensors = load_file(cut / shards[0])
        lost = tensors.pop(min(tensors))
        save_file(tensors, cut / shards[0])
        assert f"{shards[0]} lacks" in refused_everywhere(cut, whole)
        assert lost is not None
    with subtests.test("a name that leads out of the folder"):
        (cut / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../evil.safetensors"}}')
        assert "is no file name" in refused_everywhere(cut, whole)


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_no_pickle_is_loaded_in_place_of_any_file(folder, tmp_path, subtests):
    cut, mark = folder / "checkpoint-6", tmp_path / "ran"
    pickle.loads(pickle.dumps(Trap(mark)))  # the trap works
    mark.unlink()
    evil = pickle.dumps(Trap(mark))
    for name in sorted(path.name for path in cut.iterdir()):
        content = (cut / name).read_bytes()
        with subtests.test(name):
            (cut / name).write_bytes(evil)
            if name in READ:
                refused_everywhere(cut, (folder / "checkpoint-3").resolve())
            else:
                load_checkpoint(cut)
            assert not mark.exists()
        with subtests.test(f"{name}, as torch packs pickles"):
            with zipfile.ZipFile(cut / name, "w") as archive:
                archive.writestr("archive/data.pkl", evil)
                archive.writestr("archive/version", "3\n")
            if name.endswith((".pt", ".pth", ".bin")):  # looks whole: only the Trainer opens it, by weights_only
                load_checkpoint(cut)
            elif name in READ:
                refused_everywhere(cut, (folder / "checkpoint-3").resolve())
            assert not mark.exists()
        (cut / name).write_bytes(content)


def test_weights_that_are_a_pickle_are_refused(folder):
    cut, mark = folder / "checkpoint-6", folder / "ran"
    weights = load_file(cut / "model.safetensors")
    (cut / "model.safetensors").unlink()
    torch.save(weights, cut / "pytorch_model.bin")
    for attempt in (lambda: load_checkpoint(cut), lambda: check_resumable(True, folder)):
        with pytest.raises(LoadError, match=r"a pickle \(pytorch_model.bin\).*refused\. Convert them to safetensors"):
            attempt()
    (cut / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(LoadError, match="a pickle"):
        load_checkpoint(cut)
    assert not mark.exists()


def test_a_pipe_in_place_of_a_file_is_refused_at_once(folder, subtests):
    cut = folder / "checkpoint-6"
    for name in sorted(READ):
        with subtests.test(name):
            content = (cut / name).read_bytes()
            (cut / name).unlink()
            os.mkfifo(cut / name)
            assert f"{name} is not a file" in refused_everywhere(cut, (folder / "checkpoint-3").resolve())
            (cut / name).unlink()
            (cut / name).write_bytes(content)


def test_weights_of_another_model_are_refused(folder):
    cut = folder / "checkpoint-6"
    weights = load_file(cut / "model.safetensors")
    del weights["model.norm.weight"]  # the file is whole, and a tensor of the model is not in it
    save_file(weights, cut / "model.safetensors")
    with pytest.raises(LoadError, match=r"model\.norm\.weight, which the weights .* lack"):
        load_checkpoint(cut)


def test_a_trainer_with_the_mixin_refuses_before_it_loads(folder, trained, monkeypatch, subtests):
    cut = folder / "checkpoint-6"
    (cut / "optimizer.pt").unlink()  # which a Trainer passes over in silence
    model = load_checkpoint(trained / "checkpoint-6")
    trainer = trainer_for(folder, callback(), kind=OurTrainer, model=model)
    monkeypatch.setattr(trainer, "_load_from_checkpoint", lambda *_: pytest.fail("the Trainer loaded it"))
    for given in (True, str(cut)):
        with subtests.test(str(given)), pytest.raises(LoadError, match=r"optimizer\.pt is missing"):
            trainer.train(resume_from_checkpoint=given)


def test_a_checkpoint_of_the_model_alone_loads_and_does_not_resume(folder, trained):
    """As ``save_only_model=True`` leaves it. A plain Trainer tells the callback nothing until it has loaded it."""
    alone = folder / "checkpoint-6"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (alone / name).unlink()
    model = load_checkpoint(alone)
    with pytest.raises(LoadError, match=r"optimizer.pt is missing.*\(save_only_model=True leaves it out\)"):
        check_resumable(True, folder)
    with pytest.raises(LoadError, match="step 6 gave no state of optimizer and learning rate"):
        trainer_for(folder, callback(), model=model).train(resume_from_checkpoint=str(alone))
    assert load_checkpoint(trained / "final").num_parameters() == model.num_parameters()


def test_a_damaged_state_of_the_callback_is_refused_in_words(folder):
    state = folder / "checkpoint-6/trainer_state.json"
    values = json.loads(state.read_text())
    del values["stateful_callbacks"]["ContextPruneCallback"]["attributes"]["progress"]["final"]
    state.write_text(json.dumps(values))
    model = load_checkpoint(folder / "checkpoint-6")
    with pytest.raises(LoadError, match=r"damaged state of its ContextPruneCallback \(KeyError: 'final'\)"):
        trainer_for(folder, callback(), model=model).train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_numbers_that_a_trainer_logs_are_no_damage(folder):
    state = folder / "checkpoint-6/trainer_state.json"
    values = json.loads(state.read_text())
    values["log_history"].append({"loss": float("nan"), "step": 6})
    state.write_text(json.dumps(values))
    assert "NaN" in state.read_text()
    check_resumable(True, folder)


def test_processes_resume_their_own_random_numbers(folder, monkeypatch):
    cut = folder / "checkpoint-6"
    state = cut / "trainer_state.json"
    state.write_text(state.read_text().replace('"num_processes": 1', '"num_processes": 2'))
    (cut / "rng_state.pth").rename(cut / "rng_state_0.pth")
    check_whole(cut)  # in one process, to use the model
    monkeypatch.setattr(wholeness, "num_processes", lambda: 2)
    for index in (0, 1):
        monkeypatch.setattr(wholeness, "process_index", lambda index=index: index)
        if index == 0:
            check_whole(cut, to_resume=True)
            continue
        with pytest.raises(LoadError, match=r"rng_state_1\.pth is missing"):
            check_whole(cut, to_resume=True)
