"""What test_distributed.py and the processes that it launches both build."""

from __future__ import annotations

import torch

from hf_context_prune.pruning.calibration.statistics import RegressionMoments
from hf_context_prune.pruning.sequential.experts import repair_experts
from hf_context_prune.pruning.surgery import apply_plan
from tests.support.experts import expert_plan
from tests.support.tiny import VOCABULARY, case

MODELS = ("llama", "opt")  # without and with biases, whose sums are taken about a pivot
CONFIGS = {
    f"{criterion}-{reconstruction}": {"mlp_ratio": 0.4, "criterion": criterion, "reconstruction": reconstruction}
    for criterion, reconstruction in (
        *(("obs", "least_squares"), ("wanda", "least_squares"), ("taylor", "least_squares"), ("flap", "none")),
    )
} | {
    "adaptive": {"pruning_ratio": 0.15, "allocation": "adaptive", "reconstruction": "least_squares"},
    "walk": {"mlp_ratio": 0.4, "attention_ratio": 0.34},
    "searched walk": {"pruning_ratio": 0.15},
}


def samples():
    """Token ids, [130, 64]: five batches."""
    return torch.randint(3, VOCABULARY, (130, 64), generator=torch.Generator().manual_seed(2))


def batches():
    """Five batches; the third is nothing but padding, the fourth half of it."""
    generator = torch.Generator().manual_seed(1)
    result = [{"input_ids": torch.randint(3, VOCABULARY, (3, 20), generator=generator)} for _ in range(5)]
    for batch, length in ((result[2], 0), (result[3], 10)):
        batch["attention_mask"] = (torch.arange(20) < length).long().expand(3, 20).contiguous()
    return result


def repaired():
    """Parameters of a mixture without half of its experts; the last batch, of one process alone, chooses ridges."""
    model = case("mixtral")
    plan = expert_plan(model, (4, 4, 4))
    fewer = apply_plan(model, plan, share=True)
    given = [{"input_ids": ids} for ids in samples()[:52, :16].split(4)]
    repair_experts(model, fewer, {index: layer.experts for index, layer in enumerate(plan.layers)}, given)
    return dict(fewer.named_parameters())


def parts(count):
    """Shares of (x, t), one list of batches a process; means far from zero beside the spread."""
    generator = torch.Generator().manual_seed(3)
    rows = [
        (10 + torch.randn(30, 6, generator=generator), 5 + torch.randn(30, 4, generator=generator)) for _ in range(5)
    ]
    return [rows[index::count] for index in range(count)]


def moments_of(rows, *, centre):
    moments = RegressionMoments(6, 4, torch.device("cpu"), centre=centre)
    for x, target in rows:
        moments.add(x, target)
    return moments
