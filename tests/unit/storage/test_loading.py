"""Loading refuses incomplete weights, impossible configs and unusable caches."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_context_prune.errors import LoadError, LoadWarning
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage import cache, loading, model_checks
from hf_context_prune.storage.gguf import explain_gguf_sizes
from hf_context_prune.storage.loading import LoadedModel, load_meta_model, load_model, load_pruned
from hf_context_prune.storage.saving import save_pruned
from tests.support.tiny import tiny_model, tiny_tokenizer

REMEDY = "download or save the model again"


@pytest.fixture(scope="module")
def native(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("native")
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def variable(tmp_path_factory, tokenizer):
    model = tiny_model("llama")
    widths = read_geometry(model.config, spec_of(model.config)).layers
    layers = tuple(LayerPlan(tuple(range(30 - i)), (0, 2)) for i in range(3))
    smaller = apply_plan(model, PruningPlan("llama", widths, layers, fingerprint(model)))
    folder = tmp_path_factory.mktemp("variable") / "model"
    save_pruned(smaller, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture
def copied(request, tmp_path, native, variable):
    folder = shutil.copytree({"native": native, "variable": variable}[request.param], tmp_path / "copy")
    (folder / "manifest.json").unlink(missing_ok=True)  # the weights are changed on purpose
    return folder


both = pytest.mark.parametrize("copied", ["native", "variable"], indirect=True)
only_native = pytest.mark.parametrize("copied", ["native"], indirect=True)
only_variable = pytest.mark.parametrize("copied", ["variable"], indirect=True)


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_weights_of_the_base_model_load(tokenizer, tmp_path):
    tiny_model("gpt2").transformer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").model.config.model_type == "gpt2"


@both
def test_a_folder_without_tokenizer_says_how_it_gets_one(copied):
    for path in copied.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        LoadError, match=r"no tokenizer that can be loaded.*tokenizer\.save_pretrained.*processing_class"
    ):
        load_model(copied, device="cpu")


@both
def test_a_missing_tensor_is_named(copied, subtests):
    weights = copied / "model.safetensors"
    original = weights.read_bytes()
    for gone in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.o_proj.weight"):
        weights.write_bytes(original)
        edit_weights(copied, lambda weights, gone=gone: weights.pop(gone))
        with subtests.test(gone=gone), pytest.raises(LoadError, match=f"{gone}.*{REMEDY}"):
            load_model(copied, device="cpu")


@both
def test_many_missing_tensors_are_counted(copied):
    def change(weights):
        for name in [name for name in weights if "layernorm" in name]:
            del weights[name]

    edit_weights(copied, change)
    with pytest.raises(LoadError, match=r"3 more \(6 tensors\)"):
        load_model(copied, device="cpu")


@both
def test_a_tensor_of_another_shape_is_named_with_both_shapes(copied):
    edit_weights(copied, lambda weights: weights.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(LoadError, match=rf"model.norm.weight \(\[47\], .* \[48\]\).*{REMEDY}"):
        load_model(copied, device="cpu")


def test_tensors_that_are_joined_on_loading_are_compared_too(tmp_path, tokenizer):
    """One of a layer's convolutions is stored as three, and a number per head stays in float32."""
    tiny_model("olmo_hybrid").to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.float32}
    again = load_model(save_pruned(model, tmp_path / "again", tokenizer=tokenizer), device="cpu").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    edit_weights(tmp_path, lambda weights: weights.pop("model.layers.0.linear_attn.k_conv1d.weight"))
    with pytest.raises(LoadError, match=rf"asks for model.layers.0.linear_attn.conv1d.weight.*{REMEDY}"):
        load_model(tmp_path, device="cpu")


@both
def test_layers_beyond_the_config_are_refused(copied):
    edit_weights(copied, lambda w: w.update({"model.layers.3.mlp.down_proj.weight": torch.ones(48, 40)}))
    with pytest.raises(LoadError, match=f"gives 3 layers.* also have layer 3.*{REMEDY}"):
        load_model(copied, device="cpu")


@only_native
def test_layers_beyond_the_config_are_refused_by_name(copied):
    info = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": {"model.layers.3.norm.weight"}}
    with pytest.raises(LoadError, match=r"model\.layers\.3\.norm\.weight.*num_hidden_layers is 3"):
        model_checks.check_complete("x", tiny_model("llama").config, info)


@both
def test_other_superfluous_tensors_are_named_in_a_warning(copied):
    edit_weights(copied, lambda weights: weights.update({"model.extra.weight": torch.ones(3)}))
    with pytest.warns(LoadWarning, match=r"model\.extra\.weight"):
        load_model(copied, device="cpu")


@only_variable
@pytest.mark.parametrize("change", ["absent", "beyond"])
def test_the_model_class_itself_refuses_a_header_that_does_not_fit(copied, change):
    name = "model.layers.1.mlp.down_proj.weight"
    edit_weights(copied, lambda w: w.pop(name) if change == "absent" else w.update({"model.layers.7.x": w[name] + 0}))
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj" if change == "absent" else "also have layer 7"):
        AutoModelForCausalLM.from_pretrained(copied)


WRONG = [
    *(("intermediate_size", value) for value in (0, -3, 40.5, "40", None, True)),
    *(("num_attention_heads", value) for value in (5, 7, 0, -6, "6")),
    *(("num_key_value_heads", value) for value in (0, -1, 4)),
    *(("num_hidden_layers", value) for value in (0, -1, "3", 2.0)),
    ("hidden_size", 0),
    ("head_dim", 0),
    ("vocab_size", 0),
]


@both
def test_impossible_sizes_are_refused_before_a_model_is_built(copied, monkeypatch, subtests):
    for name in ("from_config", "from_pretrained"):
        monkeypatch.setattr(AutoModelForCausalLM, name, lambda *_, **__: pytest.fail("a model was built"))
    original = (copied / "config.json").read_bytes()
    for (field, value), load in itertools.product(WRONG, (load_meta_model, load_model)):
        with subtests.test(field=field, value=value, load=load.__name__):
            (copied / "config.json").write_bytes(original)
            edit_config(copied, **{field: value})
            with pytest.raises(LoadError, match=r"(?s)" + ("heads" if "heads" in field else field)) as caught:
                load(copied)
            assert str(value) in str(caught.value)
            assert "Restore the config.json" in str(caught.value)


def test_heads_that_do_not_divide_the_hidden_size_are_refused(tmp_path, subtests):
    for family in ("gpt2", "opt", "gpt_neox"):
        config = tiny_model(family).config.to_dict()
        config["n_head" if family == "gpt2" else "num_attention_heads"] = 5
        (tmp_path / "config.json").write_text(json.dumps(config))
        with subtests.test(family=family), pytest.raises(LoadError, match=r"heads|n_head"):
            load_meta_model(tmp_path)


@both
def test_a_config_that_is_no_object_is_refused(copied, subtests):
    for content, load in itertools.product(("[]", "3", "null", "{", ""), (load_meta_model, load_model)):
        (copied / "config.json").write_text(content)
        with subtests.test(content=content, load=load.__name__), pytest.raises(LoadError, match="config"):
            load(copied)


def test_an_unusable_cache_is_named(tmp_path, monkeypatch, subtests):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "x", tmp_path / "file", "/proc/zzz"):
        monkeypatch.setenv(cache.CACHE_VARIABLE, str(place))
        with (
            subtests.test(place=str(place)),
            pytest.raises(LoadError, match=f"cache folder.*{cache.CACHE_VARIABLE}"),
        ):
            load_model(gguf)


def test_load_pruned_hashes_once(variable, monkeypatch):
    calls = []
    monkeypatch.setattr(loading, "verify_folder", lambda *args, **_: calls.append(args))
    load_pruned(variable)
    assert len(calls) == 1


def test_a_changed_file_is_refused(variable, tmp_path):
    folder = shutil.copytree(variable, tmp_path / "copy")
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.zeros(48)}))
    for load in (load_pruned, load_model):
        with pytest.raises(LoadError, match="manifest"):
            load(folder)


def test_an_empty_source_is_not_the_current_folder(native, monkeypatch, subtests):
    monkeypatch.chdir(native)
    for source, load in itertools.product(("", "  ", "\n"), (load_model, load_meta_model, load_pruned)):
        with subtests.test(source=source, load=load.__name__), pytest.raises(LoadError, match="MODEL"):
            load(source)


def test_sizes_of_a_gguf_file_are_told_to_be_those_of_its_copy(tmp_path):
    (tmp_path / "small.GGUF").write_bytes(b"x" * 1_500_000)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    file = LoadedModel(model, tokenizer, "small.GGUF", None, tmp_path, tmp_path / "small.GGUF")
    (note,) = explain_gguf_sizes(file, LoadedModel(model, tokenizer, "folder", None, tmp_path, tmp_path))
    assert note.startswith("small.GGUF is a GGUF file of 1.5 MB; bytes on disk")


@both
def test_a_cut_file_is_named_with_both_sizes(copied, subtests):
    path = copied / "model.safetensors"
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 5)
    for load in (load_model, load_meta_model):
        with subtests.test(load=load.__name__), pytest.raises(LoadError) as caught:
            load(copied)
        said = f"model.safetensors has {whole - 5:,} bytes, but its header lists tensors up to byte {whole:,}"
        assert said in str(caught.value)
        assert REMEDY in str(caught.value).lower()


@only_native
def test_a_pickle_is_refused_without_reading_a_weight_too(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"as a pickle \(pytorch_model\.bin\)"):
        load_meta_model(copied)
