"""Dequantised GGUF files in the cache: an error speaks of the cache, not of the output of a command."""

import errno
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from hf_context_prune.errors import LoadError, SaveError
from hf_context_prune.export import gguf as export_gguf
from hf_context_prune.storage import gguf
from hf_context_prune.storage.cache import CACHE_VARIABLE
from hf_context_prune.storage.loading import LoadedModel, load_meta_model, load_model
from hf_context_prune.storage.staging import staged_folder
from tests.support.limits import within
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


def test_a_full_disk(file, monkeypatch):
    monkeypatch.setattr(gguf, "gguf_dtype", lambda _: torch.float32)

    def fails(_, folder, dtype):
        with staged_folder(folder, required_bytes=0):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf, "dequantise", fails)
    with pytest.raises(
        LoadError, match=rf"model\.gguf can't be kept .* No space left .* Set {CACHE_VARIABLE}"
    ) as caught:
        gguf.ensure_dequantised(file)
    assert "--output" not in str(caught.value)
    assert not [path for path in (file.parent / "cache" / "gguf").iterdir() if path.suffix != ".lock"]


def test_without_room_nothing_is_converted(tmp_path, monkeypatch, subtests):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    model = tiny_model("llama")
    export_gguf.write(LoadedModel(model, tiny_tokenizer(), "tiny", None, None), tmp_path, "f16")
    (path,) = tmp_path.glob("*.gguf")
    assert gguf.conversion_bytes(path, torch.float16) >= 2 * model.num_parameters()
    monkeypatch.setattr(gguf.AutoModelForCausalLM, "from_pretrained", None)
    with monkeypatch.context() as patch, subtests.test("disk"):
        patch.setattr(gguf.shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
        with pytest.raises(LoadError, match=rf"has 999 bytes free\. Make room there, or set {CACHE_VARIABLE}"):
            load_model(path)
    with monkeypatch.context() as patch, subtests.test("memory"):
        patch.setattr(gguf, "free_memory", lambda: 0)
        with pytest.raises(LoadError, match=r"Converting .* takes at least .* GiB of memory"):
            load_model(path)
    monkeypatch.undo()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    load_model(path)
    assert gguf.conversion_bytes(path, torch.float16) == 0


def test_other_errors_pass(file, monkeypatch):
    monkeypatch.setattr(gguf, "gguf_dtype", lambda _: torch.float32)
    for error in (LoadError("not a model"), SaveError("another run")):

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(gguf, "dequantise", fails)
        with pytest.raises(type(error), match=str(error)):
            gguf.ensure_dequantised(file)


def test_metadata_that_claim_more_than_the_tensors_hold_are_refused_at_once(file, subtests):
    rows, blocks = 100, range(2)
    for kind, claims, said in (
        ("no tensors", {"vocab_size": 16_000_000}, "block_count 2, but its tensors are of 0"),
        ("rows", {"vocab_size": 16_000_000}, "a vocabulary of 16000000, but its tensors are of 100"),
        ("layers", {"block_count": 10**9}, "block_count 1000000000, but its tensors are of 2"),
        ("width", {"feed_forward_length": 10**7}, "parameters, but its tensors hold"),
        ("hidden", {"embedding_length": 10**6}, "parameters, but its tensors hold"),
        ("cut", {}, "the file was cut"),
        ("array", {"token_count": 0}, "can't be read as a GGUF model"),
    ):
        sizes = {"vocab_size": rows, "block_count": 2, "embedding_length": 64, "feed_forward_length": 64} | claims
        writer = GGUFWriter(file, "llama")
        for name, value in (sizes | {"attention.head_count": 4, "attention.head_count_kv": 4}).items():
            writer.add_uint32(f"llama.{name}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_array("llama.a_list", [7, 8, 9])
        if kind != "no tensors":
            writer.add_tensor("token_embd.weight", np.zeros((rows, 64), dtype=np.float32))
            for block in blocks:
                writer.add_tensor(f"blk.{block}.attn_q.weight", np.zeros((64, 64), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = file.read_bytes()
        if kind == "cut":
            file.write_bytes(content[:-64])
        if kind == "array":  # as long as no file is
            start = content.index(b"llama.a_list") + len(b"llama.a_list") + 8
            file.write_bytes(content[:start] + (10**9).to_bytes(8, "little") + content[start + 8 :])
        for load in (load_model, load_meta_model):
            with subtests.test(kind=kind, load=load.__name__), within(), pytest.raises(LoadError, match=said):
                load(file)


def test_types_that_transformers_does_not_read_are_read_by_the_package_gguf(tmp_path, monkeypatch):
    """Q5_0, which Q4_K_M files take for rows that don't divide into blocks of 256."""
    loaded = LoadedModel(
        tiny_model("llama", hidden_size=96, head_dim=16, intermediate_size=64), tiny_tokenizer(), "model", None, None
    )
    real = export_gguf._type_of

    def q5_for_q8(values, kind):
        found = real(values, kind)
        return GGMLQuantizationType.Q5_0 if found is GGMLQuantizationType.Q8_0 else found

    (tmp_path / "q5").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(export_gguf, "_type_of", q5_for_q8)
        export_gguf.write(loaded, tmp_path / "q5", "q8_0")
    file = tmp_path / "q5" / export_gguf.FILE_NAME
    assert "Q5_0" in {tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    found = load_model(file, dtype="float32").model
    assert found.dtype == torch.float32
    assert found.config.vocab_size == loaded.model.config.vocab_size
    for name, expected in loaded.model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], expected, atol=0.05, rtol=0.05)
    assert load_meta_model(file).num_parameters() == found.num_parameters()


def test_the_copy_has_the_precision_of_the_file(tmp_path, monkeypatch, subtests):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    loaded = LoadedModel(tiny_model("llama"), tiny_tokenizer(), "model", None, None)
    for kind, own in (("f16", torch.float16), ("q8_0", torch.bfloat16)):
        (tmp_path / kind).mkdir()
        export_gguf.write(loaded, tmp_path / kind, kind)
        file = tmp_path / kind / export_gguf.FILE_NAME
        for asked, dtype in (("auto", own), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            with subtests.test(kind=kind, asked=asked):
                found, empty = load_model(file, dtype=asked), load_meta_model(file, dtype=asked)
                assert found.model.dtype == dtype == empty.dtype
                (note,) = gguf.explain_gguf_sizes(found)
                assert note.endswith(f"of its copy in {str(dtype).removeprefix('torch.')}.")
    assert len([path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]) == 5
