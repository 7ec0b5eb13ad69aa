"""The real SmolLM2-135M, its widths and KV heads varied: in llama.cpp it says the same."""

from __future__ import annotations

import pytest

from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.pipelines.export import export_model
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.saving import save_pruned

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def variable(smollm2, tmp_path_factory):
    """A few neurons of every layer gone, and a KV group of one: it still writes English."""
    geometry = read_geometry(smollm2.model.config, spec_of(smollm2.model.config))
    layers = [LayerPlan(tuple(range(16 + 3 * (i % 5), 1536)), (0, 1, 2)) for i in range(30)]
    layers[28] = LayerPlan(layers[28].neurons, (0, 2))
    plan = PruningPlan("llama", geometry.layers, tuple(layers), fingerprint(smollm2.model))
    folder = tmp_path_factory.mktemp("real") / "variable"
    return save_pruned(apply_plan(smollm2.model, plan), folder, tokenizer=smollm2.tokenizer, plan=plan)


def test_llama_cpp_says_the_same(variable, tmp_path):
    found = export_model(variable, tmp_path / "out", format="gguf", dtype="f16").report.verification
    assert (found.prompts, found.new_tokens) == (5, 32)
    assert found.largest_gap < 0.005  # no other token, but for ties
    assert found.equal_texts >= 3  # of 5; a tie takes the rest of a text with it
    assert abs(found.perplexity_change) < 0.01
    assert found.bytes_after < 0.51 * found.bytes_before
