"""What a run needs, and what it says where it may not have it."""

from __future__ import annotations

import re

import pytest
import torch

from hf_context_prune import EvalOptions, PrunerConfig, prune
from hf_context_prune.errors import BudgetError, ConfigError
from hf_context_prune.pipelines.dry_run import dry_run
from hf_context_prune.pipelines.needs import estimate_needs
from hf_context_prune.utils.memory import own_memory, parse_bytes
from tests.support.marks import TINY_TEXT
from tests.support.tiny import model_and_text, tiny_config, tiny_model

pytestmark = TINY_TEXT
CONFIG = PrunerConfig(mlp_ratio=0.5, max_seq_length=32, num_calibration_samples=16)
QUICK = EvalOptions(max_tokens=300, benchmark=False, memory=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_and_text(tmp_path_factory.mktemp("needs"), "data.jsonl")


@pytest.mark.parametrize("limit", [1, "1MB"])
def test_a_limit_below_what_one_step_needs_is_refused_and_names_the_least_that_can(place, limit):
    with pytest.raises(BudgetError, match=r"Allow \d+\.\d\d GiB in all \(max_memory\)") as caught:
        prune(place / "base", place / "data.jsonl", CONFIG, eval_options=QUICK, max_memory=limit)
    with pytest.raises(BudgetError, match="max_memory"):
        dry_run(place / "base", CONFIG, max_memory=limit)
    least = float(re.search(r"Allow (\S+) GiB", str(caught.value)).group(1)) + 0.02
    prune(place / "base", place / "data.jsonl", CONFIG, eval_options=QUICK, max_memory=f"{int(least * 1024)}MiB")


def test_a_limit_changes_no_bit(place):
    free, tight = (
        prune(place / "base", place / "data.jsonl", CONFIG, eval_options=QUICK, max_memory=limit)
        for limit in (None, own_memory() + 40 * 2**20)
    )
    assert free.plan.layers == tight.plan.layers
    for name, tensor in free.model.state_dict().items():
        assert torch.equal(tensor, tight.model.state_dict()[name]), name
    assert free.report.loss == tight.report.loss


@pytest.mark.parametrize("value", ["8 things", "", "0", 0, -5, True, "GiB"])
def test_a_limit_that_is_no_size_is_refused(place, value):
    with pytest.raises(ConfigError, match=r"max_memory.*'8GiB'"):
        prune(place / "base", place / "data.jsonl", CONFIG, max_memory=value)


def test_sizes():
    assert [parse_bytes(value) for value in (None, "8GiB", "800MB", 10**9)] == [None, 8 * 2**30, 8 * 10**8, 10**9]


def shape_of_8b():
    big = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = tiny_config("llama", **big, head_dim=128, vocab_size=128256, num_hidden_layers=32)
    with torch.device("meta"):
        return type(tiny_model("llama"))(config).to(torch.bfloat16)


def test_a_model_of_8b_fits_into_8_gib(subtests):
    model = shape_of_8b()
    for samples in (8, 128):
        for config in (
            PrunerConfig(pruning_ratio=0.2, allocation="uniform", num_calibration_samples=samples),
            PrunerConfig(pruning_ratio=0.2, num_calibration_samples=samples),
        ):
            with subtests.test(samples=samples, allocation=config.allocation):
                needs = estimate_needs(model, config, int(0.8 * model.num_parameters()))
                assert 2 * 2**30 < needs.step_memory < 7.5 * 2**30
                assert needs.output_disk == 2 * int(0.8 * model.num_parameters())
                assert needs.resume_disk < needs.output_disk
    few, many = (
        estimate_needs(model, PrunerConfig(mlp_ratio=0.2, num_calibration_samples=samples), model.num_parameters())
        for samples in (8, 128)
    )
    assert few.step_memory < many.step_memory
    assert "GiB of memory" in str(many)
