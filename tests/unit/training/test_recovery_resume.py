"""A training that was killed goes on from its last measured state, to the same bits; and how time counts."""

from __future__ import annotations

import pytest

from hf_context_prune.errors import ConfigError
from hf_context_prune.training.recovery import monitor, training
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.training.recovery.recover import recover
from tests.support.marks import TINY_TEXT
from tests.support.runs import same_weights
from tests.support.tiny import case, texts

pytestmark = TINY_TEXT

SMALL = {"max_seq_length": 32, "learning_rate": 3e-3}


class Killed(BaseException):
    """What no `except Exception` sees, as a kill."""


@pytest.mark.parametrize(
    ("family", "options", "kills"),
    [
        ("gpt2", {"num_epochs": 2.5}, 3),  # with dropout, several epochs, and two micro-batches a step
        ("llama", {"method": "lora", "lora_rank": 4}, 1),
        ("llama-mqa-tied", {"learning_rate": 0.3, "early_stopping_patience": 9}, 1),  # the best weights are the first
    ],
)
def test_a_killed_training_goes_on_to_the_same_bits(tokenizer, tmp_path, monkeypatch, family, options, kills, subtests):
    monkeypatch.setattr(training, "MICRO_BATCH_TOKENS", 64)
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1} if family == "gpt2" else {}
    model = case(family, **dropout)
    config = RecoveryConfig(**SMALL | {"num_evals": 4} | options)
    text = texts(12)
    whole = recover(model, text, config, tokenizer=tokenizer)
    loss, total = training._RecoveryTrainer.compute_loss, whole.history.tokens // 64
    measured = [step for step, _ in whole.history.losses]
    boundary = measured[1] * 2 + 1  # of the micro-batches, the first behind a kept state
    for call in (total // 2 + 2, boundary, total)[:kills]:
        folder, calls = tmp_path / str(call), []
        folder.mkdir()

        def stop(*given, until=call, seen=calls, **how):
            seen.append(1)
            if len(seen) == until:
                raise Killed
            return loss(*given, **how)

        with subtests.test(call=call):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training._RecoveryTrainer, "compute_loss", stop)
                with pytest.raises(Killed):
                    recover(model, text, config, tokenizer=tokenizer, resume_dir=folder)
            again = recover(model, text, config, tokenizer=tokenizer, resume_dir=folder)
            assert same_weights(again.model, whole.model)
            assert again.history.losses == whole.history.losses
            assert again.history.tokens == whole.history.tokens
            assert again.history.steps == whole.history.steps
            assert again.history.best_step == whole.history.best_step
            once_more = recover(model, text, config, tokenizer=tokenizer, resume_dir=folder)  # it has ended
            assert same_weights(once_more.model, whole.model)
            assert once_more.history.losses == again.history.losses
            assert [path.name for path in folder.iterdir()] == ["recovery.safetensors"]


def test_a_state_of_other_inputs_is_not_taken(tokenizer, tmp_path):
    model, options = case("llama"), {"tokenizer": tokenizer, "resume_dir": tmp_path}
    recover(model, texts(), RecoveryConfig(max_steps=4, **SMALL), **options)
    for text, more in ((texts(), {"recovery_seed": 1}), (texts(seed=7), {}), (texts(), {"max_steps": 5})):
        config = RecoveryConfig(**{"max_steps": 4, **SMALL} | more)
        resumed, fresh = (recover(model, text, config, **options | {"resume_dir": one}) for one in (tmp_path, None))
        assert same_weights(resumed.model, fresh.model)
        assert resumed.history.steps == config.max_steps


def test_used_time_counts_on(tokenizer, tmp_path, monkeypatch):
    now, loss, calls = [0.0], training._RecoveryTrainer.compute_loss, []

    def clock():
        now[0] += 0.5
        return now[0]

    def stop(*given, **how):
        calls.append(1)
        if len(calls) == 8:
            now[0] += 500.0  # between the two runs
            raise Killed
        return loss(*given, **how)

    monkeypatch.setattr(monitor.time, "monotonic", clock)
    monkeypatch.setattr(training._RecoveryTrainer, "compute_loss", stop)
    config = RecoveryConfig(max_minutes=1.0, **SMALL)
    options = {"tokenizer": tokenizer, "resume_dir": tmp_path}
    with pytest.raises(Killed):
        recover(case("llama"), texts(120), config, **options)
    history = recover(case("llama"), texts(120), config, **options).history
    assert history.ended == "the time was up"
    assert 30 < history.seconds < 66


def test_a_time_that_leaves_none_to_train_is_refused_before_the_first_step(tokenizer, monkeypatch):
    monkeypatch.setattr(training._RecoveryTrainer, "compute_loss", lambda *_, **__: pytest.fail("trained"))
    model = case("llama").bfloat16()
    with pytest.raises(
        ConfigError, match=r"1e-05 minutes \(max_minutes\), which is 0\.0006 s.*Give at least 0\.\d+ min"
    ):
        recover(model, texts(120), RecoveryConfig(max_minutes=1e-5, **SMALL), tokenizer=tokenizer)
