"""What must stay, and what a token is made from: against a simulation of byte-pair encoding that shares no code."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hf_context_prune.errors import VocabularyError
from hf_context_prune.pruning.vocabulary.rebuild import build_state, order_ids
from hf_context_prune.pruning.vocabulary.tokens import METASPACE, TokenTable
from tests.support.tiny_tokenizers import ADDED, ALL_KINDS, BYTES, KINDS, SPECIAL, quick, state_of

WORDS = ["".join(letters) for length in range(1, 8) for letters in itertools.product("ab", repeat=length)]


def simulated(word, merges):
    """Tokens of a word, and all that came up on the way: the leftmost pair of the lowest rank is merged, then again."""
    symbols, seen = list(word), set(word)
    while True:
        pairs = list(itertools.pairwise(symbols))
        possible = [(merges.index(pair), place) for place, pair in enumerate(pairs) if pair in merges]
        if not possible:
            return symbols, seen
        place = min(possible)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        seen.add(symbols[place])


@st.composite
def small_bpe(draw):
    """Any vocabulary over two letters, with any of the merges that it allows, in any order."""
    tokens = ["a", "b"]
    for _ in range(draw(st.integers(1, 7))):
        token = draw(st.sampled_from(tokens)) + draw(st.sampled_from(tokens))
        if len(token) <= 6 and token not in tokens:
            tokens.append(token)
    halves = [(token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token))]
    merges = [pair for pair in draw(st.permutations(halves)) if set(pair) <= set(tokens)]
    merges = merges[: draw(st.integers(1, len(merges)))]
    return {token: index for index, token in enumerate(tokens)}, merges, draw(st.sets(st.sampled_from(tokens)))


def table_of(vocab, merges, **options):
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer, TokenTable(json.loads(tokenizer.to_str()))


@settings(quick, max_examples=100)
@given(small_bpe())
def test_the_closure_holds_all_that_any_word_passes_through_and_then_words_stay_exact(given_bpe):
    vocab, merges, wanted = given_bpe
    tokenizer, table = table_of(vocab, merges)
    kept = table.mandatory() | table.closed(vocab[token] for token in wanted)
    order = order_ids(table, sorted(kept))
    smaller = Tokenizer.from_str(json.dumps(build_state(table, order)))
    for word in WORDS:
        tokens, seen = simulated(word, merges)
        assert tokenizer.encode(word).tokens == tokens  # the simulation is right
        ids = [vocab[token] for token in tokens]
        assert {vocab[token] for token in seen} <= table.closed(ids)
        if kept.issuperset(ids):
            assert [order[index] for index in smaller.encode(word).ids] == ids


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_closures_are_closed_and_name_real_tokens(kind):
    table = TokenTable(state_of(kind))
    for index in table.contents:
        closure = table.closure(index)
        assert index in closure
        assert closure <= table.contents.keys()
        assert table.closed(closure) == closure
    must = table.mandatory()
    assert table.closed(must) == must
    assert must < table.contents.keys()


def test_a_chain_of_thousands_of_merges():
    tokens = ["b", *("a" + "b" * length for length in range(2000))]
    vocab = {token: index for index, token in enumerate(tokens)}
    _, table = table_of(vocab, [(token, "b") for token in tokens[1:-1]])
    assert table.closure(2000) == table.contents.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_what_must_stay(kind):
    state = state_of(kind)
    table = TokenTable(state)
    contents = {table.contents[index] for index in table.mandatory()}
    assert {token["content"] for token in state["added_tokens"]} <= contents
    singles = {token for token in table.vocab if len(token) == 1}
    if kind in ("llama2", "llama2-metaspace", "gemma", "metaspace-decoder"):
        assert set(BYTES) <= contents
        assert METASPACE in contents
        assert not singles <= contents  # the bytes stand in for them
        assert len(contents) < 350
    else:
        assert singles <= contents
    if kind == "gpt2":
        assert len(contents) == 256 + 2
    if kind == "llama3":
        assert {token.content for token in ADDED} <= contents
        assert len(contents) == 256 + len(ADDED)
    if kind.startswith("unigram"):
        assert set(SPECIAL) <= contents
        lowest = min(score for _, score in state["model"]["vocab"])
        assert lowest in [score for piece, score in state["model"]["vocab"] if piece in contents]


def test_tokens_of_the_post_processor_and_of_padding_must_stay():
    state = state_of("qwen")
    middle = sorted(state["model"]["vocab"])[300:303]
    first, second, pad = middle
    state["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "RobertaProcessing", "sep": [first, 1], "cls": [second, 2], "trim_offsets": True},
            state["post_processor"],
        ],
    }
    state["padding"] = {"pad_id": state["model"]["vocab"][pad], "pad_token": pad}
    must = TokenTable(state).mandatory()
    assert {state["model"]["vocab"][token] for token in middle} <= must


def test_ids_and_length_of_a_table():
    table = TokenTable(state_of("llama3"))
    assert len(table) == len(table.vocab) + len(ADDED)
    assert table.added["<|begin|>"] == len(table.vocab)
    assert table.contents[table.added["<tool>"]] == "<tool>"
    assert table.merges
    assert TokenTable(state_of("unigram")).merges == []


def edit(kind, **changes):
    state = state_of(kind)
    return (
        state
        | {key: value for key, value in changes.items() if key != "model"}
        | {"model": state["model"] | changes.get("model", {})}
    )


STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
METASPACE_DECODER = {"type": "Metaspace", "replacement": METASPACE, "prepend_scheme": "always", "split": True}


REFUSED = [
    (edit("gpt2", model={"type": "WordPiece"}), "model is WordPiece"),
    (edit("gpt2", model={"type": "WordLevel"}), r"byte-pair \(BPE\) and Unigram"),
    (edit("gpt2", model={"dropout": 0.1}), "dropout=0.1"),
    (edit("gpt2", model={"continuing_subword_prefix": "##"}), "continuing_subword_prefix='##'"),
    (edit("gpt2", model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix='</w>'"),
    (edit("gpt2", decoder=None), "no decoder"),
    (edit("gpt2", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "WordPiece"),
    (edit("llama2", decoder=STRIP), "Strip"),
    (edit("llama2", decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, STRIP]}), "Strip"),
    (edit("llama2", decoder={"type": "Replace", "pattern": {"String": "ab"}, "content": ""}), "Replace"),
    (edit("llama2", decoder={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}), "Replace"),
    (edit("llama2", decoder=METASPACE_DECODER), "Metaspace"),
    (edit("llama2-metaspace", decoder=METASPACE_DECODER), "Metaspace"),
    (edit("unigram", model={"vocab": [["<unk>", 0.0], ["a", -1.0], ["ab", -2.0]]}), "'ab'.* 'b'"),
]


def test_a_tokenizer_that_cannot_be_pruned_exactly_is_refused(subtests):
    for number, (state, said) in enumerate(REFUSED):
        with subtests.test(said, number=number), pytest.raises(VocabularyError, match=said):
            TokenTable(state)


def test_a_decoder_that_drops_no_spaces_is_fine_without_splitting_at_them():
    TokenTable(edit("llama2-metaspace", decoder=METASPACE_DECODER | {"prepend_scheme": "never"}))


def test_the_state_is_never_changed():
    state = state_of("llama3")
    table = TokenTable(state)
    build_state(table, order_ids(table, sorted(table.mandatory())))
    assert state == state_of("llama3")
