"""Large models: layers lie in files, which become the shards of the saved folder, and no bit differs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_context_prune import EvalOptions, PrunerConfig, load_pruned, prune, prune_to_folder
from hf_context_prune.pruning import model_builder
from hf_context_prune.storage import layer_shards
from hf_context_prune.storage.cache import cache_dir
from hf_context_prune.storage.layer_shards import LayerShards, save_weights
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.saving import save_pruned
from tests.support.marks import TINY_TEXT
from tests.support.tiny import model_and_text, tiny_model

pytestmark = TINY_TEXT

CONFIG = {"max_seq_length": 32, "num_calibration_samples": 16}
QUICK = EvalOptions(max_tokens=300, benchmark=False, memory=False)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_and_text(tmp_path_factory.mktemp("large"), "data.jsonl")


def run(place, output, config):
    return prune_to_folder(place / "base", place / "data.jsonl", output, config, eval_options=QUICK)


def states(folder):
    return load_pruned(folder).state_dict()


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "config",
    [
        PrunerConfig(mlp_ratio=0.5, **CONFIG),
        PrunerConfig(mlp_ratio=0.5, reconstruction="least_squares", **CONFIG),
        PrunerConfig(vocab_size=288, mlp_ratio=0.0, attention_ratio=0.0, pad_to_multiple_of=8, **CONFIG),
        PrunerConfig(pruning_ratio=0.2, pad_to_multiple_of=8, **CONFIG),
    ],
    ids=["sequential", "one-shot", "tokens", "default"],
)
def test_a_large_model_is_saved_from_its_layers_files(place, tmp_path, monkeypatch, config):
    run(place, tmp_path / "whole", config)
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    monkeypatch.setattr(model_builder, "SHARD_BYTES", 1)
    linked = []
    monkeypatch.setattr(layer_shards.os, "link", lambda a, b, link=layer_shards.os.link: (linked.append(b), link(a, b)))
    run(place, tmp_path / "shards", config)
    assert_same(states(tmp_path / "whole"), states(tmp_path / "shards"))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    layers = len({name.split(".")[2] for name in index["weight_map"] if ".layers." in name})
    assert len(linked) == layers
    assert files == [f"model-{number:05d}-of-{layers + 1:05d}.safetensors" for number in range(1, layers + 2)]
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for name, tensor in states(tmp_path / "whole").items() if name in index["weight_map"]
    )
    verify_folder(tmp_path / "shards")
    assert not list((cache_dir() / "unfinished").iterdir())  # and the result still opens
    AutoModelForCausalLM.from_pretrained(tmp_path / "shards", trust_remote_code=False)


def test_another_disk_gets_copies(place, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    config = PrunerConfig(mlp_ratio=0.5, **CONFIG)
    run(place, tmp_path / "whole", config)
    monkeypatch.setattr(model_builder, "SHARD_BYTES", 1)
    monkeypatch.setattr(layer_shards.os, "link", refuse)
    run(place, tmp_path / "copied", config)
    assert_same(states(tmp_path / "whole"), states(tmp_path / "copied"))


def test_without_room_in_memory_the_layers_lie_in_files_without_a_name(place, monkeypatch):
    config = PrunerConfig(mlp_ratio=0.5, **CONFIG)
    whole = prune(place / "base", place / "data.jsonl", config, eval_options=QUICK).model
    monkeypatch.setattr(model_builder, "fits_in_memory", lambda size: False)
    opened = []

    class Recorded(LayerShards):
        def __init__(self, folder):
            super().__init__(folder)
            opened.append(folder)

    monkeypatch.setattr(model_builder, "LayerShards", Recorded)
    mapped = prune(place / "base", place / "data.jsonl", config, eval_options=QUICK).model
    assert opened == [None]
    assert_same(whole.state_dict(), mapped.state_dict())


def test_layers_that_were_trained_since_are_written_anew(tmp_path):
    model = tiny_model("llama")
    shards = LayerShards(tmp_path)
    for index in range(2):
        prefix = f"model.layers.{index}."
        state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
        model.load_state_dict(shards.keep(index, state), strict=False, assign=True)
    shards.belong_to(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.data += 1  # as some training code does: no version counter moves
    files = {path: path.read_bytes() for path in shards.files}
    save_pruned(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(model.state_dict(), loaded.state_dict())
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 2  # layer 0 alone is linked
    assert all(path.read_bytes() == before for path, before in files.items())
    for path in files:
        path.unlink()
    (tmp_path / "again").mkdir()
    save_weights(model, tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").glob("*.safetensors")] == ["model.safetensors"]
    assert_same(model.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict())
