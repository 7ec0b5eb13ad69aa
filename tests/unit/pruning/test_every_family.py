"""The default walk on every family: it reaches the budget, and repairs more than slicing by the same plan does."""

from __future__ import annotations

import pytest
import torch

from hf_context_prune import PrunerConfig, load_documents
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.surgery import apply_plan
from tests.support.tiny import CASES, COVERING, case, texts, tiny_tokenizer

ALWAYS = (*COVERING, "falcon")
WALKED = [name for name in CASES if name != "opt-post-norm"]  # normalises its residual stream: the walk refuses it


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.nightly) for name in WALKED]
)
def test_the_walk_repairs_what_slicing_loses(name):
    model, tokenizer = case(name), tiny_tokenizer()
    config = PrunerConfig(
        pruning_ratio=0.1,
        units="neurons,kv_groups",
        refit_lm_head=False,  # on random weights it changes everything
        num_calibration_samples=96,
        max_seq_length=32,
    )
    smaller, _, plan = prune_model(model, tokenizer, CalibrationSet(load_documents(texts(120)), config), config)
    assert smaller.num_parameters() <= 0.9 * model.num_parameters()
    assert all(kept.kv_groups == () for kept, dense in zip(plan.layers, plan.dense, strict=True) if not dense.kv_groups)
    ids = tokenizer(texts(8, seed=1), return_tensors="pt", padding=True, truncation=True, max_length=32).input_ids
    with torch.no_grad():
        models = (model, smaller, apply_plan(model, plan))
        wanted, repaired, sliced = (each.base_model(input_ids=ids)[0] for each in models)
    assert (repaired - wanted).square().mean() < (sliced - wanted).square().mean()
