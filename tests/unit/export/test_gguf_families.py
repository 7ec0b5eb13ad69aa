"""Every family that GGUF is written for, pruned to uniform widths, in llama.cpp itself; and what it can't compute.

The files of these tests have float32 weights, so that what is left of a difference is llama.cpp's own rounding (a cache
of 16 bits, tables of activations). A wrong convention costs more than a tenth of a nat.
"""

from __future__ import annotations

import math
from contextlib import closing

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from gguf.quants import dequantize

from hf_context_prune.errors import ExportError, PruningWarning
from hf_context_prune.export import gguf
from hf_context_prune.export.gguf_families import FAMILIES
from hf_context_prune.export.runtime import TorchRuntime
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.modeling.runtimes import GGUF_FAMILIES, NO_GGUF, runtimes_of, why_not_gguf_order
from hf_context_prune.modeling.specs import BUILT_IN
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.loading import LoadedModel
from tests.support.experts import neuron_plan
from tests.support.layers import depth_plan
from tests.support.marks import nightly_beside
from tests.support.tiny import tiny_model, tiny_tokenizer

IDS = (1, 40, 41, 90, 91, 200, 201, 7, 64, 65, 33, 34, 120, 121, 150, 9, 10, 77)
COVERING = (
    *("qwen2", "qwen3_5_text", "granitemoehybrid", "gemma3_text", "phi3"),
    *("cohere2", "apertus", "gpt_neox", "lfm2", "gpt_oss", "ernie4_5_moe"),
)
"""Together they have every convention of the table: heads filled up, layers without attention of three kinds, norms
with an offset, windows, stacked and interleaved projections, neighbours rotated or not, a head of its own, xIELU,
experts with biases and with shared ones."""


def sliding(layers, period):
    """Layers with a window of 6 tokens, which the text is longer than; every `period`-th sees all."""
    kinds = ["full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(layers)]
    return {"num_hidden_layers": layers, "layer_types": kinds, "sliding_window": 6}


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0, "rope_theta": 1e4}
LLAMA3["original_max_position_embeddings"] = 32
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
WHOLE = {"sliding_window": None, "layer_types": ["full_attention"] * 3}
OPTIONS = {  # what llama.cpp has fixed, beside tests/support/tiny.py
    "gemma2": sliding(3, 2),
    "gemma3_text": sliding(7, 6),
    "cohere2": sliding(5, 4),
    "olmo3": sliding(5, 4),
    "mistral": {"sliding_window": None},
    "exaone4": WHOLE,
    "smollm3": {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]},
    "apertus": {"rope_parameters": LLAMA3},
    "phi": {"qk_layernorm": False},
    "qwen3_5_text": {"linear_num_value_heads": 6, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "qwen3_5_moe_text": {"linear_num_value_heads": 6, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "qwen2_moe": {"mlp_only_layers": []},
    "gpt_oss": sliding(3, 2) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "olmoe": {"num_key_value_heads": 6},
}
WIDE = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Float32 weights under the name f16."""
    monkeypatch.setitem(gguf._TYPES, "f16", (GGMLQuantizationType.F32, LlamaFileType.ALL_F32))


def tiny(family, **options):
    return tiny_model(family, **{**OPTIONS.get(family, {}), **options})


def pruned(model, groups=(0, 2)):
    """29 of the neurons, two of three KV groups where they may go, five of eight experts, and half of their neurons."""
    geometry = read_geometry(model.config, spec_of(model.config))
    layers = [
        LayerPlan(
            tuple(range(2, 31)) if layer.neurons else (),
            groups if layer.kv_groups else (),
            (0, 2, 3, 4, 7) if layer.experts else (),
        )
        for layer in geometry.layers
    ]
    plan = PruningPlan(model.config.model_type, geometry.layers, tuple(layers), fingerprint(model))
    return apply_plan(model, neuron_plan(plan, model) if spec_of(model.config).experts else plan)


def written(model, folder):
    loaded = LoadedModel(model, tiny_tokenizer(), "tiny", None, None)
    gguf.check(loaded, "f16")
    gguf.write(loaded, folder, "f16")
    return closing(gguf.load(folder))


def assert_same(model, folder):
    with written(model, folder) as runtime:
        expected = TorchRuntime(model).losses(IDS)
        off = [abs(one - other) for one, other in zip(runtime.losses(IDS, expected), expected, strict=True)]
    # Where two experts are all but equally good for a token, rounding decides.
    allowed = len(off) // 4 if spec_of(model.config).experts else 0
    assert sum(one > 0.015 for one in off) <= allowed, off


@pytest.mark.parametrize("family", nightly_beside(COVERING, FAMILIES))
def test_a_pruned_model_is_the_same_in_llama_cpp(family, tmp_path):
    assert_same(pruned(tiny(family)), tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_and_one_of_its_own(family, tied, tmp_path):
    model = tiny(family, tie_word_embeddings=tied)
    if family in ("gemma", "gemma2", "cohere", "cohere2", "lfm2_moe") and not tied:
        with pytest.raises(ExportError, match=r"no tensor for lm_head\.weight"):
            written(model, tmp_path)
    else:
        assert_same(model, tmp_path)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
LONG |= {"short_factor": [1.0, 1.5, 3.0], "long_factor": [1.0, 2.5, 9.0]}
MINISTRAL = YARN | {"original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.3}}, id="yarn"),
        pytest.param("arcee", {"rope_parameters": LLAMA3}, id="llama3"),
        pytest.param("ministral3", {"rope_parameters": MINISTRAL | {"llama_4_scaling_beta": 0.5}}, id="temperatures"),
        pytest.param(
            "phi3",
            {
                "rope_parameters": LONG,
                "max_position_embeddings": 2048,
                "original_max_position_embeddings": 1024,
            },
            id="longrope",
        ),
        pytest.param(
            "hunyuan_v1_dense",
            {"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4}},
            id="alpha",
        ),
        pytest.param(
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                }
            },
            id="one for windows",
        ),
        pytest.param("granitemoehybrid", {"position_embedding_type": "rope"}, id="a hybrid with rotation"),
    ],
)
def test_scaled_rotations(family, options, tmp_path):
    assert_same(tiny(family, **options), tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("phi3", "ministral3")])
def test_every_scaling_of_the_table(family, tmp_path, subtests):
    before = getattr(tiny(family).config, "rope_parameters", None) or {}
    scalings = {"linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "yarn": YARN, "llama3": LLAMA3}
    for kind in set(FAMILIES[family].ropes) & set(scalings) if before else ():
        rope = scalings[kind] | {key: before[key] for key in ("partial_rotary_factor",) if key in before}
        if "full_attention" in before:
            rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        with subtests.test(kind=kind):
            folder = tmp_path / kind
            folder.mkdir()
            assert_same(tiny(family, rope_parameters=rope), folder)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("granite", {"attention_bias": True, "mlp_bias": True}),
        ("nemotron", {"attention_bias": True, "mlp_bias": True}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 6}),
        ("gpt_bigcode", {"multi_query": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("stablelm", {"use_parallel_residual": True}),
        ("olmo", {"clip_qkv": None}),
        ("granitemoehybrid", {"mamba_n_groups": 2}),
        ("gemma3_text", {"final_logit_softcapping": 20.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_variants(family, options, tmp_path):
    assert_same(tiny(family, **options), tmp_path)


def test_removed_heads_are_zeros_where_llama_cpp_wants_all(tmp_path):
    model = pruned(tiny("qwen2"))
    with written(model, tmp_path):
        pass
    file = GGUFReader(tmp_path / gguf.FILE_NAME)
    assert model.config.num_key_value_heads == 2
    assert file.fields["qwen2.attention.head_count_kv"].contents() == 3
    shapes = {tensor.name: tensor.data.shape for tensor in file.tensors}
    assert shapes["blk.0.attn_q.weight"] == shapes["blk.0.attn_output.weight"] == (48, 48)
    keys = next(tensor.data for tensor in file.tensors if tensor.name == "blk.0.attn_k.weight")
    assert keys[:16].any(axis=1).all()
    assert not keys[16:].any()


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("gemma3_text", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar=8, but this model has 16"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "slides a window.*every second"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "rotates all layers.*every fourth"),
        ("exaone4", sliding(5, 4), "sliding_window=None"),
        ("qwen3_5_text", {"layer_types": ["full_attention", "full_attention", "linear_attention"]}, "every n-th layer"),
        ("qwen3", {"attention_bias": True}, "attention_bias=False"),
        ("phi", {"qk_layernorm": True}, "no tensor for model.layers.0.self_attn.q_layernorm.weight"),
        ("qwen3", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "YaRN with .* but this model has {'beta_fast': 16"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope type 'llama3' of a qwen2.*allowed are default, linear, yarn"),
        ("gpt2", {"activation_function": "relu"}, "gelu_pytorch_tanh, but activation_function is 'relu'"),
        ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 1}, "which 4 heads of 8"),
        ("opt", {}, "this is a opt model"),
        ("olmoe", {"num_key_value_heads": 3}, "num_key_value_heads=6, but this model has 3"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "has experts in layers 0, 1, 2, but this model has them in 0, 2"),
        ("glm4_moe", {"n_group": 2}, "n_group=1, but this model has 2"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob=False"),
    ],
)
def test_what_llama_cpp_computes_in_another_way_is_refused_at_once(family, options, words):
    loaded = LoadedModel(tiny(family, **options), tiny_tokenizer(), "tiny", None, None)
    with pytest.raises(ExportError, match=words):
        gguf.check(loaded, "f16")


@pytest.mark.parametrize("family", ["gemma3_text", "smollm3", "qwen3_5_text"])
def test_a_folder_that_lacks_layers_is_offered_as_gguf_where_their_order_is_llama_cpps(family):
    def opens(model):
        return {runtime.name: runtime.opens for runtime in runtimes_of(model.config.to_dict(), "x")}[
            "llama.cpp, Ollama"
        ]

    def without(model, *gone):
        return apply_plan(model, depth_plan(model, *gone))

    period = {"gemma3_text": 6, "smollm3": 4, "qwen3_5_text": 2}[family]
    kinds = ["linear_attention" if family == "qwen3_5_text" else "sliding_attention"] * (period - 1) + [
        "full_attention"
    ]
    order = {"no_rope_layers": [1, 1, 1, 0] * 2} if family == "smollm3" else {"layer_types": kinds * 2}
    model = tiny(family, num_hidden_layers=2 * period, **order)
    assert opens(model)
    assert opens(without(model, *range(period)))  # a whole period
    other = without(model, 0)
    assert not opens(other)
    with pytest.raises(ExportError, match="Export to another format"):
        gguf.check(LoadedModel(other, tiny_tokenizer(), "tiny", None, None), "f16")


@pytest.mark.parametrize("value", [5, "full_attention", {"0": 1}, None])
def test_a_config_of_others_may_hold_anything_in_place_of_a_list(value):
    config = {"model_type": "gemma3_text", "layer_types": value, "no_rope_layers": value, "sliding_window": 4}
    for family in ("gemma3_text", "smollm3"):
        assert why_not_gguf_order(config, family) is None
    assert "every n-th layer" in why_not_gguf_order(config, "qwen3_5_text")


def test_layers_with_other_numbers_of_experts_are_refused(tmp_path):
    model = tiny("mixtral")
    widths = read_geometry(model.config, spec_of(model.config)).layers
    kept = [(0, 1, 2), (0, 1, 2, 3), (4, 5, 6)]
    layers = tuple(LayerPlan((), (0, 1, 2), experts) for experts in kept)
    varied = apply_plan(model, PruningPlan("mixtral", widths, layers, fingerprint(model)))
    with pytest.raises(ExportError, match="no mixtral architecture with widths that vary"):
        written(varied, tmp_path)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_k_m"])
def test_experts_are_quantised(dtype, tmp_path):
    model = tiny("qwen2_moe", hidden_size=256, num_attention_heads=8, num_key_value_heads=4, head_dim=32, **WIDE)
    gguf.write(LoadedModel(model, tiny_tokenizer(), "tiny", None, None), tmp_path, dtype)
    with closing(gguf.load(tmp_path)) as runtime:
        assert all(map(math.isfinite, runtime.losses(IDS)))
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / gguf.FILE_NAME).tensors}
    assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    found = tensors["blk.1.ffn_up_exps.weight"]
    assert found.tensor_type.name == {"q8_0": "Q8_0", "q4_k_m": "Q4_K"}[dtype]
    expected = model.model.layers[1].mlp.experts.gate_up_proj[:, 256:].detach()
    values = torch.from_numpy(dequantize(found.data, found.tensor_type).copy())
    assert values.shape == expected.shape
    assert float((values - expected).norm() / expected.norm()) < {"q8_0": 0.01, "q4_k_m": 0.1}[dtype]


def test_a_range_of_yarn_that_is_not_rounded_is_told(tmp_path):
    model = tiny("gpt_oss", rope_parameters=YARN | {"truncate": False})
    with pytest.warns(PruningWarning, match="does not round the ends of YaRN's range"):
        gguf.check(LoadedModel(model, tiny_tokenizer(), "tiny", None, None), "f16")


def test_both_tables_name_the_same_families():
    assert set(FAMILIES) == set(GGUF_FAMILIES)
    assert set(NO_GGUF) < set(BUILT_IN)
