"""k-quants: which tensor gets which type, what falls back, and that llama.cpp runs them."""

from __future__ import annotations

from contextlib import closing

import gguf as library
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader

from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import ConfigError, DataError, PruningWarning
from hf_context_prune.export import gguf
from hf_context_prune.export.importance import measure_importance
from hf_context_prune.export.k_quants import MIXTURES, bytes_of, quantize, type_of
from hf_context_prune.export.run import read_export
from hf_context_prune.export.runtime import TorchRuntime
from hf_context_prune.pipelines.export import export_model
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.storage.saving import save_pruned
from tests.support.tiny import texts, tiny_model, tiny_tokenizer

IDS = (1, 40, 41, 90, 91, 200, 201, 7, 64, 65)
WIDE = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
WIDE |= {"intermediate_size": 512, "num_hidden_layers": 2}


def loaded_of(**overrides):
    return LoadedModel(tiny_model("llama", **(WIDE | overrides)), tiny_tokenizer(), "tiny", None, None)


def types_in(folder):
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(folder / gguf.FILE_NAME).tensors}


def calm(**overrides):
    """A model of small weights, whose loss follows theirs smoothly."""
    loaded = loaded_of(**overrides)
    with torch.no_grad():
        for value in loaded.model.parameters():
            if value.ndim == 2:
                value.mul_(0.4)
    return loaded


@pytest.mark.parametrize("weights", MIXTURES)
def test_llama_cpp_reads_what_was_written(weights, tmp_path):
    """Its losses are those of the model with the same rounded weights."""
    loaded = calm()
    gguf.write(loaded, tmp_path, weights)
    types = {name: Kind[kind] for name, kind in types_in(tmp_path).items()}
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, 2)
    before = TorchRuntime(loaded.model).losses(IDS)
    with torch.no_grad():
        for name, value in loaded.model.named_parameters():
            if value.ndim == 2:
                kind = types[names.get_name(name, try_suffixes=(".weight",))]
                value.copy_(torch.from_numpy(library.quants.dequantize(quantize(value.numpy(), kind), kind)))
    expected = TorchRuntime(loaded.model).losses(IDS)
    with closing(gguf.load(tmp_path)) as runtime:
        found = runtime.losses(IDS, expected)
    assert found == pytest.approx(expected, abs=0.2)  # llama.cpp rounds what the weights read, too
    assert found != pytest.approx(before, abs=0.2)


def test_tensors_that_suffer_most_have_more_bits(tmp_path):
    gguf.write(loaded_of(num_hidden_layers=9), tmp_path, "q4_k_m")
    types = types_in(tmp_path)
    assert types["output_norm.weight"] == "F32"
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == types["blk.0.ffn_up.weight"] == types["blk.0.attn_q.weight"] == "Q4_K"
    for part in ("ffn_down", "attn_v"):
        assert [layer for layer in range(9) if types[f"blk.{layer}.{part}.weight"] == "Q6_K"] == [0, 3, 6, 7, 8]


def test_a_tied_embedding_has_the_bits_of_a_head(tmp_path):
    gguf.write(loaded_of(tie_word_embeddings=True), tmp_path, "q4_k_m")
    types = types_in(tmp_path)
    assert types["token_embd.weight"] == "Q6_K"
    assert "output.weight" not in types


def test_rows_that_blocks_do_not_divide_fall_back_and_are_counted(tmp_path):
    with pytest.warns(PruningWarning, match=r"[\d.]+ of [\d.]+ MB of weights have rows that blocks of 256 don't"):
        gguf.write(loaded_of(hidden_size=96), tmp_path, "q4_k_m")
    types = types_in(tmp_path)
    assert types["blk.0.ffn_up.weight"] == "Q5_0"  # rows of 96
    assert types["blk.1.ffn_down.weight"] == "Q6_K"  # of 512
    assert types["output.weight"] == "Q8_0"
    assert type_of("blk.0.ffn_up.weight", (8, 40), MIXTURES["q4_k_m"], layers=2, tied=False) == (Kind.F16, False)


@pytest.mark.parametrize(("neurons", "filled"), [(500, 512), (300, 320), (256, 256), (10, 32)])
def test_neurons_are_filled_up_to_what_makes_the_smaller_file(neurons, filled, tmp_path, recwarn):
    gguf.write(loaded_of(intermediate_size=neurons), tmp_path, "q4_k_m")
    fields = GGUFReader(tmp_path / gguf.FILE_NAME).fields
    assert fields["llama.feed_forward_length"].contents() == filled
    warned = [one for one in recwarn if issubclass(one.category, PruningWarning)]
    assert bool(warned) == bool(filled % 256)
    shapes = [
        ((width, 256), (width, 256), (256, width)) for width in (-(-neurons // 256) * 256, -(-neurons // 32) * 32)
    ]
    assert bytes_of(((filled, 256), (filled, 256), (256, filled)), Kind.Q4_K) == min(
        bytes_of(shape, Kind.Q4_K) for shape in shapes
    )


def test_blocks_are_those_that_the_package_gguf_reads():
    values = np.random.default_rng(0).standard_normal((300, 512)).astype(np.float32)
    errors = {}
    for kind in (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.IQ4_NL):
        back = library.quants.dequantize(quantize(values, kind), kind)
        errors[kind] = float(np.sqrt(np.square(back - values).mean()))
    assert errors[Kind.Q8_0] < errors[Kind.Q6_K] < errors[Kind.Q5_K] < errors[Kind.Q4_K] < errors[Kind.Q3_K] < 0.2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert np.array_equal(quantize(values, Kind.Q4_K), quantize(values[:], Kind.Q4_K))
    finally:
        torch.set_num_threads(threads)


def test_inputs_that_matter_keep_more_of_their_digits():
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    importance = np.ones(256, np.float32)
    importance[:8] = 1000

    def error(weights):
        back = library.quants.dequantize(quantize(values, Kind.Q4_K, weights), Kind.Q4_K)
        return float(np.square((back - values)[:, :8]).mean())

    assert error(importance) < 0.8 * error(None)


@pytest.mark.parametrize("tied", [False, True])
def test_importance_is_the_mean_square_of_what_each_weight_reads(tied):
    loaded = loaded_of(tie_word_embeddings=tied)
    seen = []
    layer = loaded.model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().flatten(0, 1)))
    found = measure_importance(loaded, load_documents(texts(40)), seed=0)
    handle.remove()
    inputs = torch.cat(seen)
    torch.testing.assert_close(
        torch.from_numpy(found["model.layers.1.mlp.down_proj.weight"]),
        inputs.square().mean(dim=0),
        rtol=1e-4,
        atol=1e-6,
    )
    assert ("model.embed_tokens.weight" in found) == tied
    names = {name for name, value in loaded.model.named_parameters() if value.ndim == 2}
    assert names - set(found) == (set() if tied else {"model.embed_tokens.weight"})


def test_importance_is_measured_within_the_positions_of_a_model_and_of_transposed_weights():
    loaded = LoadedModel(tiny_model("gpt2"), tiny_tokenizer(), "tiny", None, None)  # 128 learned positions
    found = measure_importance(loaded, load_documents(texts(40)), seed=0)
    assert found["transformer.h.0.mlp.c_proj.weight"].shape == (192,)
    assert found["transformer.h.0.attn.c_attn.weight"].shape == (48,)


def test_importance_changes_the_file_and_serves_k_quants_alone(tmp_path):
    loaded = calm()
    folder = save_pruned(loaded.model, tmp_path / "base", tokenizer=loaded.tokenizer)
    data = [{"text": text, "doc": str(index)} for index, text in enumerate(texts(20))]
    files = []
    for name, more in (("plain", {}), ("weighted", {"importance_data": data})):
        result = export_model(folder, tmp_path / name, format="gguf", dtype="Q4_K_M", **more)
        assert result.report.importance == (None if name == "plain" else load_documents(data).name)
        files.append((result.folder / gguf.FILE_NAME).read_bytes())
    assert len(files[0]) == len(files[1])
    assert files[0] != files[1]
    for other in ({"format": "gguf", "dtype": "q8_0"}, {"format": "onnx"}):
        with pytest.raises(ConfigError, match=r"importance_data serves .*gguf: q2_k.*--dtype"):
            export_model(folder, tmp_path / "other", importance_data=data, **other)


def test_importance_text_must_be_enough_and_not_the_test_text():
    loaded, text = loaded_of(), load_documents(texts(20))
    with pytest.raises(DataError, match=r"tokens of text say too little.*at least 1,024"):
        measure_importance(loaded, load_documents(texts(2)), seed=0)
    with pytest.raises(DataError, match=r"documents of .* are in the test text"):
        measure_importance(loaded, text, seed=0, test_text=text)
    other = load_documents(texts(20, seed=1))
    assert measure_importance(loaded, other, seed=0, test_text=text)


def test_the_modelfile_may_be_edited(tmp_path):
    loaded = calm()
    folder = save_pruned(loaded.model, tmp_path / "base", tokenizer=loaded.tokenizer)
    found = export_model(folder, tmp_path / "out", format="gguf", dtype="q6_k").folder
    with (found / "Modelfile").open("a") as file:
        file.write("SYSTEM be brief\n")
    read_export(found)
