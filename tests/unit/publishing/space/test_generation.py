"""Two models in turns: what they write, when they stop, and what is refused."""

from __future__ import annotations

import threading

import pytest
import torch

from hf_context_prune import load_model
from hf_context_prune.errors import ConfigError
from hf_context_prune.publishing.space.generation import CHAT, CONTINUE, Progress, Request, Runner, Turn, _Draw, race
from hf_context_prune.publishing.space.settings import Limits

LIMITS = Limits(new_tokens=40)


@pytest.fixture(scope="module")
def loaded(tiny_space):
    return load_model(tiny_space / "base"), load_model(tiny_space / "variable")


def test_each_writes_what_generate_writes(loaded):
    request = Request("the court finds that", new_tokens=12)
    runners = [Runner(model, request, LIMITS) for model in loaded]
    *_, last = race(runners, seconds=60)
    for model, progress in zip(loaded, last, strict=True):
        inputs = model.tokenizer(request.prompt, return_tensors="pt")
        ids = model.model.generate(**inputs, max_new_tokens=12, do_sample=False, repetition_penalty=1.15)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert progress.text == model.tokenizer.decode(new, skip_special_tokens=True)
        assert (progress.tokens, progress.stopped) == (12, "length")
        assert 0 < progress.first_seconds <= progress.seconds
        assert progress.tokens_per_second > 0


def test_an_answer_goes_through_the_chat_template(loaded):
    runner = Runner(loaded[0], Request("the dose", mode=CHAT, new_tokens=1), LIMITS)
    assert loaded[0].tokenizer.decode(runner._ids[0]) == "<s>the dose"


def test_each_model_reads_its_own_answers(loaded):
    turns = (Turn("the court", "finds", "owes"),)
    for kind, answer in (("dense", "finds"), ("pruned", "owes")):
        request = Request("the dose", mode=CHAT, new_tokens=1, turns=turns)
        runner = Runner(loaded[0], request, LIMITS, kind)
        assert loaded[0].tokenizer.decode(runner._ids[0]) == f"<s>the court<s>{answer}<s>the dose"
    assert Request("the dose", new_tokens=8, turns=turns).checked(LIMITS).turns == ()  # a text has no conversation
    with pytest.raises(ConfigError, match=r"at most 472\. Begin a new chat"):
        Runner(loaded[0], Request("the", mode=CHAT, new_tokens=40, turns=turns * 99), LIMITS)


def test_drawn_tokens_are_the_same_again(loaded):
    texts = set()
    for _ in range(2):
        *_, last = race([Runner(loaded[0], Request("the", new_tokens=8, temperature=1.0), LIMITS)], seconds=60)
        texts.add(last[0].text)
    assert len(texts) == 1


def test_the_end_of_the_text_ends_it(loaded, monkeypatch):
    monkeypatch.setattr(loaded[0].model.generation_config, "eos_token_id", list(range(320)))
    runner = Runner(loaded[0], Request("the court", new_tokens=20), LIMITS)
    *_, last = race([runner], seconds=60)
    assert (last[0].tokens, last[0].stopped) == (1, "end")


class Paced:
    """Takes a set time for a step."""

    def __init__(self, seconds, tokens):
        self.progress, self._seconds, self._tokens = Progress(), seconds, tokens

    def step(self):
        done = self.progress.tokens + 1
        stopped = "length" if done == self._tokens else ""
        self.progress = Progress("x" * done, done, self._seconds, done * self._seconds, stopped)

    stop = Runner.stop

    def close(self):
        """Nothing runs."""


def test_the_faster_one_is_let_ahead():
    views = list(race([Paced(2.0, 10), Paced(1.0, 10)], seconds=1_000))
    at = next(fast.tokens for slow, fast in views if slow.tokens == 4)
    assert at == 6  # the same time each: 3 to 4 slow steps
    assert [view.stopped for view in views[-1]] == ["length", "length"]


def test_the_deadline_holds_between_tokens():
    now = iter(range(1_000))
    *_, last = race([Paced(1, 100), Paced(1, 100)], seconds=7, clock=lambda: next(now))
    assert [progress.stopped for progress in last] == ["time", "time"]
    assert sum(progress.tokens for progress in last) == 6


def test_nobody_asking_means_no_steps(loaded):
    steps = []
    runner = Runner(loaded[0], Request("the court", new_tokens=30), LIMITS)
    real = runner.step
    runner.step = lambda: (steps.append(1), real())
    running = race([runner], seconds=60)
    next(running)
    next(running)
    running.close()
    assert len(steps) == 2


def test_leaving_ends_the_threads(loaded):
    before = threading.active_count()
    running = race([Runner(model, Request("the court", new_tokens=30), LIMITS) for model in loaded], seconds=60)
    for _ in range(4):
        next(running)
    assert threading.active_count() == before + 2
    del running  # as a server does that forgets a visitor
    assert threading.active_count() == before


def test_a_turn_that_nobody_asks_for_ends_the_writing(loaded):
    runner = Runner(loaded[0], Request("the court", new_tokens=30), Limits(new_tokens=40, seconds=1))
    runner.step()
    runner._thread.join(timeout=60)
    assert not runner._thread.is_alive()
    assert runner.progress.tokens == 1


def test_a_failure_of_the_model_reaches_the_caller(loaded):
    hook = loaded[0].model.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            list(race([Runner(loaded[0], Request("the court", new_tokens=3), LIMITS)], seconds=60))
    finally:
        hook.remove()


def test_the_rules_of_a_repository_do_not_count(loaded, monkeypatch):
    def text():
        *_, last = race([Runner(loaded[0], Request("the court", new_tokens=8), LIMITS)], seconds=60)
        return last[0].text

    plain, config = text(), loaded[0].model.generation_config
    for name, value in (("do_sample", True), ("no_repeat_ngram_size", 1), ("suppress_tokens", list(range(300)))):
        monkeypatch.setattr(config, name, value)
    assert text() == plain
    assert loaded[0].model.generation_config is config


def test_draws_have_the_probabilities_of_the_scores():
    draw, scores = _Draw(torch.device("cpu")), torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log()
    counts = torch.zeros(4)
    for _ in range(2000):
        counts[draw(torch.zeros(1, 0), scores).argmax()] += 1
    assert (counts / 2000 - scores.exp()[0]).abs().max() < 0.04
    assert counts[3] == 0


REFUSED = (
    (Request(""), "no text"),
    (Request(" \n"), "no text"),
    (Request(None), "no text"),
    (Request("x" * 4_001), "4,001 characters.*at most 4,000"),
    (Request("x", mode="eval"), "mode"),
    (Request("x", new_tokens=0), "from 1 to 40"),
    (Request("x", new_tokens=10**9), "from 1 to 40"),
    (Request("x", new_tokens=True), "from 1 to 40"),
    (Request("x", new_tokens="8"), "from 1 to 40"),
    (Request("x", new_tokens=9, temperature=float("nan")), "from 0 to 1.5"),
    (Request("x", new_tokens=9, temperature=-1), "from 0 to 1.5"),
    (Request("x", new_tokens=9, temperature=9), "from 0 to 1.5"),
)


def test_what_is_refused(subtests):
    for asked, message in REFUSED:
        with subtests.test(message=message, asked=str(asked)[:80]), pytest.raises(ConfigError, match=message):
            asked.checked(LIMITS)


def test_prompts_that_a_model_has_no_room_for(loaded):
    long = "the court finds that " * 150
    with pytest.raises(ConfigError, match="at most 472"):  # 512 positions, less what is to be written
        Runner(loaded[0], Request(long, new_tokens=40), LIMITS)
    with pytest.raises(ConfigError, match="at most 16"):
        Runner(loaded[0], Request(long, new_tokens=40), Limits(prompt_tokens=16))
    with pytest.raises(ConfigError, match="at most 0"):
        Runner(loaded[0], Request("the", new_tokens=600), LIMITS)


def test_no_chat_template(loaded):
    tokenizer = loaded[0].tokenizer
    before, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ConfigError, match="no chat template"):
            Runner(loaded[0], Request("the", mode=CHAT), LIMITS)
        Runner(loaded[0], Request("the", mode=CONTINUE), LIMITS)
    finally:
        tokenizer.chat_template = before


def test_shared_weights_are_only_read(loaded):
    before = [parameter.clone() for parameter in loaded[0].model.parameters()]
    list(race([Runner(loaded[0], Request("the dose", new_tokens=5), LIMITS)], seconds=60))
    assert all(torch.equal(a, b) for a, b in zip(before, loaded[0].model.parameters(), strict=True))
