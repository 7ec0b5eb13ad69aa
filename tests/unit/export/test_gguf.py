"""GGUF files of tiny models in llama.cpp itself: losses, tokens, greedy text, for every architecture written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing

import pytest
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_context_prune import prune_vocabulary
from hf_context_prune.errors import ConfigError, ExportError, LoadError
from hf_context_prune.export import gguf, llama_cpp, run
from hf_context_prune.export.llama_cpp import LlamaCppRuntime
from hf_context_prune.export.run import open_export
from hf_context_prune.export.runtime import TorchRuntime
from hf_context_prune.export.verify import TOKENIZER_PROBES
from hf_context_prune.pipelines.export import export_model
from hf_context_prune.pruning.depth import Depth
from hf_context_prune.storage.loading import LoadedModel, load_model
from tests.support.export_folders import save
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.support.tiny_domain import documents, model_for
from tests.support.tiny_tokenizers import tokenizer_of

IDS = (1, 40, 41, 90, 91, 200, 201, 7, 64, 65)


def loaded_of(folder):
    return load_model(folder, dtype="float32", device="cpu")


def opened(loaded, folder, weights="f16"):
    folder.mkdir(exist_ok=True)
    gguf.check(loaded, weights)
    gguf.write(loaded, folder, weights)
    return closing(gguf.load(folder))


def assert_same(loaded, folder, *, near=0.05):
    with opened(loaded, folder) as runtime:
        expected = TorchRuntime(loaded.model).losses(IDS)
        assert runtime.losses(IDS, expected) == pytest.approx(expected, abs=near)


def test_a_head_of_its_own_is_written_whatever_the_config_says(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    assert_same(LoadedModel(model, tiny_tokenizer(), "model", None, None), tmp_path)


def test_fewer_layers_are_the_same_in_llama_cpp(tmp_path):
    shorter = Depth(4, (1,)).shorten(tiny_model("llama", num_hidden_layers=4))
    assert_same(LoadedModel(shorter, tiny_tokenizer(), "model", None, None), tmp_path)


def test_layers_that_no_longer_follow_the_order_of_llama_cpp_are_refused():
    whole = tiny_model("smollm3", num_hidden_layers=8, no_rope_layers=[1, 1, 1, 0] * 2)
    for gone, fits in (((4, 5, 6, 7), True), ((1,), False)):
        loaded = LoadedModel(Depth(8, gone).shorten(whole), tiny_tokenizer(), "model", None, None)
        if fits:
            gguf.check(loaded, "f16")
        else:
            with pytest.raises(ExportError, match="no_rope_layers"):
                gguf.check(loaded, "f16")


@pytest.fixture(scope="module")
def variable(tmp_path_factory):
    return save(tmp_path_factory.mktemp("gguf") / "variable", variable=True)


def test_widths_and_heads_that_vary(variable, tmp_path):
    result = export_model(variable, tmp_path / "out", format="gguf", dtype="f16")
    found = result.report.verification
    assert abs(found.perplexity_change) < 0.01
    assert found.largest_gap < 0.05
    fields = GGUFReader(result.folder / "model.gguf").fields
    assert fields["general.architecture"].contents() == "deci"
    assert fields["deci.feed_forward_length"].contents() == [64, 64, 64]  # 32, 32 and 3, filled up with zeros
    assert fields["deci.attention.head_count"].contents() == [4, 2, 6]
    assert fields["deci.attention.head_count_kv"].contents() == [2, 1, 3]
    runtime = open_export(result.folder)
    with closing(runtime):
        assert runtime.losses(IDS) == pytest.approx(TorchRuntime(loaded_of(variable).model).losses(IDS), abs=0.05)


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
ROPES = (
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    {**LLAMA3, "rope_theta": 10_000.0, "original_max_position_embeddings": 32},
)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": ROPES[0]}),
        ("llama", {"rope_parameters": ROPES[1]}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("granite", {}),
    ],
)
def test_uniform_widths(family, overrides, tmp_path):
    model = tiny_model(family, intermediate_size=29, **overrides)
    assert_same(LoadedModel(model, tiny_tokenizer(), "tiny", None, None), tmp_path / "out")


@pytest.mark.nightly
@pytest.mark.parametrize("rope", [*ROPES, {**ROPES[0], "rope_type": "yarn", "original_max_position_embeddings": 32}])
def test_variable_widths_with_every_rope(rope, tmp_path):
    folder = save(tmp_path / "model", variable=True, rope_parameters=rope)
    assert_same(loaded_of(folder), tmp_path / "out")


def test_without_room_tensors_go_through_a_file_and_no_bit_differs(variable, tmp_path, monkeypatch):
    expected = export_model(variable, tmp_path / "whole", format="gguf").folder / gguf.FILE_NAME
    loads = []

    def recorded(*args, dtype, **how):
        loads.append(dtype)
        return load_model(*args, dtype=dtype, **how)

    monkeypatch.setattr(run, "load_model", recorded)
    for module in (gguf, run):
        monkeypatch.setattr(module, "fits_in_memory", lambda size: False)
    found = export_model(variable, tmp_path / "spooled", format="gguf").folder / gguf.FILE_NAME
    assert found.read_bytes() == expected.read_bytes()
    assert loads == ["auto", "auto"]


@pytest.mark.parametrize("weights", ["bf16", "q8_0"])
def test_other_weights(variable, tmp_path, weights):
    loaded = loaded_of(variable)
    with opened(loaded, tmp_path / weights, weights) as runtime:
        assert runtime.losses(IDS) == pytest.approx(TorchRuntime(loaded.model).losses(IDS), abs=0.5)
    found = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / weights / "model.gguf").tensors}
    assert found["blk.0.attn_norm.weight"] == "F32"
    if weights == "q8_0":
        assert found["blk.0.ffn_down.weight"] == "Q8_0"  # rows of 32
        assert found["blk.0.ffn_up.weight"] == "F16"  # of 48
    else:
        assert found["blk.0.ffn_up.weight"] == "BF16"


def test_a_generation_is_timed_by_llama_cpp_itself(variable, tmp_path):
    with opened(loaded_of(variable), tmp_path / "out"):
        pass
    file = tmp_path / "out/model.gguf"
    with closing(LlamaCppRuntime(file, threads=1, positions=40, sequences=2)) as runtime:
        start = time.perf_counter()
        prefill, decode = runtime.time_generation([IDS, IDS[::-1]], 20)
        whole = time.perf_counter() - start
    assert 0 < prefill < prefill + decode < whole


def smollm2_digits():
    tokenizer = tokenizer_of("gpt2").backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("kind", ["gpt2", "smollm2", "llama3", "qwen", "llama2", "llama2-metaspace", "gemma"])
def test_tokens_are_those_of_the_tokenizer(kind, pruned, tmp_path):
    tokenizer = smollm2_digits() if kind == "smollm2" else tokenizer_of(kind)
    model = model_for("llama", tokenizer, spare_rows=3)
    if pruned:
        text, least = documents(count=200, length=400), {"vocab_min_count": 1, "pad_to_multiple_of": 8}
        smaller = prune_vocabulary(model, tokenizer, text, criterion="frequency", refit=False, **least)
        model, tokenizer = smaller.model, smaller.tokenizer
    texts = (*TOKENIZER_PROBES, *(record.text for record in documents(count=3).documents))
    with opened(LoadedModel(model, tokenizer, "tiny", None, None), tmp_path / "out") as runtime:
        for text in texts:
            assert runtime.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_the_chat_template_and_special_tokens_travel(tmp_path):
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with opened(LoadedModel(model_for("llama", tokenizer), tokenizer, "tiny", None, None), tmp_path / "out"):
        fields = GGUFReader(tmp_path / "out/model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.bos_token_id
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_a_file_of_variable_widths_is_not_read_back_nor_replaced_by_its_own_export(variable, tmp_path):
    folder = export_model(variable, tmp_path / "out", format="gguf").folder
    before = (folder / gguf.FILE_NAME).read_bytes()
    with pytest.raises(LoadError, match=r"layers differ in width .*only llama\.cpp"):
        export_model(folder / gguf.FILE_NAME, tmp_path / "again", format="gguf")
    with pytest.raises(ConfigError, match=r"lies in --output .*which would replace it"):
        export_model(folder / gguf.FILE_NAME, folder, format="gguf", dtype="q4_k_m")
    assert (folder / gguf.FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("seed", [-1, 10**20])
def test_a_seed_that_torch_cannot_take_is_refused(seed, variable, tmp_path):
    with pytest.raises(ConfigError, match=f"seed is {seed}; .*below 2"):
        export_model(variable, tmp_path / "out", format="gguf", seed=seed)


def test_the_licence_of_the_card_travels(variable, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(variable, model)
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: of-our-own\nlicense_link: LICENSE\nlanguage:\n- en\n- de\n---\n# Card\n"
    )
    export_model(model, tmp_path / "out", format="gguf")
    fields = GGUFReader(tmp_path / "out/model.gguf").fields
    names = ("license", "license.name", "license.link", "languages")
    found = [fields[f"general.{name}"].contents() for name in names]
    assert found == ["other", "of-our-own", "LICENSE", ["en", "de"]]


def test_llama_cpp_that_never_answers_is_ended(variable, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(llama_cpp, "_WORKER", worker)
    monkeypatch.setattr(llama_cpp, "_TIMEOUT", 1)
    with pytest.raises(ExportError, match="did not answer within 1 s"):
        LlamaCppRuntime(tmp_path / "any.gguf", threads=1)


@pytest.mark.parametrize("killed", ["while it loads", "afterwards"])
def test_the_worker_ends_with_a_process_that_was_killed(tmp_path, killed):
    # As llama.cpp does now and then: its server waits for threads that don't end.
    (tmp_path / "xllamacpp.py").write_text(
        "import time\n\nclass Any: pass\n\nclass CommonParams: model = cpuparams = cpuparams_batch = Any()\n\n"
        "class llama_flash_attn_type: LLAMA_FLASH_ATTN_TYPE_DISABLED = 0\n\n"
        "class Server:\n    listening_address = ''\n    def __init__(self, params): pass\n"
        "    def __del__(self): time.sleep(600)\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-P", llama_cpp._WORKER, "any.gguf", "8", "1", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    if killed == "afterwards":
        assert any(line.startswith(b'{"address"') for line in worker.stdout)
    worker.stdout.close()
    worker.stdin.close()
    try:
        worker.wait(30)
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("opt", {}, "this is a opt model.*Export to another format"),
        ("qwen2", {"variable": True}, "uniform widths.*--native-architecture"),
        ("llama", {"variable": True, "attention_bias": True}, "no biases, but .*q_proj.*--native-architecture"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"tokenizer": "unigram"}, "of type Unigram"),
        ("llama", {"tokenizer": "metaspace"}, "does not know"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(family, options, words, tmp_path):
    if options.get("tokenizer") == "metaspace":
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer = tokenizer_of(options["tokenizer"]) if "tokenizer" in options else None
    folder = save(tmp_path / "model", family=family, **{**options, "tokenizer": tokenizer})
    with pytest.raises(ExportError, match=words):
        export_model(folder, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_than_the_folders_is_not_left(variable, tmp_path, monkeypatch):
    encode = LlamaCppRuntime.encode
    monkeypatch.setattr(LlamaCppRuntime, "encode", lambda runtime, text: encode(runtime, text.replace("5", "6")))
    with pytest.raises(ExportError, match="other tokens"):
        export_model(variable, tmp_path / "out", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_llama_cpp_cannot_open_ends_in_an_error(variable, tmp_path):
    with opened(loaded_of(variable), tmp_path / "out"):
        pass
    file = tmp_path / "out/model.gguf"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"llama\.cpp can't open model\.gguf"):
        LlamaCppRuntime(file, threads=1)


def test_losses_are_read_precisely_whatever_is_expected(variable, tmp_path):
    loaded = loaded_of(variable)
    with opened(loaded, tmp_path / "out") as runtime:
        expected = TorchRuntime(loaded.model).losses(IDS)
        exact = runtime.losses(IDS, expected)
        for about in (0.01, 3.0, 30.0):
            assert runtime.losses(IDS, [about] * len(expected)) == pytest.approx(exact, abs=0.01)
        assert json.dumps(runtime.generate(IDS, 4))
