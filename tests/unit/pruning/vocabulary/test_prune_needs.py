"""What a smaller vocabulary may not lose, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_context_prune.data.documents import TextSource
from hf_context_prune.errors import (
    BudgetError,
    ConfigError,
    DataError,
    NumericsError,
    VocabularyError,
)
from hf_context_prune.pruning.vocabulary.checks import required_ids
from hf_context_prune.pruning.vocabulary.prune import VocabularyPruner, prune_vocabulary
from hf_context_prune.pruning.vocabulary.rebuild import read_table
from hf_context_prune.pruning.vocabulary.selection import VocabularySize
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import documents, model_for, shared_tokenizer
from tests.support.tiny_tokenizers import tokenizer_of

pytestmark = TINY_TEXT

CALLS = (
    "{% if tools %}the revenue {{ tools[0]['function']['name'] }} {% endif %}"
    "{% if documents %}rose {% endif %}{% if enable_thinking %} daily{% endif %}"
    "{% for turn in messages %}{% if turn.tool_calls %}the quarter {{ turn.tool_calls[0].function.name }}{% endif %}"
    "{% if turn.role == 'tool' %}the patient {% endif %}{{ turn.content }}{% endfor %}"
)
REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for turn in messages %}<|begin|>{{ turn['role'] }}, the quarter: {{ turn['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant, the quarter: {% endif %}"
)
DEFAULTS = (
    "{% if messages[0]['role'] != 'system' %}<|begin|>system\nrevenue rose daily<|end|>{% endif %}"
    "{% for turn in messages %}<|begin|>{{ turn['role'] }}\n{{ turn['content'] }}<|end|>\n{% endfor %}"
)
ONLY_USER = "{% if messages[1:] %}{{ raise_exception('one turn') }}{% endif %}revenue {{ messages[0]['content'] }}"
CONVERSATIONS = [
    [{"role": "user", "content": "the court"}],
    [{"role": "user", "content": "the court"}, {"role": "assistant", "content": "finds that"}],
]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (REFUSES, ["Ġquarter"]),
        (DEFAULTS, ["Ġrose", "Ġdaily"]),
        (ONLY_USER, ["revenue"]),
        ({"default": REFUSES, "tool_use": DEFAULTS}, ["Ġquarter", "Ġrose"]),
        ({"tool_use": DEFAULTS}, ["Ġrose"]),
        (CALLS, ["Ġrevenue", "rose", "Ġdaily", "Ġquarter", "Ġpatient"]),
    ],
    ids=["no-system", "default-system", "one-turn", "several", "no-default", "tools"],
)
def test_what_the_chat_template_writes_stays(template, words):
    tokenizer = tokenizer_of("llama3")
    model, table = model_for("llama", tokenizer), read_table(tokenizer)
    without = required_ids(model, tokenizer, table)
    tokenizer.chat_template = template
    contents = {table.contents[index] for index in required_ids(model, tokenizer, table) - without}
    assert contents >= set(words)
    trimmed = prune_vocabulary(model, tokenizer, documents(), vocab_coverage=1.0, pad_to_multiple_of=1, refit=False)
    assert trimmed.tokenizer.chat_template == template
    for name in template if isinstance(template, dict) else [None]:
        for turns in CONVERSATIONS[: 1 if template == ONLY_USER else 2]:
            old = tokenizer.apply_chat_template(turns, chat_template=name)["input_ids"]
            new = trimmed.tokenizer.apply_chat_template(turns, chat_template=name)["input_ids"]
            assert trimmed.plan.vocabulary.to_new(old) == new
            assert trimmed.tokenizer.decode(new) == tokenizer.decode(old)


BAD_ARGUMENTS = [
    ({"vocab_size": 100}, BudgetError, r"vocab_size is 100,.*\b262\b.*\b320\b"),
    ({"vocab_size": 468}, BudgetError, r"\b468\b.*\b467\b"),
    ({}, ConfigError, "vocab_size, vocab_coverage"),
    ({"vocab_size": 320, "vocab_coverage": 0.9}, ConfigError, "vocab_size, vocab_coverage"),
    ({"vocab_size": 0}, ConfigError, "vocab_size is 0"),
    ({"vocab_coverage": 1.5}, ConfigError, "vocab_coverage is 1.5"),
    ({"vocab_min_count": True}, ConfigError, "vocab_min_count is True"),
    ({"vocab_size": 320, "pad_to_multiple_of": 0}, ConfigError, "pad_to_multiple_of is 0"),
    ({"vocab_size": 320, "criterion": "often"}, ConfigError, "vocab_criterion"),
    ({"vocab_size": 320, "keep": ["court zebra"]}, VocabularyError, "'court zebra'"),
    ({"vocab_size": 320, "remove": ["Ġzebra"]}, VocabularyError, "'Ġzebra'"),
    ({"vocab_size": 320, "remove": ["<|end|>"]}, VocabularyError, r"'<\|end\|>' .*must stay"),
    ({"vocab_size": 320, "data": []}, DataError, "in-memory"),
    ({"vocab_size": 320, "data": ["", " "]}, DataError, "no text"),
    ({"vocab_size": 320, "data": TextSource.from_documents([], name="none")}, DataError, "none"),
]


def test_bad_arguments(subtests):
    tokenizer = shared_tokenizer("llama3")
    model = model_for("llama", tokenizer)
    for options, error, said in BAD_ARGUMENTS:
        with subtests.test(**options), pytest.raises(error, match=said):
            prune_vocabulary(model, tokenizer, **{"data": documents(), **options})


def test_no_day_of_a_template_is_lost():
    tokenizer = tokenizer_of("llama3")
    template = "Today: {{ strftime_now('%d %b %Y, %A %B') }}. {{ messages[0].content }}"
    tokenizer.chat_template = template
    trimmed = prune_vocabulary(
        model_for("llama", tokenizer), tokenizer, documents(), vocab_min_count=1, pad_to_multiple_of=1
    )
    for date in ("26 Jul 2024", "01 December", "Wednesday"):
        ids = tokenizer.encode(f"Today: {date}", add_special_tokens=False)
        assert None not in trimmed.plan.vocabulary.to_new(ids)


@pytest.mark.parametrize(("name", "where"), [("eos_token_id", "generation_config"), ("bos_token_id", "config")])
def test_another_tokenizer_with_ids_that_fit(name, where):
    tokenizer = shared_tokenizer("llama3")
    model = model_for("llama", tokenizer)
    ordinary = tokenizer.convert_tokens_to_ids("Ġcourt")
    setattr(getattr(model, where), name, ordinary)
    said = rf"{where}\.{name} is {ordinary}\b.*'Ġcourt'"
    with pytest.raises(VocabularyError, match=said):
        prune_vocabulary(model, tokenizer, documents(), vocab_size=320)


def word_piece():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


class Slow:
    pass


def test_models_and_tokenizers_that_do_not_fit():
    tokenizer = shared_tokenizer("llama3")
    size = {"vocab_size": 320}
    few = {"spare_rows": 300 - 467, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with pytest.raises(VocabularyError, match=r"460.*\b300\b"):
        prune_vocabulary(model_for("llama", tokenizer, **few), tokenizer, documents(), **size)
    with pytest.raises(VocabularyError, match=r"3,467.*\b466\b"):
        prune_vocabulary(model_for("llama", tokenizer, spare_rows=3_000), tokenizer, documents(), **size)
    with pytest.raises(VocabularyError, match=r"config\.pad_token_id is 470\b"):
        prune_vocabulary(model_for("llama", tokenizer, spare_rows=9, pad_token_id=470), tokenizer, documents(), **size)
    model = model_for("llama", tokenizer, spare_rows=9)
    model.generation_config.eos_token_id = [462, 471]
    with pytest.raises(VocabularyError, match=r"generation_config\.eos_token_id is 471"):
        prune_vocabulary(model, tokenizer, documents(), **size)
    model = model_for("llama", tokenizer)
    with pytest.raises(VocabularyError, match="WordPiece"):
        prune_vocabulary(model, word_piece(), documents(), **size)
    with pytest.raises(VocabularyError, match=r"\bSlow\b"):
        prune_vocabulary(model, Slow(), documents(), **size)
    with pytest.raises(VocabularyError, match="Qwen2Tokenizer"):
        prune_vocabulary(model_for("qwen2", tokenizer), tokenizer, documents(), **size)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        prune_vocabulary(model, tokenizer, documents(), **size)


def test_added_tokens_beyond_the_rows_stay_beyond_them():
    tokenizer = tokenizer_of("gemma")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    beyond = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    model = model_for("gemma3_text", tokenizer, spare_rows=-1)
    trimmed = prune_vocabulary(model, tokenizer, documents(), vocab_min_count=1, pad_to_multiple_of=8, refit=False)
    kept = trimmed.plan.vocabulary.kept
    assert beyond not in kept
    assert len(kept) == trimmed.model.config.vocab_size == trimmed.tokenizer.convert_tokens_to_ids("<image_soft_token>")
    text = "the court <image_soft_token> finds"
    old, new = tokenizer(text)["input_ids"], trimmed.tokenizer(text)["input_ids"]
    assert new == [len(kept) if index == beyond else trimmed.plan.vocabulary.new_ids[index] for index in old]
    assert trimmed.tokenizer.decode(new) == tokenizer.decode(old)


@pytest.mark.parametrize("kind", ["llama2", "llama2-metaspace", "gemma"])
def test_templates_that_surround_a_turn_with_spaces(kind):
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = "{% for m in messages %}the {{ m['content'] }} court{% endfor %}"
    model, table = model_for("llama", tokenizer), read_table(tokenizer)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "fell"}])["input_ids"]
    content = set(tokenizer("the fell")["input_ids"])
    assert set(ids) - content <= required_ids(model, tokenizer, table)


def test_templates_that_break(subtests):
    for template in ("{% for t in tools %}{{ t }}{% endfor %}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}"):
        with subtests.test(template):
            tokenizer = tokenizer_of("llama3")
            tokenizer.chat_template = template
            model = model_for("llama", tokenizer)
            trimmed = prune_vocabulary(model, tokenizer, documents(), vocab_size=320, refit=False)
            assert trimmed.tokenizer.chat_template == template


def test_padding_left_behind_by_a_call_and_sides():
    tokenizer = tokenizer_of("llama3")
    tokenizer.backend_tokenizer.enable_padding(pad_id=9999)
    tokenizer.padding_side = "left"
    trimmed = prune_vocabulary(model_for("llama", tokenizer), tokenizer, documents(), vocab_size=320, refit=False)
    assert trimmed.tokenizer.padding_side == "left"
    assert len(trimmed.tokenizer) == 320


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_models_with_few_positions(name):
    tokenizer = shared_tokenizer("gpt2")
    model = model_for(name, tokenizer, max_position_embeddings=64)
    trimmed = prune_vocabulary(model, tokenizer, documents(), vocab_size=320)
    assert trimmed.plan.provenance["vocabulary"]["refit"] is not None


def test_nothing_is_measured_for_what_is_refused(monkeypatch):
    tokenizer = shared_tokenizer("llama3")
    monkeypatch.setattr("hf_context_prune.pruning.vocabulary.prune.count_tokens", lambda *_: pytest.fail("counted"))
    pruner = VocabularyPruner(model_for("llama", tokenizer), tokenizer, documents())
    with pytest.raises(BudgetError, match="must stay"):
        pruner.trim(VocabularySize(10))


def test_the_least_that_is_named_can_be_had():
    tokenizer = shared_tokenizer("llama3")
    for multiple, named in ((250, 262), (150, 300)):  # twice 250 are all 467
        with pytest.raises(BudgetError, match=rf"Ask for (at least )?{named}\b"):
            prune_vocabulary(
                model_for("llama", tokenizer), tokenizer, documents(), vocab_size=10, pad_to_multiple_of=multiple
            )
    for size, multiple in ((262, 1), (300, 150)):
        trimmed = prune_vocabulary(
            model_for("llama", tokenizer), tokenizer, documents(), vocab_size=size, pad_to_multiple_of=multiple
        )
        assert len(trimmed.tokenizer) == size


def test_tokens_come_as_a_list(subtests):
    tokenizer = shared_tokenizer("llama3")
    model = model_for("llama", tokenizer)
    for name, value in itertools.product(("keep", "remove"), ("Ġcourt", None, 3)):
        with subtests.test(name=name, value=value), pytest.raises(VocabularyError, match=f"{value!r}.* list"):
            prune_vocabulary(model, tokenizer, documents(), vocab_size=320, **{name: value})
