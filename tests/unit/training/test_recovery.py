"""Recovery on tiny models: it lowers the loss on text it does not train on, or gives back what it got."""

from __future__ import annotations

import random
import types

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_context_prune import EvalOptions, PrunerConfig, load_pruned, prune
from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import (
    ConfigError,
    DataError,
    NumericsError,
    PruningWarning,
    UnsupportedArchitectureError,
)
from hf_context_prune.evaluation import validation
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.pruning.thresholds.prune import count_zeros
from hf_context_prune.training.recovery import monitor, training
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.training.recovery.monitor import RecoveryMonitor
from hf_context_prune.training.recovery.recover import check_single_device, recover
from hf_context_prune.training.recovery.text import RecoveryText
from tests.support.marks import TINY_TEXT
from tests.support.tiny import TEXT, case, tiny_model

pytestmark = TINY_TEXT

QUICK = EvalOptions(max_tokens=600, benchmark=False, memory=False)
SMALL = {"max_seq_length": 32, "learning_rate": 3e-3}
RANK = {"full": {}, "lora": {"lora_rank": 4}}
"""A rank for the method that has one."""


def texts(count=120, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(TEXT.split(), k=60)) for _ in range(count)]


def pruned(tokenizer, name="llama", **options):
    config = PrunerConfig(**{"mlp_ratio": 0.5, "num_calibration_samples": 16, "max_seq_length": 32} | options)
    return prune(case(name), texts(), config, tokenizer=tokenizer, eval_options=QUICK)


def loss_of(model, tokenizer, seed=1):
    losses = document_losses(model, tokenizer, load_documents(texts(20, seed=seed)), max_seq_length=32)
    return sum(loss.nll for loss in losses) / sum(loss.num_tokens for loss in losses)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama-mqa-tied"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_recovers_what_pruning_cost(tokenizer, name, method):
    result = pruned(tokenizer, name)
    before = weights(result.model)
    outcome = recover(
        result.model, texts(), RecoveryConfig(method=method, **SMALL, **RANK[method]), tokenizer=tokenizer
    )
    assert loss_of(outcome.model, tokenizer) < loss_of(result.model, tokenizer) - 0.1
    assert same(result.model, before)
    history = outcome.history
    assert history.losses[0][0] == 0
    assert min(loss for _, loss in history.losses) == dict(history.losses)[history.best_step] < history.losses[0][1]
    assert 0 < history.tokens <= history.steps * 4 * 32
    assert type(outcome.model) is type(result.model)
    assert outcome.model.state_dict().keys() == before.keys()
    assert not outcome.model.training
    assert all(parameter.requires_grad for parameter in outcome.model.parameters())
    assert outcome.model.config.use_cache == result.model.config.use_cache


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_zero_as_a_whole_stays_zero(tokenizer, method):
    result = pruned(tokenizer)
    attention = result.model.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight[:, 3] = 0  # an input that a threshold pruned, of one projection alone
        attention.o_proj.weight[5] = 0
    options = {"method": method, **SMALL, **RANK[method]}
    outcome = recover(result.model, texts(), RecoveryConfig(**options), tokenizer=tokenizer)
    trained = outcome.model.model.layers[1].self_attn
    assert outcome.history.best_step > 0
    assert not trained.q_proj.weight[:, 3].any()
    assert not trained.o_proj.weight[5].any()
    assert trained.k_proj.weight[:, 3].all()
    assert count_zeros(outcome.model) == count_zeros(result.model)
    assert not torch.equal(trained.q_proj.weight[:, 4], attention.q_proj.weight[:, 4])


def test_adapters_of_transposed_layers_keep_zeros_too(tokenizer):
    result = pruned(tokenizer, "gpt2")
    given = result.model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        given.weight[3], given.weight[:, 7] = 0, 0  # [in, out]
    outcome = recover(
        result.model, texts(), RecoveryConfig(method="lora", **SMALL, **RANK["lora"]), tokenizer=tokenizer
    )
    trained = outcome.model.transformer.h[0].mlp.c_fc
    assert outcome.history.best_step > 0
    assert not trained.weight[3].any()
    assert not trained.weight[:, 7].any()
    assert not torch.equal(trained.weight[4], given.weight[4])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_that_require_no_gradient_stay(tokenizer, method):
    result = pruned(tokenizer)
    for name, parameter in result.model.named_parameters():
        parameter.requires_grad_("layers.0." not in name)
    before = weights(result.model)
    outcome = recover(
        result.model, texts(), RecoveryConfig(method=method, **SMALL, **RANK[method]), tokenizer=tokenizer
    )
    assert outcome.history.best_step > 0
    moved = {name for name, value in outcome.model.state_dict().items() if not torch.equal(value, before[name])}
    assert "model.layers.1.mlp.up_proj.weight" in moved
    assert not [name for name in moved if "layers.0." in name]


def test_lora_without_a_layer_to_adapt(tokenizer):
    result = pruned(tokenizer)
    for name, parameter in result.model.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(ConfigError, match="method='lora' finds no linear layer"):
        recover(result.model, texts(), RecoveryConfig(method="lora", **SMALL, **RANK["lora"]), tokenizer=tokenizer)


def test_biases_of_rows_that_are_zero_stay_zero(tokenizer):
    result = pruned(tokenizer, "gpt2")
    layer = result.model.transformer.h[0]
    with torch.no_grad():
        layer.attn.c_proj.weight[:, 5] = 0
        layer.attn.c_proj.bias[[5, 6]] = 0  # 6: a bias that is zero by chance learns
    outcome = recover(result.model, texts(), RecoveryConfig(**SMALL), tokenizer=tokenizer)
    trained = outcome.model.transformer.h[0].attn.c_proj
    assert outcome.history.best_step > 0
    assert not trained.weight[:, 5].any()
    assert trained.bias[5] == 0
    assert trained.bias[6] != 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_variable_width_model_saves_and_reloads(tokenizer, method, tmp_path):
    layers = {"units": "neurons,kv_groups", "native_architecture": False}
    result = pruned(tokenizer, mlp_ratio=None, pruning_ratio=0.2, reconstruction="none", **layers)
    assert not result.native_fit.fits
    config = RecoveryConfig(method=method, max_steps=4, **SMALL, **RANK[method])
    outcome = recover(result.model, texts(), config, tokenizer=tokenizer)
    result.model = outcome.model
    again = load_pruned(result.save_pretrained(tmp_path / "out"))
    assert same(again, weights(outcome.model))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_gets_worse_is_not_kept(tokenizer, method):
    result = pruned(tokenizer)
    good = recover(result.model, texts(), RecoveryConfig(num_epochs=2, **SMALL), tokenizer=tokenizer)  # not to be luck
    options = SMALL | RANK[method] | {"learning_rate": 30.0, "early_stopping_patience": 1}
    config = RecoveryConfig(method=method, **options)
    outcome = recover(good.model, texts(), config, tokenizer=tokenizer)
    assert outcome.history.best_step == 0
    assert outcome.history.ended in ("1 measurements in a row did not fall", "the loss is no longer a number")
    if method == "full":
        assert same(outcome.model, weights(good.model))
    assert loss_of(outcome.model, tokenizer) == pytest.approx(loss_of(good.model, tokenizer), abs=1e-5)


def test_a_loss_that_falls_again_goes_on():
    """At its peak the learning rate first makes a reconstructed model worse."""
    losses, counts = [1.0, 1.5, 1.4, 1.3, 1.3, 1.35, 0.9], []
    watch = RecoveryMonitor(tiny_model("llama"), RecoveryConfig(), 9, 0.0, iter(losses).__next__, 0.0)
    for step in range(len(losses)):
        watch.measure_validation(step)
        counts.append(watch.without_gain)
    assert counts == [0, 1, 0, 0, 1, 2, 0]
    assert (watch.best, watch.history.best_step) == (0.9, 6)


def test_a_loss_that_stays_ends_it(tokenizer):
    result = pruned(tokenizer)
    config = RecoveryConfig(
        **SMALL | {"learning_rate": 1e-12, "early_stopping_patience": 2}
    )  # too small for any weight to move
    outcome = recover(result.model, texts(), config, tokenizer=tokenizer)
    assert outcome.history.ended == "2 measurements in a row did not fall"
    assert outcome.history.best_step == 0


def test_a_loss_that_is_no_number_ends_it(tokenizer, monkeypatch):
    result = pruned(tokenizer)
    loss = training._RecoveryTrainer.compute_loss
    monkeypatch.setattr(
        training._RecoveryTrainer, "compute_loss", lambda *given, **how: loss(*given, **how) * float("nan")
    )
    outcome = recover(result.model, texts(), RecoveryConfig(**SMALL), tokenizer=tokenizer)
    assert outcome.history.ended == "the loss is no longer a number"
    assert outcome.history.best_step == 0
    assert same(outcome.model, weights(result.model))


@pytest.mark.parametrize("better", [True, False])
def test_an_interrupt_keeps_what_was_gained(tokenizer, monkeypatch, better):
    result = pruned(tokenizer)
    before = weights(result.model)
    measure, loss = RecoveryMonitor.measure_validation, training._RecoveryTrainer.compute_loss
    monkeypatch.setattr(
        RecoveryMonitor, "measure_validation", lambda self, step: (step and not better) or measure(self, step)
    )
    steps = []

    def interrupted(*given, **how):
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return loss(*given, **how)

    monkeypatch.setattr(training._RecoveryTrainer, "compute_loss", interrupted)
    config = RecoveryConfig(**SMALL)
    if not better:
        with pytest.raises(KeyboardInterrupt):
            recover(result.model, texts(), config, tokenizer=tokenizer)
        return
    with pytest.warns(PruningWarning, match="the best so far") as told:
        outcome = recover(result.model, texts(), config, tokenizer=tokenizer)
    history = outcome.history
    assert history.ended == "it was interrupted"
    assert 0 < history.best_step <= history.steps < 12
    assert f"step {history.best_step}" in str(told[0].message)
    assert loss_of(outcome.model, tokenizer) < loss_of(result.model, tokenizer)
    assert same(result.model, before)
    assert not outcome.model.training


def test_an_interrupt_before_the_first_step(tokenizer, monkeypatch):
    def interrupted(*_given, **_how):
        raise KeyboardInterrupt

    result = pruned(tokenizer)
    monkeypatch.setattr(training._RecoveryTrainer, "create_scheduler", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover(result.model, texts(), RecoveryConfig(**SMALL), tokenizer=tokenizer)


def test_the_same_seed_gives_the_same(tokenizer):
    result = pruned(tokenizer)
    runs = [
        recover(
            result.model,
            texts(),
            RecoveryConfig(recovery_seed=seed, max_steps=6, **SMALL),
            tokenizer=tokenizer,
        )
        for seed in (0, 0, 1)
    ]
    assert same(runs[0].model, weights(runs[1].model))
    assert runs[0].history.losses == runs[1].history.losses
    assert not same(runs[0].model, weights(runs[2].model))


def test_time_ends_it_and_measuring_counts(tokenizer, monkeypatch):
    result = pruned(tokenizer)
    now = [0.0]

    def clock():
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr(monitor.time, "monotonic", clock)
    config = RecoveryConfig(max_minutes=1.0, **SMALL)
    outcome = recover(result.model, texts(), config, tokenizer=tokenizer)
    history = outcome.history
    assert history.ended == "the time was up"
    assert 30 < history.seconds < 66  # the clock ticks in coarse steps
    assert 0 < history.steps < 60
    assert history.losses[-1][0] == history.steps  # the last weights were measured too
    assert len(history.losses) > 2
    losses = validation.document_losses

    def slow(*given, **how):
        now[0] += 7.0  # over a tenth of the time
        return losses(*given, **how)

    monkeypatch.setattr(validation, "document_losses", slow)
    history = recover(result.model, texts(), config, tokenizer=tokenizer).history
    assert [step for step, _ in history.losses] == [0, history.steps]
    assert history.steps > 0


def test_frozen_weights_and_half_precision_stay(tokenizer):
    result = pruned(tokenizer)
    model = result.model.bfloat16()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = weights(model)
    outcome = recover(model, texts(), RecoveryConfig(max_steps=8, **SMALL), tokenizer=tokenizer)
    after = outcome.model.state_dict()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert not outcome.model.model.embed_tokens.weight.requires_grad
    assert outcome.model.model.rotary_emb.inv_freq.dtype == torch.float32 or model.dtype == torch.bfloat16


def test_what_is_no_number_from_the_start(tokenizer):
    result = pruned(tokenizer, "llama")
    result.model.lm_head.weight.data *= 1e38
    with pytest.raises(NumericsError, match="loss"):
        recover(result.model, texts(), RecoveryConfig(**SMALL), tokenizer=tokenizer)


def test_what_is_refused_before_any_work(tokenizer):
    result = pruned(tokenizer)
    model = result.model
    before = weights(model)
    with pytest.raises(ConfigError, match="No weight of the model requires a gradient"):
        recover(tiny_model("llama").requires_grad_(False), texts(), RecoveryConfig(), tokenizer=tokenizer)
    with pytest.raises(DataError, match="at least 2"):
        recover(model, ["one text"], RecoveryConfig(), tokenizer=tokenizer)
    broken = tiny_model("llama")
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"lm_head\.weight"):
        recover(broken, texts(), RecoveryConfig(), tokenizer=tokenizer)
    with pytest.raises(UnsupportedArchitectureError, match="meta device"):
        recover(tiny_model("llama").to("meta"), texts(), RecoveryConfig(), tokenizer=tokenizer)
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(UnsupportedArchitectureError, match="Merge or unload it first"):
        recover(wrapped.get_base_model(), texts(), RecoveryConfig(), tokenizer=tokenizer)
    assert same(model, before)


def test_bad_options(subtests):
    for options, said in (
        ({"method": "qlora"}, "method 'qlora'.*full, lora"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001"),
        ({"max_minutes": 0}, "max_minutes is 0"),
        ({"max_minutes": float("nan")}, "max_minutes is nan"),
        ({"num_epochs": True}, "num_epochs is True"),
        ({"num_epochs": None}, "num_epochs is None"),
        ({"max_steps": 0}, "max_steps is 0.*at least 1"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0"),
        ({"max_seq_length": 4}, "max_seq_length is 4.*at least 8"),
        ({"num_evals": 0}, "num_evals is 0"),
        ({"early_stopping_patience": None}, "early_stopping_patience is None"),
        ({"recovery_seed": 2**31}, "recovery_seed is 2147483648"),
    ):
        with subtests.test(**options), pytest.raises(ConfigError, match=said):
            RecoveryConfig(**options)


def test_options_as_a_mapping():
    config = RecoveryConfig(method="lora", max_minutes=3)
    assert RecoveryConfig.from_dict(config.to_dict()) == config
    given = RecoveryConfig(learning_rate=1e-5)
    for hidden, rate in ((48, 2e-3), (576, 2e-3), (1152, 1e-3)):
        assert (config.peak_learning_rate(hidden), given.peak_learning_rate(hidden)) == (rate, 1e-5)
    with pytest.raises(ConfigError, match="Did you mean 'early_stopping_patience'"):
        RecoveryConfig.from_dict({"early_stopping_patients": 3})


@pytest.mark.parametrize(("batch_size", "length"), [(3, 512), (5, 512), (6, 300), (1, 32)])
def test_a_step_has_the_blocks_that_were_asked_for(batch_size, length, tokenizer, monkeypatch):
    model = tiny_model("llama", max_position_embeddings=512)
    sizes = []
    original = training._RecoveryTrainer.compute_loss
    monkeypatch.setattr(
        training._RecoveryTrainer,
        "compute_loss",
        lambda self, model, inputs, **how: (
            sizes.append(inputs["input_ids"][:, 1:].numel()) or original(self, model, inputs, **how)
        ),
    )
    config = RecoveryConfig(batch_size=batch_size, max_seq_length=length, max_steps=2, num_evals=1)
    outcome = recover(model, texts(400), config, tokenizer=tokenizer)
    assert sum(sizes) == outcome.history.steps * batch_size * (length - 1) == 2 * batch_size * (length - 1)
    assert outcome.history.tokens == 2 * batch_size * length


def test_epochs_are_as_many_as_asked_and_tokens_are_counted(tokenizer):
    result = pruned(tokenizer)
    config = RecoveryConfig(num_epochs=3, early_stopping_patience=99, **SMALL)
    history = recover(result.model, texts(9), config, tokenizer=tokenizer).history
    blocks = history.tokens // 32 // 3
    assert history.tokens == 3 * 32 * blocks
    assert history.steps == 3 * -(-blocks // 4)


def test_the_callers_random_numbers_are_left_alone(tokenizer):
    result = pruned(tokenizer)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for method in ("full", "lora"):
        recover(
            result.model,
            texts(),
            RecoveryConfig(method=method, max_steps=2, **SMALL, **RANK[method]),
            tokenizer=tokenizer,
        )
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


def validation_loss(model, tokenizer, config):
    """As recover measures, on its validation documents, but without bfloat16 products."""
    held_out = RecoveryText.of(load_documents(texts(), tokenizer=tokenizer), tokenizer, config).validation
    losses = document_losses(model, tokenizer, held_out.text, max_seq_length=config.max_seq_length)
    return sum(loss.nll for loss in losses)


@pytest.mark.parametrize("rate", [1e-9, 1e-5, 3e-5, 3e-3])
def test_what_rounding_takes_is_measured(tokenizer, rate):
    result = pruned(tokenizer)
    model = result.model.bfloat16()
    config = RecoveryConfig(**SMALL | {"max_steps": 3, "learning_rate": rate})
    outcome = recover(model, texts(), config, tokenizer=tokenizer)
    given, got = (validation_loss(each, tokenizer, config) for each in (model, outcome.model))
    assert got < given if outcome.history.best_step else got == given
    assert bool(outcome.history.best_step) or rate < 3e-3


def test_rounding_that_leaves_no_numbers_gives_back_what_was_given(tokenizer, monkeypatch):
    def losses(model, *given, **how):
        seen.append(model.dtype)
        if seen.count(torch.bfloat16) == 2:  # the first time it is what was given
            raise NumericsError("inf")
        return document_losses(model, *given, **how)

    seen = []
    result = pruned(tokenizer)
    model = result.model.bfloat16()
    monkeypatch.setattr(validation, "document_losses", losses)
    outcome = recover(model, texts(), RecoveryConfig(max_steps=6, **SMALL), tokenizer=tokenizer)
    assert seen[0] == seen[-1] == torch.bfloat16
    assert outcome.history.best_step == 0
    assert same(outcome.model, weights(model))


def test_arguments_of_other_types(tokenizer, subtests):
    for options, said in (
        ({"config": {"max_steps": 3}}, "config is a dict.*RecoveryConfig"),
        ({"tokenizer": None}, "tokenizer is a NoneType"),
    ):
        with subtests.test(said), pytest.raises(ConfigError, match=said):
            recover(tiny_model("llama"), texts(), **{"tokenizer": tokenizer} | options)


def test_a_forward_that_was_set_on_the_model_does_not_run_the_model(tokenizer):
    result = pruned(tokenizer)
    model, forward = result.model, result.model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: forward(*args, **kwargs), model)  # as TRL does
    before = weights(model)
    recovered = recover(model, texts(), RecoveryConfig(max_steps=20, **SMALL), tokenizer=tokenizer)
    assert recovered.history.best_step > 0
    assert same(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_trains_in_one_process_on_the_first_gpu(tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1"):
        check_single_device(types.SimpleNamespace(device=torch.device("cuda:1")))
    check_single_device(types.SimpleNamespace(device=torch.device("cuda:0")))
    monkeypatch.setattr("hf_context_prune.training.recovery.recover.num_processes", lambda: 2)
    with pytest.raises(ConfigError, match=r"in one process.* 2\."):
        recover(tiny_model("llama"), texts(), RecoveryConfig(max_steps=2, **SMALL), tokenizer=tokenizer)
