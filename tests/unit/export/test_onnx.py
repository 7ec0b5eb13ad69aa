"""ONNX graphs of tiny models in ONNX Runtime: prefill and decoding, batches with padding, variable widths and heads."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from hf_context_prune import load_pruned
from hf_context_prune.errors import ExportError
from hf_context_prune.export import onnx as onnx_export
from hf_context_prune.export.onnx import OnnxRuntime
from hf_context_prune.export.run import open_export
from hf_context_prune.export.runtime import TorchRuntime
from hf_context_prune.pipelines.architecture.contract import random_plan
from hf_context_prune.pipelines.export import export_model
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.loading import LoadedModel
from tests.support.export_folders import save
from tests.support.marks import nightly_beside
from tests.support.tiny import FAMILIES, tiny_model, tiny_tokenizer

PROMPTS = ([1, 40, 41, 90, 91, 200], [7, 8], [30, 31, 32])


@pytest.fixture(scope="module")
def variable(tmp_path_factory):
    """(folder, its export)"""
    root = tmp_path_factory.mktemp("onnx")
    folder = save(root / "variable", variable=True, fewer_tokens=True, num_hidden_layers=2)
    return folder, export_model(folder, root / "out", format="onnx")


def test_it_says_what_the_folder_says(variable):
    found = variable[1].report.verification
    assert found.largest_difference < 1e-4
    assert found.equal_texts == found.prompts == 5
    assert found.largest_gap == 0


def test_one_graph_reads_a_prompt_and_decodes_in_any_steps(variable):
    folder, result = variable
    runtime, model = open_export(result.folder), load_pruned(folder)
    ids = torch.randint(3, 250, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits.numpy()
    mask = np.ones((3, 11), dtype=np.int64)
    for cuts in ((11,), (1, 11), (4, 5, 6, 11), tuple(range(1, 12))):
        cache, begin, parts = None, 0, []
        for end in cuts:
            logits, cache = runtime.step(ids.numpy()[:, begin:end], mask[:, :end], cache)
            parts.append(logits)
            begin = end
        np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-4)
    heads = [cache[f"input.cache.layers.{layer}.keys"].shape for layer in range(2)]
    assert heads == [(3, 2, 11, 8), (3, 1, 11, 8)]


def test_query_heads_share_the_cache_without_copies(variable):
    nodes = onnx.load(variable[1].folder / "model.onnx", load_external_data=False).graph.node
    caches = {f"output.cache.layers.{layer}.{part}" for layer in range(2) for part in ("keys", "values")}
    readers = {node.op_type for node in nodes if caches & set(node.input)}
    assert readers == {"FusedMatMul", "MatMul"}
    assert not any(node.op_type == "ReduceMean" for node in nodes)  # norms are one operator each


def test_a_generation_is_timed_step_by_step(variable):
    prefill, decode = open_export(variable[1].folder).time_generation([PROMPTS[0], PROMPTS[0]], 5)
    assert prefill > 0 < decode


def test_padded_batches_are_as_single_prompts(variable):
    folder, result = variable
    runtime, model = open_export(result.folder), TorchRuntime(load_pruned(folder))
    alone = [model.generate(prompt, 12) for prompt in PROMPTS]
    assert runtime.generate_batch(PROMPTS, 12) == alone
    assert [runtime.generate(prompt, 12) for prompt in PROMPTS] == alone


def test_a_text_ends_at_its_end(variable):
    _, result = variable
    plain = OnnxRuntime(result.folder).generate(PROMPTS[0], 6)
    assert len(plain) == 6
    ended = OnnxRuntime(result.folder, ends=[plain[3]]).generate_batch([PROMPTS[0], PROMPTS[1]], 6)
    assert ended[0] == plain[: plain.index(plain[3])]


def test_it_runs_without_torch_and_transformers(variable):
    _, result = variable
    code = f"""
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession({str(result.folder / "model.onnx")!r})
feed = {{i.name: numpy.zeros((1, i.shape[1], 0, i.shape[3]), "float32") for i in session.get_inputs()[3:]}}
ids = numpy.array([{PROMPTS[0]}])
feed |= {{"input_ids": ids, "attention_mask": numpy.ones_like(ids), "position_ids": numpy.arange(ids.shape[1])[None]}}
print(int(session.run(["logits"], feed)[0][0, -1].argmax()))
import sys
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) == open_export(result.folder).generate(PROMPTS[0], 1)[0]


@pytest.mark.slow
def test_int8_is_smaller_and_near(variable, tmp_path):
    folder, result = variable
    small = export_model(folder, tmp_path / "out", format="onnx", dtype="int8", tolerance=0.5)
    assert small.report.verification.bytes_after < result.report.verification.bytes_after
    graph = json.loads((small.folder / "export_report.json").read_text())
    assert graph["weights"] == "int8"
    losses = open_export(result.folder).losses(PROMPTS[0])
    assert open_export(small.folder).losses(PROMPTS[0]) == pytest.approx(losses, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [320, 6000], ids=["transposed when it was made", "transposed by the product"])
def test_int8_holds_a_tied_table_once(tmp_path, rows):
    folder = save(
        tmp_path / "model", hidden_size=96, vocab_size=rows, tie_word_embeddings=True, num_hidden_layers=1, head_dim=8
    )
    result = export_model(folder, tmp_path / "out", format="onnx", dtype="int8", tolerance=0.5)
    graph = onnx.load(result.folder / "model.onnx", load_external_data=False).graph
    last = next(node for node in graph.node if "logits" in node.output)
    assert last.op_type == "MatMulNBits"
    assert sum(node.op_type == "GatherBlockQuantized" for node in graph.node) == 1
    assert not any(
        tensor.data_type == onnx.TensorProto.FLOAT and rows in tensor.dims[:1] and tensor.dims[-1] == 96
        for tensor in graph.initializer
    )
    assert open_export(result.folder).losses(PROMPTS[0]) == pytest.approx(
        TorchRuntime(load_pruned(folder)).losses(PROMPTS[0]), abs=0.3
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_int8_holds_projections_with_biases_too(tmp_path, family):
    folder = save(tmp_path / "model", family=family, num_hidden_layers=1)
    result = export_model(folder, tmp_path / "out", format="onnx", dtype="int8", tolerance=0.5)
    nodes = onnx.load(result.folder / "model.onnx", load_external_data=False).graph.node
    # with the head; query, key and value of OPT are one product
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == 5


WHOLE = {"layer_types": ["full_attention"] * 3}
OPTIONS = dict.fromkeys(
    ("ministral", "gemma2", "gemma3_text", "vaultgemma", "olmo3", "cwm", "exaone4", "granite_swa", "cohere2"), WHOLE
)
OPTIONS["mistral"] = {"sliding_window": None}
REFUSED = {
    **dict.fromkeys(("granitemoehybrid", "qwen3_5_text", "lfm2"), "without attention .*gguf, quanto or torchao"),
    "olmo_hybrid": "without attention .*Export to quanto or torchao",
    "gemma4_text": "read the keys and values of earlier ones.* Export to quanto",
    "mixtral": "routed to, and no others. Export to gguf.$",
    "helium": "NaN.* Export to quanto or torchao",
}


@pytest.mark.parametrize("family", nightly_beside(("granite_swa",), [name for name in FAMILIES if name not in REFUSED]))
def test_every_family_with_attention_alone(family, tmp_path):
    """With widths that differ by layer, and prompts that are padded on the left."""
    model = tiny_model(family, **OPTIONS.get(family, {}))
    model = apply_plan(model, random_plan(model))
    loaded = LoadedModel(model, tiny_tokenizer(), "tiny", None, None)
    onnx_export.check(loaded, "float32")
    onnx_export.write(loaded, tmp_path, "float32")
    runtime, width = OnnxRuntime(tmp_path), max(map(len, PROMPTS))
    assert runtime.losses(PROMPTS[0]) == pytest.approx(TorchRuntime(model).losses(PROMPTS[0]), abs=1e-4)
    ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    got, _ = runtime.step(ids, mask)
    for prompt, logits in zip(PROMPTS, got, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        np.testing.assert_allclose(logits[-1], alone.numpy(), atol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_families_whose_graph_is_not_the_model_are_refused_before_any_work(family):
    loaded = LoadedModel(tiny_model(family), tiny_tokenizer(), "tiny", None, None)
    with pytest.raises(ExportError, match=f"{family} model, which can't be exported to ONNX: .*{REFUSED[family]}"):
        onnx_export.check(loaded, "float32")


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_sliding_windows_are_refused(family, tmp_path):
    folder = save(tmp_path / "model", family=family)
    with pytest.raises(ExportError, match=r"sliding window of 16 tokens.*Export to gguf"):
        export_model(folder, tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()
