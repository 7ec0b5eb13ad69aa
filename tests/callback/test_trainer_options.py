"""What a Trainer has beside the training itself, and what a model may carry: it works, or is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import LabelSmoother

from hf_context_prune.callback import ContextPruneCallback, PruningSchedule, load_checkpoint
from hf_context_prune.callback import callback as module
from hf_context_prune.callback.checks import check_arguments
from hf_context_prune.data import CalibrationWarning
from hf_context_prune.errors import ConfigError
from tests.callback.cases import SCHEDULE, arguments, config_for, dataset, trainer_for
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings(f"ignore::{CalibrationWarning.__module__}.{CalibrationWarning.__name__}")

VARIABLE = {"mlp_ratio": None, "attention_ratio": None, "pruning_ratio": 0.2}


def variable(schedule=SCHEDULE):
    return ContextPruneCallback(config_for(**VARIABLE), schedule)


def test_smoothed_labels_are_shifted_after_a_pruning_too(tmp_path):
    trainer = trainer_for(tmp_path, variable(), label_smoothing_factor=0.1, eval_data=dataset(12, seed=3))
    trainer.train()
    model, batch = trainer.model.eval(), next(iter(trainer.get_eval_dataloader()))
    assert type(model).__name__ == "ContextPrunedLlamaForCausalLM"
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch))
        wanted = LabelSmoother(0.1)(model(input_ids=batch["input_ids"]), batch["labels"], shift_labels=True)
    assert loss == wanted


def test_a_pruning_looks_at_the_model_without_the_trainers_autocast(tmp_path, monkeypatch):
    seen, plan_and_repair = [], module.plan_and_repair

    def spy(model, *args, **kwargs):
        with torch.no_grad():
            seen.append((model(input_ids=torch.arange(1, 9)[None]).logits, "forward" in vars(model)))
        return plan_and_repair(model, *args, **kwargs)

    monkeypatch.setattr(module, "plan_and_repair", spy)
    trainer = trainer_for(tmp_path, variable(), bf16=True)
    trainer.train()
    assert len(seen) == 3
    for logits, autocast in seen:
        assert not autocast
        assert not torch.equal(logits, logits.bfloat16().float())
    assert "forward" in vars(trainer.model)  # and the training goes on in it


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda model: setattr(model, "probe", torch.nn.Identity()),
            "module probe of the model is Identity, where .* no",
        ),
        (lambda model: setattr(model.model, "norm", torch.nn.RMSNorm(48)), "model.norm of the model is RMSNorm, where"),
        (lambda model: setattr(model.config, "_attn_implementation", "flash_attention_2"), "float32 weights and attn"),
    ],
)
def test_models_that_no_narrower_one_fits(change, said, tmp_path):
    model = tiny_model("llama")
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=said):
        trainer_for(tmp_path, variable(), model=model).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_liger_kernels_are_refused(tmp_path):
    options = arguments(tmp_path)
    options.use_liger_kernel = True  # where it is not installed, the Trainer itself fails
    with pytest.raises(ConfigError, match="use_liger_kernel: its modules"):
        check_arguments(options, TrainerState())


def test_training_again_does_not_prune_as_much_again(tmp_path):
    trainer = trainer_for(tmp_path, variable())
    trainer.train()
    size = trainer.model.num_parameters()
    with pytest.raises(ConfigError, match="cut already, by the last training with this callback: as much again"):
        trainer.train()
    assert trainer.model.num_parameters() == size


def test_the_cache_is_used_after_a_second_trainer_of_one_model(tmp_path):
    model = tiny_model("llama")
    trainer_for(tmp_path, None, model=model)
    assert not model.config.use_cache
    trainer = trainer_for(tmp_path, None, model=model, save_strategy="steps", save_steps=15)
    trainer.add_callback(variable())
    trainer.train()
    assert model.config.use_cache
    assert load_checkpoint(tmp_path / "checkpoint-15").config.use_cache


def test_a_batch_that_is_run_twice_is_text_once(tmp_path):
    hook = variable(PruningSchedule(4, 4, 1))
    trainer = trainer_for(tmp_path, hook)
    plain = trainer.compute_loss

    def with_metrics(model, inputs, **options):
        with torch.no_grad():
            model(**inputs)
        return plain(model, inputs, **options)

    trainer.compute_loss = with_metrics
    trainer.train()
    assert hook.plan.provenance["prunings"][0]["tokens"] == 4 * 4 * 32


def test_a_checkpoint_is_loaded_as_the_training_had_it(tmp_path):
    trainer_for(tmp_path, variable(), save_strategy="steps", save_steps=15).train()
    model = load_checkpoint(tmp_path / "checkpoint-15", attn_implementation="eager", dtype=torch.bfloat16)
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16
