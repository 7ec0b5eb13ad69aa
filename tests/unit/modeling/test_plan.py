"""The plan: a value with a hash, refused where it is damaged or does not belong to the model."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_context_prune.errors import PlanError, VocabularyError
from hf_context_prune.modeling.geometry import GONE, LayerWidths, read_geometry, widths_vary
from hf_context_prune.modeling.plan import GONE_LAYER, LayerPlan, PruningPlan, fingerprint
from hf_context_prune.modeling.plan_vocabulary import Vocabulary
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.pruning.surgery import apply_plan
from tests.support.tiny import tiny_model

DENSE = (LayerWidths(8, 4), LayerWidths(6, 4))
LAYERS = (LayerPlan((0, 2, 5, 7), (1,)), LayerPlan((1,), (0, 1, 2, 3)))
PLAN = PruningPlan("llama", DENSE, LAYERS, "ab" * 32, {"seed": 3, "data": {"name": "Gesetze §", "size": 0.5}})
VOCABULARY = Vocabulary(9, (0, 1, 5, 7, 3))


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, vocabulary=VOCABULARY)], ids=["units", "tokens"])
def test_round_trip(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    assert PruningPlan.load(path) == plan
    assert PruningPlan.load(str(path)).sha256 == plan.sha256
    assert PruningPlan.from_dict(json.loads(path.read_text(encoding="utf-8"))) == plan
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    PruningPlan.load(path).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert len([line for line in path.read_text().splitlines() if '"neurons"' in line]) == len(LAYERS)


def test_plans_from_before_vocabularies_still_load(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(damage(format_version=1, vocabulary="gone")))
    assert PruningPlan.load(path) == PLAN


def test_ids_of_a_vocabulary():
    assert VOCABULARY.to_new([7, 0, 2, 3]) == [3, 0, None, 4]
    assert VOCABULARY.to_old([3, 0, 4]) == [7, 0, 3]
    assert VOCABULARY.to_old(VOCABULARY.to_new(VOCABULARY.kept)) == list(VOCABULARY.kept)
    assert VOCABULARY.to_new(torch.tensor([7, 2])) == VOCABULARY.to_new(np.array([7, 2])) == [3, None]
    assert VOCABULARY.to_old(torch.tensor([3, 0])) == [7, 0]


def test_ids_of_no_vocabulary(subtests):
    for bad in ([99], [-100], [9], [1.5], [[1, 2]], ["1"], torch.tensor([[1, 2]]), [None]):
        with subtests.test(bad=bad):
            with pytest.raises(VocabularyError, match=r"old vocabulary; .* from 0 to 8"):
                VOCABULARY.to_new(bad)
            with pytest.raises(VocabularyError, match=r"new vocabulary; .* from 0 to 4"):
                VOCABULARY.to_old(bad)


def test_widths():
    assert PLAN.widths == (LayerWidths(4, 1), LayerWidths(1, 4))
    assert not PLAN.is_empty
    assert LAYERS[0].kept("mlp") == (0, 2, 5, 7)
    assert LAYERS[0].kept("attention") == (1,)


def test_the_identity_keeps_everything(model):
    geometry = read_geometry(model.config, SPECS["llama"])
    plan = PruningPlan.identity("context_pruned_llama", geometry)
    assert plan.is_empty
    assert plan.model_type == "llama"
    assert plan.layers == (LayerPlan(tuple(range(40)), (0, 1, 2)),) * 3


def test_a_plan_that_keeps_all_units_may_still_remove_tokens(model):
    geometry = read_geometry(model.config, SPECS["llama"])
    assert not replace(PruningPlan.identity("llama", geometry), vocabulary=VOCABULARY).is_empty


def test_a_plan_is_a_value():
    with pytest.raises(FrozenInstanceError):
        PLAN.model_type = "opt"


def test_the_hash_is_of_what_is_kept_and_for_which_model():
    assert len(PLAN.sha256) == 64
    assert replace(PLAN, provenance={}).sha256 == PLAN.sha256
    assert replace(PLAN, provenance={"seed": 4}).sha256 == PLAN.sha256
    changed = [
        replace(PLAN, model_type="qwen2"),
        replace(PLAN, model_fingerprint="cd" * 32),
        replace(PLAN, dense=(LayerWidths(9, 4), DENSE[1])),
        replace(PLAN, layers=(LayerPlan((0, 2, 5, 6), (1,)), LAYERS[1])),
        replace(PLAN, layers=(LayerPlan((0, 2, 5, 7), (2,)), LAYERS[1])),
        replace(PLAN, vocabulary=VOCABULARY),
        replace(PLAN, vocabulary=replace(VOCABULARY, dense=10)),
        replace(PLAN, vocabulary=replace(VOCABULARY, kept=(0, 1, 5, 3, 7))),
    ]
    assert len({plan.sha256 for plan in [PLAN, *changed]}) == 1 + len(changed)


def test_indices(subtests):
    for layer, said in (
        (LayerPlan((), (0,)), "Layer 1 of the plan keeps no neurons"),
        (LayerPlan((0,), ()), "Layer 1 of the plan keeps no kv_groups"),
        (LayerPlan((0, 6), (0,)), "Layer 1 .* neurons that are not ascending integers from 0 to 5"),
        (LayerPlan((-1, 2), (0,)), "Layer 1 .* neurons that are not ascending"),
        (LayerPlan((2, 1), (0,)), "Layer 1 .* neurons that are not ascending"),
        (LayerPlan((1, 1), (0,)), "Layer 1 .* neurons that are not ascending"),
        (LayerPlan((0,), (0, 4)), "Layer 1 .* kv_groups that are not ascending integers from 0 to 3"),
        (LayerPlan((0, True), (0,)), r"Layer 1 .* neurons that are not integers: \(0, True\)"),
        (LayerPlan((0, 1.0), (0,)), "Layer 1 .* neurons that are not integers"),
        (LayerPlan(("0",), (0,)), "Layer 1 .* neurons that are not integers"),
        (LayerPlan((None,), (0,)), "Layer 1 .* neurons that are not integers"),
    ):
        with subtests.test(layer=layer), pytest.raises(PlanError, match=said):
            replace(PLAN, layers=(LAYERS[0], layer))


DEEP = replace(PLAN, dense=(*DENSE, DENSE[0]), layers=(LAYERS[0], GONE_LAYER, LAYERS[0]))


def test_a_plan_may_remove_whole_layers(tmp_path):
    path = tmp_path / "plan.json"
    DEEP.save(path)
    data = json.loads(path.read_text())
    assert (data["format_version"], data["removed_layers"]) == (3, [1])
    assert PruningPlan.load(path) == DEEP
    assert DEEP.removed_layers == (1,)
    assert DEEP.kept_layers == (0, 2)
    assert DEEP.widths == (LayerWidths(4, 1), GONE, LayerWidths(4, 1))
    assert DEEP.kept_widths == (LayerWidths(4, 1),) * 2
    assert not DEEP.is_empty
    assert not widths_vary(DEEP.widths)
    assert PLAN.to_dict()["format_version"] == 2  # as before there were such plans
    assert "removed_layers" not in PLAN.to_dict()


def test_layers_that_can_not_be_gone(subtests):
    data = DEEP.to_dict()
    for damaged, said in (
        ({"removed_layers": [3]}, "removes layer 3, but its model has 3 layers, numbered from 0 to 2"),
        ({"removed_layers": [-1]}, "removes layer -1"),
        ({"removed_layers": [0]}, "Layer 0 of the plan is removed as a whole, but keeps neurons"),
        ({"removed_layers": []}, "Layer 1 of the plan keeps no neurons; .* or the whole layer goes"),
        ({"removed_layers": [1, 1]}, r"removed_layers is \[1, 1\]; its numbers must ascend"),
        ({"removed_layers": [True]}, r"removed_layers is \[True\]; it must be a list of integers"),
        ({"removed_layers": 1}, "removed_layers is 1; it must be a list of integers"),
        ({"format_version": 2}, "Layer 1 of the plan keeps no neurons"),
    ):
        with subtests.test(said=said), pytest.raises(PlanError, match=said):
            PruningPlan.from_dict({**data, **damaged})
    with pytest.raises(PlanError, match="removes all 2 layers; at least one must stay"):
        replace(PLAN, layers=(GONE_LAYER, GONE_LAYER))
    mixture = {"dense": (LayerWidths(0, 0, 4),) * 2}  # as of OLMoE, whose heads all stay
    with pytest.raises(PlanError, match="Layer 0 of the plan keeps no experts"):
        replace(PLAN, **mixture, layers=(LayerPlan((), ()), LayerPlan((), (), (0, 2))))
    assert replace(PLAN, **mixture, layers=(GONE_LAYER, LayerPlan((), (), (0, 2)))).removed_layers == (0,)


def test_layer_counts_must_agree():
    with pytest.raises(PlanError, match="The plan has 1 layers, its model has 2"):
        replace(PLAN, layers=LAYERS[:1])


def damage(**changes):
    data = json.loads(json.dumps(PLAN.to_dict()))
    data.update(changes)
    return {key: value for key, value in data.items() if value != "gone"}


FIRST = PLAN.to_dict()["layers"][0]


def test_damaged_values(subtests, tmp_path):
    path = tmp_path / "plan.json"
    for data, said in (
        *[(damage(**{key: "gone"}), key) for key in PLAN.to_dict()],
        (damage(format_version=6), "format version 6; this package reads 1 to 5"),
        (damage(format_version=3), "removed_layers"),
        (damage(format_version=None), "format version None"),
        (damage(layers=None), "not a pruning plan"),
        (damage(layers=7), "not a pruning plan"),
        (damage(layers=["x"]), "not a pruning plan"),
        (damage(layers={"0": FIRST}), "not a pruning plan"),
        (damage(layers=[]), "no layers"),
        (damage(layers=[{**FIRST, "neurons": 5}]), "not a pruning plan"),
        (damage(layers=[{**FIRST, "neurons": None}]), "not a pruning plan"),
        (damage(layers=[{**FIRST, "neurons": "0257"}]), "not integers"),
        (damage(layers=[{**FIRST, "neurons": [0, 8]}]), "from 0 to 7"),
        (damage(layers=[{**FIRST, "dense_neurons": "8"}]), "dense_neurons is '8'"),
        (damage(layers=[{**FIRST, "dense_neurons": 8.5}]), r"dense_neurons is 8\.5"),
        (damage(layers=[{**FIRST, "dense_kv_groups": True, "kv_groups": [0]}]), "dense_kv_groups is True"),
        (damage(layers=[{key: value for key, value in FIRST.items() if key != "kv_groups"}]), "kv_groups"),
        (damage(model_type=5), "model_type is 5"),
        (damage(model_fingerprint=None), "model_fingerprint is None"),
        (damage(vocabulary=5), "not a pruning plan"),
        (damage(vocabulary={"dense": 9}), "kept"),
        (damage(vocabulary={"dense": 9, "kept": None}), "not a pruning plan"),
        (damage(vocabulary={"dense": 9, "kept": []}), "keeps 0 of 9 tokens"),
        (damage(vocabulary={"dense": "9", "kept": [0]}), "keeps 1 of '9' tokens"),
        (damage(vocabulary={"dense": True, "kept": [0]}), "keeps 1 of True tokens"),
        (damage(vocabulary={"dense": 9, "kept": [0, 9]}), "vocabulary has 9; ids are integers from 0 to 8"),
        (damage(vocabulary={"dense": 9, "kept": [0, -1]}), "vocabulary has -1"),
        (damage(vocabulary={"dense": 9, "kept": [0, True]}), "vocabulary has True"),
        (damage(vocabulary={"dense": 9, "kept": [0, 1.0]}), r"vocabulary has 1\.0"),
        (damage(vocabulary={"dense": 9, "kept": "012"}), "vocabulary has '0'"),
        (damage(vocabulary={"dense": 9, "kept": [2, 0, 2]}), "vocabulary has an id twice"),
        (damage(provenance=None), "provenance is None"),
        (damage(provenance=["seed"]), r"provenance is \['seed'\]"),
        ([PLAN.to_dict()], "top level is a list"),
        ("plan", "top level is a str"),
        (None, "top level is a NoneType"),
    ):
        path.write_text(json.dumps(data))
        with subtests.test(said=said), pytest.raises(PlanError, match=said):
            PruningPlan.load(path)


def test_damaged_files(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    whole = path.read_bytes()
    for bad in (b"", whole[: len(whole) // 2], whole[:-2], b"\xff" + whole, b"{" * 9, whole + b"}"):
        path.write_bytes(bad)
        with pytest.raises(PlanError, match=r"plan\.json can't be read as a pruning plan"):
            PruningPlan.load(path)
    with pytest.raises(PlanError, match=r"other\.json does not exist"):
        PruningPlan.load(tmp_path / "other.json")
    with pytest.raises(PlanError, match="can't be read"):
        PruningPlan.load(tmp_path)


def plan_for(model, **changes):
    geometry = read_geometry(model.config, SPECS["llama"])
    layers = tuple(LayerPlan((0, 1, 2), (0,)) for _ in geometry.layers)
    return replace(PruningPlan("llama", geometry.layers, layers, fingerprint(model)), **changes)


def test_a_plan_for_another_model(model, subtests):
    plan = plan_for(model, vocabulary=Vocabulary(320, (0, 1, 2, 9)))
    for family, overrides, said in (
        ("qwen2", {}, "made for a llama model, this one is qwen2"),
        ("llama", {"intermediate_size": 41}, "3 layers of 40 neurons and 3 KV groups, this model has .* 41 neurons"),
        ("llama", {"num_key_value_heads": 6}, "3 KV groups, this model has .* 6 KV groups"),
        ("llama", {"num_hidden_layers": 2}, "made for 3 layers .* this model has 2 layers"),
        ("llama", {"seed": 1}, "other weights"),
        ("llama", {"vocab_size": 321}, "vocabulary is for 320 embedding rows, this model has 321"),
    ):
        with subtests.test(family=family, **overrides):
            stranger = tiny_model(family, **overrides)
            before = {name: tensor.clone() for name, tensor in stranger.state_dict().items()}
            with pytest.raises(PlanError, match=said):
                apply_plan(stranger, plan)
            assert all(torch.equal(tensor, before[name]) for name, tensor in stranger.state_dict().items())


def test_a_plan_from_shapes_alone_fits_any_weights(model):
    plan = plan_for(model, model_fingerprint="")
    assert apply_plan(tiny_model("llama", seed=1), plan).num_parameters() < model.num_parameters()


def test_one_changed_weight_changes_the_fingerprint(model):
    before = fingerprint(model)
    assert before == fingerprint(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert fingerprint(model) != before


def test_the_fingerprint_does_not_depend_on_the_dtype_of_loading(tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    full = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert full.dtype != half.dtype
    assert fingerprint(full) == fingerprint(half)
    plan = plan_for(full)
    assert apply_plan(half, plan).num_parameters() == apply_plan(full, plan).num_parameters()
