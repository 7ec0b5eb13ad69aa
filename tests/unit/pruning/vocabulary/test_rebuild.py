"""The two promises: text of kept tokens has the same tokens as before, and any text comes back as it did."""

from __future__ import annotations

import copy
import json
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, processors
from transformers import (
    AutoTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from hf_context_prune.errors import VocabularyError
from hf_context_prune.pruning.vocabulary.rebuild import build_state, order_ids, read_table, rebuild_tokenizer
from hf_context_prune.pruning.vocabulary.tokens import TokenTable
from tests.support.tiny_tokenizers import (
    ALL_KINDS,
    KINDS,
    SPECIAL,
    pieces_of,
    quick,
    qwen2_class,
    serialized,
    state_of,
    texts,
    tokenizer_of,
)

TEMPLATE = (
    "{% for turn in messages %}<|begin|>{{ turn['role'] }}\n{{ turn['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


def smaller_state(table, share, seed=0, also=()):
    """A random share of the tokens, with all that must stay: the order of their ids, and the JSON."""
    draw = random.Random(seed)
    some = [index for index in table.contents if draw.random() < share]
    order = order_ids(table, sorted(table.mandatory() | table.closed([*some, *also])))
    return order, build_state(table, order)


def assert_alike(tokenizer, smaller, order, text):
    """Exact where all tokens are kept; back to the same text always."""
    old, new = tokenizer.encode(text).ids, smaller.encode(text).ids
    if set(order).issuperset(old):
        assert [order[index] for index in new] == old
    for skip in (False, True):
        assert smaller.decode(new, skip_special_tokens=skip) == tokenizer.decode(old, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_exact_and_lossless(kind):
    tokenizer = Tokenizer.from_str(serialized(kind))
    table = TokenTable(json.loads(tokenizer.to_str()))

    @quick
    @given(
        several=st.lists(texts(table.contents.values()), min_size=1, max_size=12),
        share=st.sampled_from([0, 0, 0.1, 0.5, 0.9]),
        seed=st.integers(0, 999),
        keep_the_first=st.booleans(),
    )
    @example(["<0xE4>中", "\0", "e\u0301", "\u202eאב\u202c", " " * 500, "the " * 3000, "a" * 5000], 0, 0, False)
    @example(["<0xEC>ち", "zzz", "<0xC1>", "꿔мир право䗦v", "</s><s><unk>", "\u2581\u2581the court "], 0, 0, True)
    def check(several, share, seed, keep_the_first):
        also = tokenizer.encode(several[0]).ids if keep_the_first else ()
        order, state = smaller_state(table, share, seed, also)
        smaller = Tokenizer.from_str(json.dumps(state))
        for text in several:
            assert_alike(tokenizer, smaller, order, text)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_tokenizer_is_the_same_with_fewer_tokens(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    tokenizer.model_max_length = 77
    before, words = tokenizer.backend_tokenizer.to_str(), "the court finds naïve café 法院 🚀\n\n  zz<|begin|>"
    table = read_table(tokenizer)
    order, state = smaller_state(table, 0.4)
    smaller = rebuild_tokenizer(tokenizer, state)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert smaller.name_or_path == tokenizer.name_or_path
    smaller.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for made in (smaller, again):
        assert type(made) is type(tokenizer)
        assert len(made) == len(order)
        assert made.model_max_length == 77
        assert made.special_tokens_map == tokenizer.special_tokens_map
        assert made.all_special_ids == [order.index(index) for index in tokenizer.all_special_ids]
        assert made.get_vocab() == {table.contents[old]: new for new, old in enumerate(order)}
        assert_alike(tokenizer.backend_tokenizer, made.backend_tokenizer, order, words)
    assert again.backend_tokenizer.to_str() == smaller.backend_tokenizer.to_str()


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_refused_as_before(kind):
    tokenizer = tokenizer_of(kind)
    smaller = rebuild_tokenizer(tokenizer, smaller_state(read_table(tokenizer), 0)[1])
    for text in ("\ud83d", "a\udc00b"):
        with pytest.raises(Exception) as first:
            tokenizer.encode(text)
        with pytest.raises(first.type) as second:
            smaller.encode(text)
        assert str(second.value) == str(first.value)


def test_bytes_that_have_no_token_are_not_invented():
    tokenizer = tokenizer_of("smollm2")
    smaller = rebuild_tokenizer(tokenizer, smaller_state(read_table(tokenizer), 0)[1])
    text = "Zebra \x7f the court ﷽ z"
    assert smaller.decode(smaller.encode(text)) == tokenizer.decode(tokenizer.encode(text)) != text


def gemma_pieces():
    pieces = pieces_of("gemma")
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    rest = [token for token in pieces["vocab"] if token not in (*first, *SPECIAL)]
    return pieces | {"vocab": {token: index for index, token in enumerate([*first, *rest])}}


CLASSES = {
    "llama": lambda: LlamaTokenizer(**pieces_of("llama2")),
    "llama-legacy": lambda: LlamaTokenizer(**pieces_of("llama2"), legacy=True),
    "gemma": lambda: GemmaTokenizer(**gemma_pieces()),
    "qwen2": qwen2_class,
    "gpt2": lambda: GPT2Tokenizer(**pieces_of("gpt2")),
    "gpt_neox": lambda: GPTNeoXTokenizer(**pieces_of("gpt2")),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_that_build_their_tokenizer_themselves(name, tmp_path):
    tokenizer = CLASSES[name]()
    table = read_table(tokenizer)
    also = tokenizer.all_special_ids
    order, state = smaller_state(table, 0.4, also=also)
    smaller = rebuild_tokenizer(tokenizer, state)
    smaller.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for made in (smaller, again):
        assert type(made) is type(tokenizer)
        for text in ("<s> the court<s>finds  that 法院 🚀 Zq<|im_end|> a", "<s>the", " ", ""):
            assert_alike(tokenizer.backend_tokenizer, made.backend_tokenizer, order, text)
    assert again.backend_tokenizer.to_str() == smaller.backend_tokenizer.to_str()


def test_a_class_that_opens_it_in_another_way_is_refused():
    tokenizer = LlamaTokenizer(**pieces_of("llama2"))
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", "_"), decoders.ByteFallback(), decoders.Fuse()]
    )
    with pytest.raises(VocabularyError, match="LlamaTokenizer opens the smaller vocabulary with another decoder"):
        rebuild_tokenizer(tokenizer, smaller_state(read_table(tokenizer), 0.5)[1])


def test_ids_of_every_post_processor():
    tokenizer = Tokenizer.from_str(serialized("qwen"))
    first, last = (tokenizer.token_to_id(token) for token in ("<|begin|>", "<|end|>"))
    made = {
        "bert": processors.BertProcessing(("<|end|>", last), ("<|begin|>", first)),
        "roberta": processors.RobertaProcessing(("<|end|>", last), ("<|begin|>", first), add_prefix_space=False),
        "template": processors.TemplateProcessing(
            single="the:0 $A <|end|>",
            pair="$B:1 <|begin|> $A",
            special_tokens=[
                {"id": "the", "ids": [tokenizer.token_to_id(token) for token in ("t", "h")], "tokens": ["t", "h"]},
                ("<|begin|>", first),
                ("<|end|>", last),
            ],
        ),
    }
    for processor in made.values():
        for whole in (processor, processors.Sequence([processors.ByteLevel(), processor])):
            tokenizer.post_processor = whole
            table = TokenTable(json.loads(tokenizer.to_str()))
            order, state = smaller_state(table, 0, also=tokenizer.encode("a court", "court").ids)
            smaller = Tokenizer.from_str(json.dumps(state))
            for texts_ in (("a court",), ("a", "court")):
                expected = tokenizer.encode(*texts_)
                got = smaller.encode(*texts_)
                assert [order[index] for index in got.ids] == expected.ids
                assert got.type_ids == expected.type_ids
                assert got.special_tokens_mask == expected.special_tokens_mask


def test_padding_and_truncation_carry_over():
    tokenizer = Tokenizer.from_str(serialized("llama3"))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<|pad|>"), pad_token="<|pad|>")
    tokenizer.enable_truncation(5)
    order, state = smaller_state(TokenTable(json.loads(tokenizer.to_str())), 0.5)
    smaller = Tokenizer.from_str(json.dumps(state))
    batch = ["a", "b c d e f g h i j k"]
    for old, new in zip(tokenizer.encode_batch(batch), smaller.encode_batch(batch), strict=True):
        assert [order[index] for index in new.ids] == old.ids


def test_flags_of_added_tokens_and_the_chat_template_carry_over():
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = TEMPLATE
    order, state = smaller_state(read_table(tokenizer), 0.3)
    smaller = rebuild_tokenizer(tokenizer, state)
    flags = {str(token): token.__getstate__() for token in smaller.added_tokens_decoder.values()}
    assert flags == {str(token): token.__getstate__() for token in tokenizer.added_tokens_decoder.values()}
    turns = [{"role": "user", "content": "the court [mask] Übung!"}, {"role": "assistant", "content": "finds <tool>"}]
    assert smaller.apply_chat_template(turns, tokenize=False) == tokenizer.apply_chat_template(turns, tokenize=False)
    ids = smaller.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert smaller.decode(ids) == tokenizer.decode(expected)
    assert ids.count(order.index(tokenizer.convert_tokens_to_ids("<|begin|>"))) == 3


@pytest.mark.parametrize("kind", ["llama3", "unigram"])
def test_tokens_that_the_model_lacks_come_last(kind):
    state = state_of(kind)
    table = TokenTable(state)
    if kind == "llama3":  # as if one of them had a lower id than the model's own
        table.contents[10_000] = table.contents.pop(3)
        token = next(token for token, index in table.vocab.items() if index == 3)
        table.vocab[token] = 10_000
    order = order_ids(table, sorted(table.contents))
    own = set(table.vocab.values())
    last = [index for index in order if index not in own]
    assert order == [*sorted(own), *sorted(last)]


def test_the_id_of_the_unknown_piece_moves():
    tokenizer = Tokenizer.from_str(serialized("unigram"))
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"] = [*state["model"]["vocab"][1:], state["model"]["vocab"][0]]
    state["model"]["unk_id"] = len(state["model"]["vocab"]) - 1
    state["added_tokens"], state["post_processor"] = [], None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    order, smaller = smaller_state(TokenTable(state), 0)
    assert order[smaller["model"]["unk_id"]] == state["model"]["unk_id"]
    assert_alike(tokenizer, Tokenizer.from_str(json.dumps(smaller)), order, "the 𓀀 court")


def test_a_tokenizer_without_a_fast_backend_is_refused():
    class Slow:
        pass

    with pytest.raises(VocabularyError, match="Slow has no fast backend"):
        read_table(Slow())


def test_options_of_the_wrapper_carry_over():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(serialized("qwen")),
        eos_token="<|end|>",
        padding_side="left",
        truncation_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    before = copy.deepcopy(tokenizer.init_kwargs)
    smaller = rebuild_tokenizer(tokenizer, smaller_state(read_table(tokenizer), 0.2)[1])
    assert tokenizer.init_kwargs == before
    assert smaller.padding_side == smaller.truncation_side == "left"
    assert set(smaller("a")) == {"input_ids", "attention_mask"}
