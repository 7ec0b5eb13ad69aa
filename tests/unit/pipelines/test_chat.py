"""Conversations: what `generate` of transformers writes, with turns that are remembered while they fit."""

import itertools

import pytest
import torch

from hf_context_prune.errors import ConfigError, DataError
from hf_context_prune.pipelines import chat
from hf_context_prune.pipelines.chat import Conversation, answer_side_by_side, generate_tokens
from hf_context_prune.pipelines.sampling import Sampling
from hf_context_prune.storage.loading import LoadedModel
from tests.support.tiny import tiny_model, tiny_tokenizer

GREEDY = Sampling(max_new_tokens=12, temperature=0, repetition_penalty=1.0)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def loaded(template=None, family="llama", **overrides):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return LoadedModel(tiny_model(family, **overrides).eval(), tokenizer, "tiny", None, None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "mistral"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_generate(family, penalty):
    model = tiny_model(family).eval()
    prompt = [5, 9, 33, 7, 5]
    wanted = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=penalty,
    )[0, len(prompt) :].tolist()
    sampling = Sampling(max_new_tokens=12, temperature=0, repetition_penalty=penalty)
    got = list(generate_tokens(model, prompt, sampling, ends={2}))
    assert got == [token for token in wanted if token != 2]


def test_draws_follow_the_seed_and_leave_torchs_generator_alone():
    model, before = tiny_model("llama").eval(), torch.random.get_rng_state()

    def draw(seed):
        sampling = Sampling(max_new_tokens=20, temperature=1.5, seed=seed)
        return list(generate_tokens(model, [5, 9], sampling, ends=set()))

    assert draw(0) == draw(0) != draw(1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_text_is_continued_and_nothing_remembered():
    talk = Conversation(loaded(), GREEDY)
    assert not talk.answers
    first = list(talk.answer("the house"))
    assert len(first) > 1
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(first))
    assert list(talk.answer("the house")) == first


def test_turns_are_remembered_until_they_are_forgotten(monkeypatch):
    prompts = []

    def note(model, prompt, sampling, *, ends):
        prompts.append(tiny_tokenizer().decode(prompt))
        yield from tiny_tokenizer()("fine", add_special_tokens=False)["input_ids"]

    monkeypatch.setattr(chat, "generate_tokens", note)
    talk = Conversation(loaded(TEMPLATE), GREEDY)
    assert talk.answers
    list(talk.answer("one"))
    list(talk.answer("two"))
    assert "one" in prompts[1]
    assert "fine" in prompts[1]
    talk.forget()
    list(talk.answer("three"))
    assert "one" not in prompts[2]
    assert "two" not in prompts[2]


def test_the_oldest_turns_make_room(monkeypatch):
    lengths = []

    def note(model, prompt, sampling, *, ends):
        lengths.append(len(prompt))
        yield 5

    monkeypatch.setattr(chat, "generate_tokens", note)
    talk = Conversation(loaded(TEMPLATE), Sampling(max_new_tokens=40))
    for _ in range(8):
        list(talk.answer("the house and the garden"))
    assert max(lengths) <= 128 - 40
    assert lengths[-1] > lengths[0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="takes from 1 to 127"):
        list(Conversation(loaded(), GREEDY).answer("word " * 400))
    with pytest.raises(DataError, match="only 8 token rows"):
        list(Conversation(loaded(vocab_size=8), GREEDY).answer("the house"))


def test_a_template_that_refuses_says_how_to_go_on():
    talk = Conversation(loaded("{{ raise_exception('no users') }}"), GREEDY)
    with pytest.raises(ConfigError, match="--plain"):
        list(talk.answer("hello"))
    assert list(Conversation(loaded(TEMPLATE), GREEDY, plain=True).answer("hello")) == list(
        Conversation(loaded(), GREEDY).answer("hello")
    )


def test_side_by_side_each_writes_what_it_writes_alone():
    sampling = Sampling(max_new_tokens=15, temperature=0.9)
    models = [loaded(), loaded(seed=1)]
    alone = [list(Conversation(one, sampling).answer("the house"))[-1] for one in models]
    *_, together = answer_side_by_side([Conversation(one, sampling) for one in models], "the house")
    assert list(together) == alone
    assert alone[0] != alone[1]


def test_no_half_characters_are_shown(monkeypatch):
    """Bytes of one character that come as several tokens are shown once they are whole."""
    ids = tiny_tokenizer()("über", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(chat, "generate_tokens", lambda *_, **__: iter(ids))
    shown = list(Conversation(loaded(), GREEDY).answer("x"))
    assert shown[-1].strip() == "über"
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in shown)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("repetition_penalty", 0.5), ("seed", -1)],
)
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(ConfigError, match=name):
        Sampling(**{name: value})
