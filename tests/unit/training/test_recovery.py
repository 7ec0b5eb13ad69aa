"""Recovery on tiny models: it lowers the loss on text it does not train on, or gives back what it got."""

from __future__ import annotations

import random
import sys
import types

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from hf_context_prune import EvalOptions, PrunerConfig, apply_plan, prune
from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import (
    CalibrationWarning,
    ConfigError,
    DataError,
    NumericsError,
    PlanError,
    PruningWarning,
    UnsupportedArchitectureError,
)
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.pruning.thresholds.prune import count_zeros
from hf_context_prune.training.recovery import recover as run
from hf_context_prune.training.recovery import training
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.training.recovery.loss import token_loss
from hf_context_prune.training.recovery.recover import check_output_folder, recover, teacher_of
from tests.support.tiny import TEXT, case, tiny_model
from tests.support.tiny_domain import documents, model_for, shared_tokenizer

pytestmark = pytest.mark.filterwarnings(f"ignore::{CalibrationWarning.__module__}.{CalibrationWarning.__name__}")

QUICK = EvalOptions(max_tokens=600, speed=False, memory=False)
SMALL = {"max_seq_length": 32, "lora_rank": 4, "learning_rate": 3e-3}


def texts(count=120, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(TEXT.split(), k=60)) for _ in range(count)]


def pruned(tokenizer, name="llama", **options):
    dense = case(name)
    config = PrunerConfig(**{"mlp_ratio": 0.5, "num_calibration_samples": 16, "max_seq_length": 32} | options)
    return dense, prune(dense, texts(), config, tokenizer=tokenizer, evaluation=QUICK)


def loss_of(model, tokenizer, seed=1):
    losses = document_losses(model, tokenizer, load_documents(texts(20, seed=seed)), max_seq_length=32)
    return sum(loss.nll for loss in losses) / sum(loss.num_tokens for loss in losses)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "llama-mqa-tied"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_recovers_what_pruning_cost(tokenizer, name, method):
    dense, result = pruned(tokenizer, name)
    before, of_parent = weights(result.model), weights(dense)
    config = RecoveryConfig(method=method, distillation=0.5, **SMALL)
    outcome = recover(result.model, texts(), config, tokenizer=tokenizer, teacher=dense, plan=result.plan)
    assert loss_of(outcome.model, tokenizer) < loss_of(result.model, tokenizer) - 0.1
    assert same(result.model, before)
    assert same(dense, of_parent)
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
    dense, result = pruned(tokenizer)
    attention = result.model.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight[:, 3] = 0  # an input that a threshold pruned, of one projection alone
        attention.o_proj.weight[5] = 0
    options = {"method": method, **SMALL}
    outcome = recover(result.model, texts(), RecoveryConfig(**options), tokenizer=tokenizer, teacher=dense)
    trained = outcome.model.model.layers[1].self_attn
    assert outcome.history.best_step > 0
    assert not trained.q_proj.weight[:, 3].any()
    assert not trained.o_proj.weight[5].any()
    assert trained.k_proj.weight[:, 3].all()
    assert count_zeros(outcome.model) == count_zeros(result.model)
    assert not torch.equal(trained.q_proj.weight[:, 4], attention.q_proj.weight[:, 4])


def test_adapters_of_transposed_layers_keep_zeros_too(tokenizer):
    _, result = pruned(tokenizer, "gpt2")
    given = result.model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        given.weight[3], given.weight[:, 7] = 0, 0  # [in, out]
    outcome = recover(result.model, texts(), RecoveryConfig(method="lora", **SMALL), tokenizer=tokenizer)
    trained = outcome.model.transformer.h[0].mlp.c_fc
    assert outcome.history.best_step > 0
    assert not trained.weight[3].any()
    assert not trained.weight[:, 7].any()
    assert not torch.equal(trained.weight[4], given.weight[4])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_that_require_no_gradient_stay(tokenizer, method):
    _, result = pruned(tokenizer)
    for name, parameter in result.model.named_parameters():
        parameter.requires_grad_("layers.0." not in name)
    before = weights(result.model)
    outcome = recover(result.model, texts(), RecoveryConfig(method=method, **SMALL), tokenizer=tokenizer)
    assert outcome.history.best_step > 0
    moved = {name for name, value in outcome.model.state_dict().items() if not torch.equal(value, before[name])}
    assert "model.layers.1.mlp.up_proj.weight" in moved
    assert not [name for name in moved if "layers.0." in name]


def test_lora_without_a_layer_to_adapt(tokenizer):
    _, result = pruned(tokenizer)
    for name, parameter in result.model.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(ConfigError, match="method='lora' finds no linear layer to adapt beside"):
        recover(result.model, texts(), RecoveryConfig(method="lora", **SMALL), tokenizer=tokenizer)


def test_biases_of_rows_that_are_zero_stay_zero(tokenizer):
    dense, result = pruned(tokenizer, "gpt2")
    layer = result.model.transformer.h[0]
    with torch.no_grad():
        layer.attn.c_proj.weight[:, 5] = 0
        layer.attn.c_proj.bias[[5, 6]] = 0  # 6: a bias that is zero by chance learns
    outcome = recover(result.model, texts(), RecoveryConfig(**SMALL), tokenizer=tokenizer, teacher=dense)
    trained = outcome.model.transformer.h[0].attn.c_proj
    assert outcome.history.best_step > 0
    assert not trained.weight[:, 5].any()
    assert trained.bias[5] == 0
    assert trained.bias[6] != 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_variable_width_model_saves_and_reloads(tokenizer, method, tmp_path):
    dense, result = pruned(tokenizer, mlp_ratio=None, pruning_ratio=0.2, allocation="adaptive", reconstruction="none")
    assert not result.native_fit.fits
    config = RecoveryConfig(method=method, max_steps=4, **SMALL)
    outcome = recover(result.model, texts(), config, tokenizer=tokenizer, teacher=dense)
    result.model = outcome.model
    from hf_context_prune import load_pruned

    again = load_pruned(result.save_pretrained(tmp_path / "out"))
    assert same(again, weights(outcome.model))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_gets_worse_is_not_kept(tokenizer, method):
    _, result = pruned(tokenizer)
    good = recover(result.model, texts(), RecoveryConfig(num_epochs=2, **SMALL), tokenizer=tokenizer)  # not to be luck
    config = RecoveryConfig(**SMALL | {"method": method, "learning_rate": 30.0, "distillation": 0.0, "patience": 1})
    outcome = recover(good.model, texts(), config, tokenizer=tokenizer)
    assert outcome.history.best_step == 0
    assert outcome.history.ended in ("1 measurements in a row did not fall", "the loss is no longer a number")
    if method == "full":
        assert same(outcome.model, weights(good.model))
    assert loss_of(outcome.model, tokenizer) == pytest.approx(loss_of(good.model, tokenizer), abs=1e-5)


def test_a_loss_that_falls_again_goes_on():
    """At its peak the learning rate first makes a repaired model worse."""
    losses, counts = [1.0, 1.5, 1.4, 1.3, 1.3, 1.35, 0.9], []
    progress = training._Progress(tiny_model("llama"), RecoveryConfig(), 9, 0.0, iter(losses).__next__, 0.0)
    for step in range(len(losses)):
        progress.look(step)
        counts.append(progress.without_gain)
    assert counts == [0, 1, 0, 0, 1, 2, 0]
    assert (progress.best, progress.history.best_step) == (0.9, 6)


def test_a_loss_that_stays_ends_it(tokenizer):
    _, result = pruned(tokenizer)
    config = RecoveryConfig(**SMALL | {"learning_rate": 1e-12, "patience": 2})  # too small for any weight to move
    outcome = recover(result.model, texts(), config, tokenizer=tokenizer)
    assert outcome.history.ended == "2 measurements in a row did not fall"
    assert outcome.history.best_step == 0


def test_a_loss_that_is_no_number_ends_it(tokenizer, monkeypatch):
    _, result = pruned(tokenizer)
    monkeypatch.setattr(training, "token_loss", lambda logits, *_, **__: logits.sum() * float("nan"))
    outcome = recover(result.model, texts(), RecoveryConfig(distillation=0.0, **SMALL), tokenizer=tokenizer)
    assert outcome.history.ended == "the loss is no longer a number"
    assert outcome.history.best_step == 0
    assert same(outcome.model, weights(result.model))


@pytest.mark.parametrize("better", [True, False])
def test_an_interrupt_keeps_what_was_gained(tokenizer, monkeypatch, better):
    _, result = pruned(tokenizer)
    before = weights(result.model)
    look, loss = training._Progress.look, training.token_loss
    monkeypatch.setattr(training._Progress, "look", lambda self, step: (step and not better) or look(self, step))
    steps = []

    def interrupted(*given, **how):
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return loss(*given, **how)

    monkeypatch.setattr(training, "token_loss", interrupted)
    config = RecoveryConfig(distillation=0.0, **SMALL)
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

    _, result = pruned(tokenizer)
    monkeypatch.setattr(training._RecoveryTrainer, "create_scheduler", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover(result.model, texts(), RecoveryConfig(distillation=0.0, **SMALL), tokenizer=tokenizer)


def test_the_same_seed_gives_the_same(tokenizer):
    dense, result = pruned(tokenizer)
    runs = [
        recover(
            result.model,
            texts(),
            RecoveryConfig(recovery_seed=seed, max_steps=6, **SMALL),
            tokenizer=tokenizer,
            teacher=dense,
        )
        for seed in (0, 0, 1)
    ]
    assert same(runs[0].model, weights(runs[1].model))
    assert runs[0].history.losses == runs[1].history.losses
    assert not same(runs[0].model, weights(runs[2].model))


def test_time_ends_it_and_measuring_counts(tokenizer, monkeypatch):
    _, result = pruned(tokenizer)
    now = [0.0]

    def clock():
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr(training.time, "monotonic", clock)
    config = RecoveryConfig(distillation=0.0, max_minutes=1.0, **SMALL)
    outcome = recover(result.model, texts(), config, tokenizer=tokenizer)
    history = outcome.history
    assert history.ended == "the time was up"
    assert 30 < history.seconds < 66  # the clock ticks in coarse steps
    assert 0 < history.steps < 60
    assert history.losses[-1][0] == history.steps  # the last weights were measured too
    assert len(history.losses) > 2
    run_module = sys.modules["hf_context_prune.training.recovery.recover"]
    losses = run_module.document_losses

    def slow(*given, **how):
        now[0] += 7.0  # over a tenth of the time
        return losses(*given, **how)

    monkeypatch.setattr(run_module, "document_losses", slow)
    history = recover(result.model, texts(), config, tokenizer=tokenizer).history
    assert [step for step, _ in history.losses] == [0, history.steps]
    assert history.steps > 0


def test_frozen_weights_and_half_precision_stay(tokenizer):
    dense, result = pruned(tokenizer)
    model = result.model.bfloat16()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = weights(model)
    outcome = recover(model, texts(), RecoveryConfig(max_steps=8, **SMALL), tokenizer=tokenizer, teacher=dense)
    after = outcome.model.state_dict()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert not outcome.model.model.embed_tokens.weight.requires_grad
    assert outcome.model.model.rotary_emb.inv_freq.dtype == torch.float32 or model.dtype == torch.bfloat16


def test_the_teacher_of_a_smaller_vocabulary():
    tokenizer = shared_tokenizer("smollm2")
    dense = model_for("llama", tokenizer)
    # Without a repair: refitted rows fit this little domain better than a random teacher could teach it.
    small = {"num_calibration_samples": 16, "max_seq_length": 32, "reconstruction": "none"}
    config = PrunerConfig(vocab_size=256, mlp_ratio=0.5, **small)
    result = prune(dense, documents(), config, tokenizer=tokenizer, evaluation=QUICK)
    teacher = teacher_of(dense, result.plan, result.model)
    kept = result.plan.vocabulary.kept
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = dense(input_ids=torch.tensor(result.plan.vocabulary.to_old(ids[0].tolist()))[None]).logits[
            ..., list(kept)
        ]
        torch.testing.assert_close(teacher(input_ids=ids).logits.float(), expected, atol=0.2, rtol=0.05)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    outcome = recover(
        result.model, documents(), RecoveryConfig(**SMALL), tokenizer=result.tokenizer, teacher=dense, plan=result.plan
    )
    assert outcome.history.best_step > 0
    with pytest.raises(ConfigError, match=r"teacher has 392 tokens, and the model 256"):
        teacher_of(dense, None, result.model)


def test_rewinding_starts_from_the_parents_values(tokenizer):
    dense, result = pruned(tokenizer)
    ticket = apply_plan(dense, result.plan)
    assert not same(result.model, weights(ticket))
    config = RecoveryConfig(**SMALL | {"rewind": "pretrained", "max_steps": 1, "learning_rate": 1e-30})
    outcome = recover(result.model, texts(), config, tokenizer=tokenizer, teacher=dense, plan=result.plan)
    assert same(outcome.model, weights(ticket))
    with pytest.raises(PlanError, match="very model that was pruned"):
        recover(
            result.model, texts(), config, tokenizer=tokenizer, teacher=tiny_model("llama", seed=5), plan=result.plan
        )
    with pytest.raises(ConfigError, match="needs the plan"):
        recover(result.model, texts(), config, tokenizer=tokenizer, teacher=dense)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss(share, temperature):
    generator = torch.Generator().manual_seed(0)
    logits, wanted = (torch.randn(7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, 11, (7,), generator=generator)
    p, q = (wanted / temperature).softmax(-1), (logits / temperature).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean() * temperature**2
    expected = (1 - share) * functional.cross_entropy(logits, targets) + share * divergence
    got = token_loss(logits, targets, wanted, distillation=share, temperature=temperature)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    assert float(token_loss(logits, targets, None, distillation=share, temperature=temperature)) == pytest.approx(
        float(functional.cross_entropy(logits, targets)), rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_gradient_of_the_loss(share, temperature, dtype):
    generator = torch.Generator().manual_seed(0)
    logits, wanted = (torch.randn(70, 11, generator=generator).to(dtype) for _ in range(2))  # several chunks
    targets = torch.randint(0, 11, (70,), generator=generator)
    got = logits.clone().requires_grad_()
    (3 * token_loss(got, targets, wanted, distillation=share, temperature=temperature)).backward()
    by_autograd = logits.double().requires_grad_()
    divergence = functional.kl_div(
        (by_autograd / temperature).log_softmax(-1),
        (wanted.double() / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    loss = (1 - share) * functional.cross_entropy(by_autograd, targets) + share * temperature**2 * divergence
    (3 * loss).backward()
    assert got.grad.dtype == dtype
    torch.testing.assert_close(
        got.grad.double(), by_autograd.grad, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6
    )


def test_what_is_no_number_from_the_start(tokenizer):
    dense, result = pruned(tokenizer, "llama")
    config = RecoveryConfig(**SMALL)
    dense.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(NumericsError, match=r"lm_head\.weight holds NaN"):
        recover(result.model, texts(), config, tokenizer=tokenizer, teacher=dense, plan=result.plan)
    with pytest.raises(ConfigError, match="teacher is on the meta device"):
        recover(result.model, texts(), config, tokenizer=tokenizer, teacher=dense.to("meta"), plan=result.plan)
    result.model.lm_head.weight.data *= 1e38
    with pytest.raises(NumericsError, match="loss"):
        recover(result.model, texts(), RecoveryConfig(**SMALL, distillation=0), tokenizer=tokenizer)


def test_what_is_refused_before_any_work(tokenizer):
    _, result = pruned(tokenizer)
    model = result.model
    before = weights(model)
    with pytest.raises(ConfigError, match=r"need the dense parent: pass teacher="):
        recover(model, texts(), RecoveryConfig(distillation=0.5), tokenizer=tokenizer)
    with pytest.raises(DataError, match="at least 2"):
        recover(model, ["one text"], RecoveryConfig(distillation=0.0), tokenizer=tokenizer)
    broken = tiny_model("llama")
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"lm_head\.weight"):
        recover(broken, texts(), RecoveryConfig(distillation=0.0), tokenizer=tokenizer)
    with pytest.raises(UnsupportedArchitectureError, match="meta device"):
        recover(tiny_model("llama").to("meta"), texts(), RecoveryConfig(distillation=0.0), tokenizer=tokenizer)
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(UnsupportedArchitectureError, match="Merge or unload it first"):
        recover(wrapped.get_base_model(), texts(), RecoveryConfig(distillation=0.0), tokenizer=tokenizer)
    assert same(model, before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "qlora"}, "Unknown method 'qlora'; allowed are full, lora"),
        ({"rewind": "random"}, "Unknown rewind 'random'"),
        ({"distillation": 1.5}, r"distillation is 1.5; it must be a share in \[0, 1\]"),
        ({"distillation": float("nan")}, "distillation is nan"),
        ({"temperature": 0}, "temperature is 0; it must be a number above 0"),
        ({"learning_rate": -1e-3}, r"learning_rate is -0.001"),
        ({"max_minutes": 0}, "max_minutes is 0"),
        ({"num_epochs": True}, "num_epochs is True"),
        ({"max_steps": 0}, "max_steps is 0; it must be an integer of at least 1"),
        ({"batch_size": 2.0}, r"batch_size is 2.0"),
        ({"max_seq_length": 4}, "at least 8"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ConfigError, match=said):
        RecoveryConfig(**options)


def test_options_as_a_mapping():
    config = RecoveryConfig(method="lora", max_minutes=3)
    assert RecoveryConfig.from_dict(config.to_dict()) == config
    assert (config.peak_learning_rate, RecoveryConfig(learning_rate=1e-5).peak_learning_rate) == (2e-3, 1e-5)
    with pytest.raises(ConfigError, match="Did you mean 'patience'"):
        RecoveryConfig.from_dict({"patients": 3})


@pytest.mark.parametrize(("batch_size", "length"), [(3, 512), (5, 512), (6, 300), (1, 32)])
def test_a_step_has_the_blocks_that_were_asked_for(batch_size, length, tokenizer, monkeypatch):
    model = tiny_model("llama", max_position_embeddings=512)
    sizes = []
    original = training.token_loss
    monkeypatch.setattr(
        training, "token_loss", lambda logits, *a, **k: sizes.append(len(logits)) or original(logits, *a, **k)
    )
    config = RecoveryConfig(distillation=0.0, batch_size=batch_size, max_seq_length=length, max_steps=2, evaluations=1)
    outcome = recover(model, texts(400), config, tokenizer=tokenizer)
    assert sum(sizes) == outcome.history.steps * batch_size * (length - 1) == 2 * batch_size * (length - 1)
    assert outcome.history.tokens == 2 * batch_size * length


def test_epochs_are_as_many_as_asked_and_tokens_are_counted(tokenizer):
    _, result = pruned(tokenizer)
    config = RecoveryConfig(distillation=0.0, num_epochs=3, patience=99, **SMALL)
    history = recover(result.model, texts(9), config, tokenizer=tokenizer).history
    blocks = history.tokens // 32 // 3
    assert history.tokens == 3 * 32 * blocks
    assert history.steps == 3 * -(-blocks // 4)


def test_the_callers_random_numbers_are_left_alone(tokenizer):
    _, result = pruned(tokenizer)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for method in ("full", "lora"):
        recover(
            result.model,
            texts(),
            RecoveryConfig(distillation=0.0, method=method, max_steps=2, **SMALL),
            tokenizer=tokenizer,
        )
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_frozen_teacher_freezes_nothing(tokenizer):
    dense, result = pruned(tokenizer)
    config = RecoveryConfig(rewind="pretrained", max_steps=4, **SMALL)
    dense.requires_grad_(False)
    outcome = recover(result.model, texts(), config, tokenizer=tokenizer, teacher=dense, plan=result.plan)
    assert outcome.history.best_step > 0
    assert all(parameter.requires_grad for parameter in outcome.model.parameters())
    with pytest.raises(ConfigError, match="No weight of the model requires a gradient"):
        recover(
            result.model.requires_grad_(False), texts(), config, tokenizer=tokenizer, teacher=dense, plan=result.plan
        )


def withheld_loss(model, tokenizer, config):
    """As recover measures, on the documents that it withholds."""
    _, withheld, docs = run._withheld(load_documents(texts(), tokenizer=tokenizer), tokenizer, config)
    losses = document_losses(model, tokenizer, withheld, max_seq_length=config.max_seq_length, docs=docs)
    return sum(loss.nll for loss in losses)


@pytest.mark.parametrize("rate", [1e-9, 1e-5, 3e-5, 3e-3])
def test_what_rounding_takes_is_measured(tokenizer, rate):
    _, result = pruned(tokenizer)
    model = result.model.bfloat16()
    config = RecoveryConfig(**SMALL | {"max_steps": 3, "learning_rate": rate})
    outcome = recover(model, texts(), config, tokenizer=tokenizer)
    given, got = (withheld_loss(each, tokenizer, config) for each in (model, outcome.model))
    assert got < given if outcome.history.best_step else got == given
    assert bool(outcome.history.best_step) or rate < 3e-3


def test_rounding_that_leaves_no_numbers_gives_back_what_was_given(tokenizer, monkeypatch):
    def losses(model, *given, **how):
        seen.append(model.dtype)
        if seen.count(torch.bfloat16) == 2:  # the first time it is what was given
            raise NumericsError("inf")
        return document_losses(model, *given, **how)

    seen = []
    _, result = pruned(tokenizer)
    model = result.model.bfloat16()
    monkeypatch.setattr(run, "document_losses", losses)
    outcome = recover(model, texts(), RecoveryConfig(max_steps=6, **SMALL), tokenizer=tokenizer)
    assert seen[0] == seen[-1] == torch.bfloat16
    assert outcome.history.best_step == 0
    assert same(outcome.model, weights(model))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": {"max_steps": 3}}, "config is a dict; it must be a RecoveryConfig"),
        ({"plan": {}}, "plan is a dict"),
        ({"teacher": "base"}, "teacher is a str"),
        ({"tokenizer": None}, "tokenizer is a NoneType; it must be the model's tokenizer"),
    ],
)
def test_arguments_of_other_types(tokenizer, options, said):
    with pytest.raises(ConfigError, match=said):
        recover(tiny_model("llama"), texts(), **{"tokenizer": tokenizer} | options)


def test_a_forward_that_was_set_on_the_model_does_not_run_the_model(tokenizer):
    _, result = pruned(tokenizer)
    model, forward = result.model, result.model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: forward(*args, **kwargs), model)  # as TRL does
    before = weights(model)
    recovered = recover(model, texts(), RecoveryConfig(max_steps=20, **SMALL), tokenizer=tokenizer)
    assert recovered.history.best_step > 0
    assert same(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_trains_in_one_process_on_the_first_gpu(tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1, and leave the device out"):
        check_output_folder(types.SimpleNamespace(device=torch.device("cuda:1")))
    check_output_folder(types.SimpleNamespace(device=torch.device("cuda:0")))
    monkeypatch.setattr("hf_context_prune.training.recovery.recover.num_processes", lambda: 2)
    with pytest.raises(ConfigError, match="in one process, and here are 2"):
        recover(tiny_model("llama"), texts(), RecoveryConfig(max_steps=2, **SMALL), tokenizer=tokenizer)
