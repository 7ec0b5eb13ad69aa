"""The real SmolLM2-135M-Instruct and real text, from the package index: what a user does, with little text."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_context_prune import EvalOptions, PrunerConfig, evaluate, load_model, prune
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.generation import generate_completion
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.saving import save_pruned

pytestmark = [pytest.mark.real, pytest.mark.slow]

SCRIPT = Path(__file__).parents[1] / "support" / "reload_without_package.py"


def test_prune_20_percent_and_repair(smollm2, licences, tmp_path):
    options = EvalOptions(max_tokens=1_000, benchmark=False, memory=False)
    config = PrunerConfig(
        pruning_ratio=0.2,
        round_to=8,
        allocation="uniform",
        num_calibration_samples=8,
        max_seq_length=128,
        reconstruction="least_squares",
        refit_lm_head=False,
    )
    result = prune(smollm2, licences.calibration, config, eval_data=licences.held_out, eval_options=options)
    size = result.report.size
    assert size.base_parameters == 134_515_008
    assert 0.2 <= size.achieved_ratio < 0.204
    assert result.report.loss.comparison.excess_nats_per_token.value > 0
    sliced = apply_plan(smollm2.model, result.plan)  # the same units, nothing reconstructed
    without, with_ = (
        evaluate(replace(smollm2, model=model), licences.held_out, max_seq_length=128, eval_options=options).loss.base
        for model in (sliced, result.model)
    )
    assert without.bits_per_byte.value > with_.bits_per_byte.value
    assert result.native_fit.fits
    folder = result.save_pretrained(tmp_path / "mini-gpt")
    assert (folder / "model.safetensors").stat().st_size < 0.81 * 538_090_408
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    prompt = "THE SOFTWARE IS PROVIDED"
    assert generate_completion(reloaded, result.tokenizer, prompt) == generate_completion(
        result.model, result.tokenizer, prompt
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variable_widths_reload_bit_equal_without_the_package(smollm2, dtype, tmp_path):
    model = load_model(smollm2.folder, dtype=dtype, device="cpu").model
    geometry = read_geometry(model.config, spec_of(model.config))
    generator = torch.Generator().manual_seed(0)

    def choose(total, count):
        return tuple(sorted(torch.randperm(total, generator=generator)[:count].tolist()))

    layers = tuple(LayerPlan(choose(1536, 900 + 17 * i), choose(3, 1 + i % 3)) for i in range(30))
    smaller = apply_plan(model, PruningPlan("llama", geometry.layers, layers, fingerprint(model)))
    folder = save_pruned(smaller, tmp_path / "variable")
    ids = torch.randint(100, 40_000, (2, 48), generator=generator)
    with torch.no_grad():
        torch.save(smaller(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, tmp_path / "variable.pt")
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "cases.json").write_text(f'{{"{folder}": [true, 0]}}')
    command = [sys.executable, SCRIPT, tmp_path]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
