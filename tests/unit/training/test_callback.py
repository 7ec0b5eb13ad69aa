"""Pruning inside an unchanged `transformers.Trainer`: learning goes on, folders reload, and what can't work is told."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_context_prune import PrunerConfig, apply_plan
from hf_context_prune.config import ThresholdConfig
from hf_context_prune.errors import (
    ConfigError,
    DataError,
    LoadError,
    NumericsError,
    PruningWarning,
    UnsupportedArchitectureError,
)
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.training.callback import pruning
from hf_context_prune.training.callback.batches import read_batch
from hf_context_prune.training.callback.callback import ContextPruneCallback
from hf_context_prune.training.callback.checkpoints import load_checkpoint
from hf_context_prune.training.callback.mixin import ContextPruneTrainerMixin
from hf_context_prune.training.callback.schedule import PruningSchedule
from tests.support.callback_cases import SCHEDULE, STEPS, Snapshots, config_for, dataset, trainer_for
from tests.support.callback_cases import arguments as arguments_for
from tests.support.marks import TINY_TEXT
from tests.support.tiny import COVERING, case, tiny_model

pytestmark = TINY_TEXT

VARIABLE = {"mlp_ratio": None, "attention_ratio": None, "pruning_ratio": 0.2, "allocation": "adaptive"}


def callback(schedule=SCHEDULE, **options):
    return ContextPruneCallback(config_for(**options), schedule)


def same(model, weights):
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in weights)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", COVERING)
def test_every_kind_of_model(name, tmp_path):
    model, hook = case(name), callback(**({"attention_ratio": None} if name in HEADS_STAY else {}))
    trainer = trainer_for(tmp_path, hook, model=model, max_steps=16)
    trainer.train()
    assert trainer.model is model
    neurons = 96 if name == "gpt2" else 20
    groups = {widths.kv_groups for widths in hook.plan.widths if widths.kv_groups}
    assert groups == ({KV_GROUPS.get(name, 2)} if name != "olmo2" else set())
    assert {widths.neurons for widths in hook.plan.widths} == {neurons}
    spec = SPECS[model.config.model_type.removeprefix("context_pruned_")]
    assert type(model).__name__.removeprefix("ContextPruned") == spec.model_class
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    assert [entry["step"] for entry in hook.plan.provenance["prunings"]] == [2, 4, 6]
    assert model.config.use_cache
    trainer.save_model(str(tmp_path / "final"))
    again = load_checkpoint(tmp_path / "final")
    assert type(again).__name__ == type(model).__name__
    assert same(again, model.state_dict())
    ids = torch.arange(3, 13)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **options), again.generate(ids, use_cache=False, **options))


KV_GROUPS = {"gpt_neox": 4, "gpt2": 4, "llama-mqa-tied": 1, "gpt_bigcode-multi-query": 1}
"""A third is removed: of six with multi-head attention, else of three; the only one of MQA stays."""
HEADS_STAY = ("llama-mqa-tied", "gpt_bigcode-multi-query", "olmo2")


def test_a_head_of_its_own_stays_one_whatever_the_config_says(tmp_path):
    model, hook = tiny_model("llama", tie_word_embeddings=False), callback()
    model.config.tie_word_embeddings = True  # as transformers leaves it where the files hold a head
    trainer = trainer_for(tmp_path, hook, model=model, max_steps=7)
    trainer.train()
    assert not model.config.tie_word_embeddings
    trainer.save_model(str(tmp_path / "by_trainer"))
    hook.save_pretrained(tmp_path / "by_callback")
    for name in ("by_trainer", "by_callback"):
        assert same(load_checkpoint(tmp_path / name), model.state_dict())


@pytest.mark.parametrize(
    ("optim", "options"),
    [("adamw_torch", {}), ("adamw_torch_fused", VARIABLE), ("sgd", {}), ("sgd", VARIABLE), ("adafactor", VARIABLE)],
    ids=["adamw", "adamw-fused-variable", "sgd", "sgd-variable", "adafactor-variable"],
)
def test_learning_goes_on_after_a_pruning(optim, options, tmp_path):
    once = PruningSchedule(start=10, num_prunings=1)
    hook, snapshots = callback(once, **options), Snapshots()
    trainer = trainer_for(
        tmp_path,
        hook,
        callbacks=[snapshots],
        optim=optim,
        optim_args="momentum=0.9" if optim == "sgd" else None,
        learning_rate=0.1 if optim == "sgd" else 3e-3,
        max_steps=21,
    )
    batches, compute_loss = [], trainer.compute_loss

    def recorded(model, inputs, **more):
        batches.append(dict(inputs))
        return compute_loss(model, inputs, **more)

    trainer.compute_loss = recorded
    trainer.train()
    learnt = losses(trainer)[10:20]
    one_shot = tiny_model("llama")  # the model as it was right after the pruning, on the same ten batches
    one_shot = apply_plan(one_shot, identity_of(hook.plan, one_shot))
    one_shot.load_state_dict(snapshots.weights[10])
    with torch.no_grad():
        standing = [float(one_shot.eval()(**batch).loss) for batch in batches[10:20]]
    assert learnt[0] == pytest.approx(standing[0], abs=1e-4)
    assert sum(learnt) < sum(standing)
    assert snapshots.weights[9]["model.layers.0.mlp.up_proj.weight"].shape == (40, 48)


def identity_of(plan, model):
    """The plan of a training for the model that it began with."""
    from hf_context_prune.modeling.plan import fingerprint

    return PruningPlan(plan.model_type, plan.dense, plan.layers, fingerprint(model))


def test_sizes_are_logged_and_the_plan_is_written(tmp_path):
    class Reporter(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **_):
            self.seen.append(dict(logs))

    hook, reporter = callback(**VARIABLE), Reporter()
    trainer = trainer_for(tmp_path, hook, callbacks=[reporter], save_strategy="steps", save_steps=5)
    before = trainer.model.num_parameters()
    trainer.train()
    ratios = [entry["pruning/ratio"] for entry in reporter.seen]
    assert ratios[0] == 0
    assert ratios == sorted(ratios)
    assert len(set(ratios)) == 4
    assert ratios[-1] == pytest.approx(1 - trainer.model.num_parameters() / before)
    assert 0.2 <= ratios[-1] < 0.23
    assert trainer.state.log_history[5]["pruning/parameters"] == reporter.seen[5]["pruning/parameters"]
    assert PruningPlan.load(tmp_path / "pruning_plan.json") == hook.plan
    half = load_checkpoint(tmp_path / "checkpoint-5")
    assert trainer.model.num_parameters() < half.num_parameters() < before
    assert half.config.use_cache
    assert PruningPlan.load(tmp_path / "checkpoint-5/pruning_plan.json").provenance["prunings"][-1]["step"] == 4


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"eval_strategy": "steps", "eval_steps": 3},
        {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_strategy": "steps", "best": True},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_ways_of_training(options, tmp_path):
    if options.pop("best", False):
        options |= {"load_best_model_at_end": True, "save_total_limit": 1}
    hook = callback(reconstruction="least_squares")
    trainer = trainer_for(tmp_path, hook, eval_data=dataset(12, seed=3), **options)
    trainer.train()
    assert trainer.model.model.layers[0].mlp.up_proj.out_features == 20
    assert losses(trainer)[-1] < losses(trainer)[0]
    if options.get("load_best_model_at_end"):
        best = trainer.state.best_model_checkpoint
        assert int(best.rpartition("-")[2]) >= 6  # checkpoints of other sizes don't count
        assert same(load_checkpoint(best), trainer.model.state_dict())
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_padding_is_no_text(tmp_path):
    plain = dataset()
    padded = [
        {
            "input_ids": torch.cat([torch.zeros(8, dtype=torch.long), row["input_ids"]]),
            "attention_mask": torch.cat([torch.zeros(8, dtype=torch.long), torch.ones(32, dtype=torch.long)]),
            "labels": torch.cat([torch.full((8,), -100), row["labels"]]),
        }
        for row in plain
    ]
    seen = []
    for data in (plain, padded):
        hook = callback(PruningSchedule(start=5, num_prunings=2, end=12))
        hook._prune = lambda *_: None
        trainer_for(tmp_path, hook, data=data, max_steps=13).train()
        seen.append(hook)
    first, second = (trainer_tokens(hook) for hook in seen)
    assert first == second


def test_text_of_a_batch():
    ids = torch.tensor([[5, 6, 7, 2], [2, 2, 8, 9]])  # 2 pads, and ends texts
    labels = torch.tensor([[5, 6, 7, 2], [-100, -100, 8, 9]])
    real = [5, 6, 7, 2, 8, 9]
    flat = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    square = (flat[:, None, None, :] * flat[:, None, :, None]).bool()
    scores = torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)
    for given in ({"attention_mask": flat}, {"attention_mask": square}, {"attention_mask": scores}, {"labels": labels}):
        assert read_batch((), {"input_ids": ids, **given}, 2).tolist() == real
    assert read_batch((ids,), {}, 2).tolist() == [5, 6, 7, 8, 9]  # without labels: the edges
    assert read_batch((torch.tensor([[2, 5, 2, 6]]),), {}, 2).tolist() == [5, 2, 6]
    assert read_batch((ids,), {}, None).tolist() == ids.flatten().tolist()
    assert read_batch((ids,), {"labels": labels}, None).tolist() == ids.flatten().tolist()
    prompt = {"labels": torch.tensor([[-100, -100, 7, 2], [-100, -100, 8, 9]])}  # left out of the loss, but text
    assert read_batch((ids,), prompt, 0).tolist() == ids.flatten().tolist()


def trainer_tokens(hook):
    assert hook.progress.num_done == 2
    return hook.metrics["pruning/parameters"], hook.progress.total_params


def record_samples(monkeypatch):
    """The samples of every pruning to come."""
    samples, pack = [], pruning.pack_samples
    monkeypatch.setattr(
        pruning, "pack_samples", lambda *given, **how: samples.append(pack(*given, **how)) or samples[-1]
    )
    return samples


def test_the_last_tokens_of_the_training_are_the_text(tmp_path, monkeypatch):
    hook, samples = callback(PruningSchedule(start=6, num_prunings=1)), record_samples(monkeypatch)
    trainer = trainer_for(tmp_path, hook)
    trainer.train()
    batches = [batch["input_ids"] for batch in list(trainer.get_train_dataloader())[2:6]]
    assert torch.equal(samples[0], torch.cat(batches))  # 16 samples of 32: four batches of four


@pytest.mark.parametrize("part", ["config", "schedule"])
def test_another_config_does_not_resume(part, tmp_path):
    trainer = trainer_for(tmp_path, callback(), save_strategy="steps", save_steps=5)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-5"
    model = load_checkpoint(checkpoint)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = callback(mlp_ratio=0.4) if part == "config" else callback(PruningSchedule(2, 7, 3))
    said = r"another config: mlp_ratio=0\.4 \(was 0\.5\)" if part == "config" else r"another schedule: end=7 \(was 6\)"
    with pytest.raises(ConfigError, match=said):
        trainer_for(tmp_path, other, model=model).train(resume_from_checkpoint=str(checkpoint))
    assert same(model, before)


def test_a_checkpoint_without_the_callback_does_not_resume(tmp_path):
    trainer_for(tmp_path, None, save_strategy="steps", save_steps=5).train()
    with pytest.raises(ConfigError, match="step 5 was written without a ContextPruneCallback"):
        trainer_for(tmp_path, callback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_the_state_in_a_checkpoint_makes_the_same_callback(tmp_path):
    hook = callback(**VARIABLE)
    trainer_for(tmp_path, hook, max_steps=7, save_strategy="steps", save_steps=5).train()
    saved = json.loads((tmp_path / "checkpoint-5/trainer_state.json").read_text())["stateful_callbacks"]
    again = ContextPruneCallback.from_state(saved["ContextPruneCallback"])
    assert (again.config, again.schedule, again.progress.num_done) == (hook.config, hook.schedule, 2)
    assert ContextPruneCallback.from_state(hook.state()).progress == hook.progress
    del saved["ContextPruneCallback"]["attributes"]["progress"]["base"]  # as earlier versions wrote it
    assert ContextPruneCallback.from_state(saved["ContextPruneCallback"]).progress.base == {}


@pytest.mark.parametrize("at", [1, 5, 7])
@pytest.mark.parametrize("options", [{}, VARIABLE], ids=["uniform", "variable"])
def test_resuming_gives_the_weights_of_an_uninterrupted_training(options, at, tmp_path):
    whole = trainer_for(tmp_path, callback(**options), save_strategy="steps", save_steps=at)
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{at}"
    hook = callback(**options)
    resumed = trainer_for(tmp_path / "again", hook, model=load_checkpoint(checkpoint))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(resumed.model, whole.model.state_dict())
    assert hook.plan == whole.callback_handler.callbacks[-1].plan or hook.plan.layers
    assert losses(resumed) == losses(whole)


def test_a_wide_model_does_not_resume_a_narrow_checkpoint(tmp_path):
    trainer_for(tmp_path, callback(), save_strategy="steps", save_steps=5).train()
    state = json.loads((tmp_path / "checkpoint-5/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["ContextPruneCallback"]["attributes"]["progress"]["num_done"] == 2
    with pytest.raises(RuntimeError, match="size mismatch"):  # by the Trainer, before any callback is asked
        trainer_for(tmp_path, callback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    with pytest.raises(LoadError, match="not a whole checkpoint: there is no such folder"):
        load_checkpoint(tmp_path / "checkpoint-9")


def test_what_accelerates_environment_asks_for_is_seen(tmp_path, monkeypatch, subtests):
    trainer = trainer_for(tmp_path, callback())
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        with subtests.test(name), monkeypatch.context() as patch:
            patch.setenv(name, "true")
            with pytest.raises(ConfigError, match="FSDP or DeepSpeed of accelerate's environment: shards"):
                trainer.train()


def quantised(model):
    from optimum.quanto import qint8, quantize

    quantize(model, weights=qint8)
    return model


def subclassed(model):
    class Sharded(torch.nn.Parameter):
        pass

    projection = model.model.layers[0].mlp.up_proj
    projection.weight = Sharded(projection.weight.detach())
    return model


def broken(model):
    model.lm_head.weight.data[0, 0] = float("nan")
    return model


def test_what_is_refused_before_the_first_step(tmp_path, subtests):
    for options, arguments, error, said in (
        (
            {"schedule": PruningSchedule(0.5, 30, 2)},
            {},
            ConfigError,
            "last pruning is at step 30, but",
        ),
        ({}, {"torch_compile": True}, ConfigError, "the compiled graph has the old shapes"),
        ({}, {"auto_find_batch_size": True}, ConfigError, "auto_find_batch_size: it begins"),
        ({}, {"optim": "rmsprop"}, ConfigError, "RMSprop can't be mapped"),
        ({}, {"twice": callback()}, ConfigError, "two ContextPruneCallbacks"),
        ({}, {"twice": "the same"}, ConfigError, "or one twice"),
        ({}, {"restore_callback_states_from_checkpoint": True}, ConfigError, "restore_callback_states_from_checkpoint"),
        ({}, {"model": lambda: quantised(tiny_model("llama"))}, UnsupportedArchitectureError, "QLinear, no plain"),
        ({}, {"model": lambda: subclassed(tiny_model("llama"))}, UnsupportedArchitectureError, "not a plain parameter"),
        ({}, {"model": lambda: broken(tiny_model("llama"))}, NumericsError, r"lm_head\.weight"),
        ({"reconstruction": "bias"}, {}, ConfigError, "adds biases that a llama model has no field for"),
        (VARIABLE | {"pruning_ratio": 0.95, "allocation": "uniform"}, {}, ConfigError, "options can remove at most"),
        (VARIABLE | {"pruning_ratio": 0.95}, {}, ConfigError, "neurons and KV groups can give at most"),
        (
            VARIABLE | {"pruning_ratio": 0.4, "schedule": PruningSchedule(5, 5, 1)},
            {},
            ConfigError,
            "At the first pruning of the schedule: .* can remove at most .* Or prune in more steps",
        ),
    ):
        with subtests.test(said):
            schedule = options.pop("schedule", SCHEDULE)
            twice, make = arguments.pop("twice", False), arguments.pop("model", lambda: tiny_model("llama"))
            model = make()
            before = {key: value.clone() for key, value in model.state_dict().items()}
            hook = callback(schedule, **options)
            more = [hook if twice == "the same" else twice] if twice else []
            trainer = trainer_for(tmp_path, hook, model=model, callbacks=more, **arguments)
            with pytest.raises(error, match=said):
                trainer.train()
            after = model.state_dict()
            assert all(torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in after.items())
            assert trainer.state.global_step == 0
            assert not model._forward_pre_hooks


def test_models_that_are_wrapped(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(UnsupportedArchitectureError, match="unwrap it first"):
        trainer_for(tmp_path, callback(), model=model).train()


def test_batches_without_token_ids(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        embedded = [
            {"inputs_embeds": model.model.embed_tokens(row["input_ids"]), "labels": row["labels"]}
            for row in dataset(40)
        ]
    with pytest.raises(DataError, match=r"no input_ids \(but inputs_embeds, labels"):
        trainer_for(tmp_path, callback(), model=model, data=embedded, remove_unused_columns=False).train()


def test_configs_that_need_more_than_batches(subtests):
    budget = {"mlp_ratio": None, "attention_ratio": None, "pruning_ratio": 0.2}
    for options, said in (
        ({"num_layers": 2}, r"num_layers.* Call prune\(\) with them before the training"),
        ({"vocab_size": 128}, "trimmed = prune_vocabulary"),
        ({**budget, "units": "tokens,neurons"}, "trimmed = prune_vocabulary"),
        ({"general_data_ratio": 0.5}, "general_data_ratio"),
        ({"mlp_ratio": None, "attention_ratio": None, "max_loss_increase": 0.1}, "max_loss_increase finds the size"),
        ({"allocation": "adaptive"}, "one budget for all parameters"),
        ({"refit_lm_head": True}, "refit_lm_head=True"),
    ):
        with subtests.test(**options), pytest.raises(ConfigError, match=said):
            callback(**options)


def test_options_from_a_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--pruning_ratio", "0.3", "--criterion", "wanda", "--seed", "3"]
    config, arguments = HfArgumentParser((PrunerConfig, TrainingArguments)).parse_args_into_dataclasses(words)
    assert (config.pruning_ratio, config.criterion, arguments.seed) == (0.3, "wanda", 3)
    assert ContextPruneCallback(config).config == config


def test_a_callback_may_be_used_again(tmp_path):
    hook = callback()
    first = trainer_for(tmp_path, hook)
    first.train()
    plan = hook.plan
    second = trainer_for(tmp_path, hook)
    second.train()
    assert hook.plan == plan
    assert same(second.model, first.model.state_dict())


@pytest.mark.parametrize(("name", "ratio"), [("llama", 0.02), ("gpt2", 0.2), ("gpt2", 0.02), ("phi", 0.2)])
def test_prunings_for_which_whole_units_went_far_enough_already(name, ratio, tmp_path):
    hook = callback(PruningSchedule(1, 8, 8), **VARIABLE | {"pruning_ratio": ratio})
    trainer = trainer_for(tmp_path, hook, model=case(name), max_steps=9)
    trainer.train()
    sizes = [entry["parameters"] for entry in hook.plan.provenance["prunings"]]
    assert len(sizes) == 8
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == trainer.model.num_parameters() <= (1 - ratio) * hook.progress.total_params


@pytest.mark.parametrize(
    ("name", "options"), [("gpt2", VARIABLE), ("gpt_neox", {}), ("phi", VARIABLE)], ids=["gpt2", "gpt_neox", "phi"]
)
def test_other_families_resume_too(name, options, tmp_path):
    whole = trainer_for(tmp_path, callback(**options), model=case(name), save_strategy="steps", save_steps=5)
    whole.train()
    checkpoint = tmp_path / "checkpoint-5"
    resumed = trainer_for(tmp_path / "again", callback(**options), model=load_checkpoint(checkpoint))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(resumed.model, whole.model.state_dict())


def test_samples_are_no_longer_than_the_positions(tmp_path, monkeypatch):
    samples = record_samples(monkeypatch)
    trainer_for(tmp_path, callback(max_seq_length=512), model=tiny_model("gpt2", max_position_embeddings=48)).train()
    assert [each.shape[1] for each in samples] == [48, 48, 48]


def test_too_little_text():
    with pytest.raises(DataError, match="hold 17 tokens, but 32 are needed"):
        pruning.pack_samples(list(range(17)), tiny_model("llama"), max_seq_length=32, at_least=16)


def test_little_text_is_cut_into_samples_for_adaptive_widths(tmp_path):
    hook = callback(PruningSchedule(1, 6, 3), **VARIABLE | {"max_seq_length": 512})
    trainer_for(tmp_path, hook, per_device_train_batch_size=2).train()
    assert hook.progress.num_done == 3


def test_a_training_that_did_not_end(tmp_path):
    class Stop(TrainerCallback):
        def __init__(self, at):
            self.at = at

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == self.at:
                raise KeyboardInterrupt

    for at, hooks in ((1, 1), (4, 1)):
        hook, model = callback(), tiny_model("llama")
        with pytest.raises(KeyboardInterrupt):
            trainer_for(tmp_path, hook, model=model, callbacks=[Stop(at)]).train()
        again = trainer_for(tmp_path, hook, model=model)
        if at < 2:  # nothing was cut: it may begin anew, and listens once
            again.train()
            assert [entry["tokens"] for entry in hook.plan.provenance["prunings"]] == [256, 512, 512]
            assert not model._forward_pre_hooks
        else:
            with pytest.raises(ConfigError, match="pruned by the last training"):
                again.train()
            assert len(model._forward_pre_hooks) == hooks
            fresh = trainer_for(tmp_path, hook)
            fresh.train()
            assert hook.progress.num_done == 3


def test_nothing_listens_after_the_last_pruning(tmp_path):
    class Look(TrainerCallback):
        seen = ()

        def on_step_end(self, args, state, control, model=None, **_):
            self.seen += (len(model._forward_pre_hooks),)

    look, hook = Look(), callback()
    trainer_for(tmp_path, hook, callbacks=[look]).train()
    assert look.seen == (1,) * 5 + (0,) * 3
    assert hook.listener.seen == hook.progress.tokens == []


def test_a_model_of_variable_widths_needs_adaptive_allocation(tmp_path):
    first = trainer_for(tmp_path, callback(**VARIABLE))
    first.train()
    with pytest.raises(ConfigError, match="widths vary from layer to layer; allocation='uniform'"):
        trainer_for(tmp_path, callback(), model=first.model).train()
    again = callback(**VARIABLE)
    trainer_for(tmp_path, again, model=first.model).train()
    assert again.metrics["pruning/ratio"] >= 0.2


def test_a_training_that_ends_early_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 5

    with pytest.warns(PruningWarning, match=r"ended at step 5, after 2 of 3 prunings \(planned after the steps 2, 4"):
        trainer_for(tmp_path, callback(), callbacks=[Stop()]).train()


def test_what_was_set_on_modules_stays(tmp_path):
    model = tiny_model("gpt2", attn_pdrop=0.1, resid_pdrop=0.1)
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for module in dropouts:
        module.p = 0.0
    trainer_for(tmp_path, callback(), model=model).train()
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_hooks_on_weights_that_are_not_pruned_stay(tmp_path):
    model, calls = tiny_model("llama"), []
    embedding = model.model.embed_tokens.weight
    embedding.register_hook(lambda gradient: calls.append(1) or gradient * 0)
    snapshots = Snapshots()
    trainer_for(tmp_path, callback(), model=model, callbacks=[snapshots], weight_decay=0.0).train()
    assert len(calls) == STEPS
    assert model.model.embed_tokens.weight is embedding
    name = "model.embed_tokens.weight"
    assert torch.equal(snapshots.weights[STEPS][name], snapshots.weights[1][name])


def test_a_training_that_diverged_says_so(tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 3:
                model.lm_head.weight.data[0, 0] = float("nan")

    with pytest.raises(NumericsError, match=r"After step 4 the weights or activations .* Lower the learning rate"):
        trainer_for(tmp_path, callback(), callbacks=[Break()]).train()


def test_the_checkpoint_is_whole_before_the_callback_adds_to_it(tmp_path, monkeypatch):
    """Killed between the two, it still resumes."""
    whole = trainer_for(tmp_path, callback(**VARIABLE), model=case("gpt2"), save_strategy="steps", save_steps=5)
    monkeypatch.setattr(ContextPruneCallback, "on_save", lambda *_, **__: None)
    whole.train()
    monkeypatch.undo()
    checkpoint = tmp_path / "checkpoint-5"
    assert not (checkpoint / "pruning_plan.json").exists()
    resumed = trainer_for(tmp_path / "again", callback(**VARIABLE), model=load_checkpoint(checkpoint))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(resumed.model, whole.model.state_dict())


@pytest.mark.parametrize("silent", [True, False])
def test_bars_of_a_pruning_are_those_of_the_trainer(silent, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    hook, seen = callback(), []
    hook._prune = lambda *_: seen.append(are_progress_bars_disabled("hf_context_prune.calibration"))
    trainer_for(tmp_path, hook, disable_tqdm=silent).train()
    assert seen == [silent] * 3
    assert not are_progress_bars_disabled("hf_context_prune.calibration")


def test_another_number_of_steps_does_not_resume(tmp_path):
    schedule = PruningSchedule(0.25, 0.75, 3)
    trainer_for(tmp_path, callback(schedule), save_strategy="steps", save_steps=5).train()
    checkpoint = tmp_path / "checkpoint-5"
    longer = trainer_for(tmp_path, callback(schedule), model=load_checkpoint(checkpoint), max_steps=16)
    with pytest.raises(
        ConfigError, match=r"prunes after the steps \[2, 4, 6\]; with 16 steps in all they would be \[4, 8, 12\]"
    ):
        longer.train(resume_from_checkpoint=str(checkpoint))


def test_arguments_of_other_types(subtests):
    for arguments, said in (
        (("x",), "config is a str; it must be a PrunerConfig"),
        ((PruningSchedule(),), "config is a PruningSchedule"),
        ((PrunerConfig(), 3), "schedule is a int; it must be a PruningSchedule"),
        ((None, {"strat": 1}), "Did you mean 'start'"),
        ((ThresholdConfig(linear_threshold=1e-3),), "config is a ThresholdConfig.*PrunerConfig"),
    ):
        with subtests.test(said), pytest.raises(ConfigError, match=said):
            ContextPruneCallback(*arguments)


def test_the_mixin_gives_the_sizes_to_every_reporter(tmp_path):
    class Reporter(TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs=None, **_):
            self.seen += (dict(logs),)

    class Mixed(ContextPruneTrainerMixin, Trainer):
        pass

    reporter, hook = Reporter(), callback()
    trainer = Mixed(tiny_model("llama"), arguments_for(tmp_path), train_dataset=dataset(), callbacks=[reporter, hook])
    trainer.train()
    assert [entry["pruning/ratio"] for entry in reporter.seen][-1] == hook.metrics["pruning/ratio"] > 0
    assert all("pruning/parameters" in entry for entry in reporter.seen)
