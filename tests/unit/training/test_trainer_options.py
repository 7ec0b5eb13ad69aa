"""What a Trainer has beside the training itself, and what a model may carry: it works, or is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LabelSmoother

from hf_context_prune.errors import ConfigError, ContextPruneError, DataError
from hf_context_prune.training.callback import pruning as module
from hf_context_prune.training.callback.callback import ContextPruneCallback
from hf_context_prune.training.callback.checkpoints import load_checkpoint
from hf_context_prune.training.callback.checks import check_arguments
from hf_context_prune.training.callback.schedule import PruningSchedule
from tests.support.callback_cases import SCHEDULE, arguments, config_for, dataset, trainer_for
from tests.support.marks import TINY_TEXT
from tests.support.tiny import tiny_model

pytestmark = TINY_TEXT

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
    seen, plan_and_reconstruct = [], module.plan_and_reconstruct

    def spy(model, *args, **kwargs):
        with torch.no_grad():
            seen.append((model(input_ids=torch.arange(1, 9)[None]).logits, "forward" in vars(model)))
        return plan_and_reconstruct(model, *args, **kwargs)

    monkeypatch.setattr(module, "plan_and_reconstruct", spy)
    trainer = trainer_for(tmp_path, variable(), bf16=True)
    trainer.train()
    assert len(seen) == 3
    for logits, autocast in seen:
        assert not autocast
        assert not torch.equal(logits, logits.bfloat16().float())
    assert "forward" in vars(trainer.model)  # and the training goes on in it


def test_models_that_no_narrower_one_fits(tmp_path, subtests):
    for change, said in (
        (
            lambda model: setattr(model, "probe", torch.nn.Identity()),
            "module probe of the model is Identity, where .* no",
        ),
        (lambda model: setattr(model.model, "norm", torch.nn.RMSNorm(48)), "model.norm of the model is RMSNorm, where"),
        (lambda model: setattr(model.config, "_attn_implementation", "flash_attention_2"), "float32 weights and attn"),
        (
            lambda model: setattr(model, "scale", nn.Parameter(torch.ones(1))),
            "weight scale .* its own, where .* missing",
        ),
        (
            lambda model: setattr(model.model.layers[0].mlp.gate_proj, "bias", nn.Parameter(torch.zeros(40))),
            r"weight model.layers.0.mlp.gate_proj.bias of the model is a weight of its own, where",
        ),
        (
            lambda model: setattr(
                model.model.layers[1].mlp.up_proj, "weight", model.model.layers[0].mlp.up_proj.weight
            ),
            "Layers 0 and 1 share the weight model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda model: prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.3),
            r"up_proj.weight_orig of the model is a weight of its own, where .* missing",
        ),
    ):
        with subtests.test(said):
            model = tiny_model("llama")
            change(model)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            with pytest.raises(ContextPruneError, match=said):
                trainer_for(tmp_path, variable(), model=model).train()
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_padding_token_that_the_trainer_sets_freezes_no_row(tmp_path):
    data = dataset()
    for row in data:
        row["input_ids"][5] = 2

    def training(folder, model, **options):
        model.config.pad_token_id = 2  # as a Trainer does, by its tokenizer
        return trainer_for(folder, variable(), model=model, data=data, **options)

    whole = training(tmp_path, tiny_model("llama", pad_token_id=None), save_strategy="steps", save_steps=5)
    whole.train()
    assert whole.model.model.embed_tokens.padding_idx is None
    resumed = training(tmp_path / "again", load_checkpoint(tmp_path / "checkpoint-5"))
    assert resumed.model.model.embed_tokens.padding_idx == 2
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    wanted = whole.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.model.state_dict().items())


def test_a_loss_beside_the_forward_is_refused_before_a_weight_moves(tmp_path):
    class Headless(Trainer):
        def compute_loss(self, model, inputs, **_):
            hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
            return nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), inputs["labels"].flatten())

    trainer = trainer_for(tmp_path, variable(), kind=Headless)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(DataError, match="No batch of this step passed through the model's forward"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_what_is_kept_of_a_training_that_was_interrupted_is_bounded(tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    hook, model = variable(), tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path, hook, model=model, callbacks=[Stop()]).train()
    trainer_for(tmp_path, None, model=model).train()
    assert sum(map(len, hook.listener.seen)) == 16 * 32  # what it would prune by


def test_liger_kernels_are_refused(tmp_path):
    options = arguments(tmp_path)
    options.use_liger_kernel = True  # where it is not installed, the Trainer itself fails
    with pytest.raises(ConfigError, match="use_liger_kernel: its modules"):
        check_arguments(options, TrainerState())


def test_training_again_does_not_prune_as_much_again(tmp_path):
    trainer = trainer_for(tmp_path, variable())
    trainer.train()
    size = trainer.model.num_parameters()
    with pytest.raises(ConfigError, match="pruned by the last training with this callback"):
        trainer.train()
    assert trainer.model.num_parameters() == size


def test_the_cache_is_used_after_a_second_trainer_of_one_model(tmp_path):
    model = tiny_model("llama")
    trainer_for(tmp_path, None, model=model)
    assert not model.config.use_cache
    trainer = trainer_for(tmp_path, None, model=model, save_strategy="steps", save_steps=7)
    trainer.add_callback(variable())
    trainer.train()
    assert model.config.use_cache
    assert load_checkpoint(tmp_path / "checkpoint-7").config.use_cache


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
    trainer_for(tmp_path, variable(), save_strategy="steps", save_steps=7).train()
    model = load_checkpoint(tmp_path / "checkpoint-7", attn_implementation="eager", dtype=torch.bfloat16)
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16
