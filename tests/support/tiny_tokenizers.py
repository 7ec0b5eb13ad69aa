"""Small tokenizers of every supported kind, trained here on made-up text of many scripts; one builder a kind."""

from __future__ import annotations

import copy
import json
import random
from functools import cache

from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from hf_context_prune.pruning.vocabulary.tokens import METASPACE

WORDS = (
    *("the", "court", "finds", "that", "party", "owed", "duty", "of", "care", "patient", "was", "given", "dose"),
    *("twice", "daily", "revenue", "rose", "fell", "quarter", "naïve", "café", "Straße", "señor", "łódź", "Привет"),
    *("мир", "право", "суд", "لوط", "القانون", "محكمة", "שלום", "法院", "认定", "患者", "法律", "裁判所", "です"),
    *("こんにちは", "안녕", "법원", "🚀", "👩\u200d⚕️", "3.5%", "1,024", "e\u0301", "don't", "it's", "we'll", "<table>"),
    *("</s", ">"),
)
SEPARATORS = (" ", " ", " ", "  ", "\n", "\n\n", "\t", ", ", ". ", "   ")
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ADDED = [
    AddedToken("<|begin|>", special=True),
    AddedToken("<|end|>", special=True),
    AddedToken("<|pad|>", special=True),
    AddedToken("<tool>", normalized=False),
    AddedToken("Übung", normalized=True, single_word=True),
    AddedToken("[mask]", special=True, lstrip=True, rstrip=True),
]


BYTE_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(**special):
    """One token a byte, then <s> and </s>."""
    vocab = {token: index for index, token in enumerate([*BYTE_LETTERS, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or {"bos_token": "<s>", "eos_token": "</s>"}))


def corpus(length: int = 4000) -> str:
    """Made-up text: words of many scripts, the first ones far more often."""
    draw = random.Random(0)
    weights = [1 / (1 + place) ** 0.7 for place in range(len(WORDS))]
    words = draw.choices(WORDS, weights, k=length)
    return "".join(word + draw.choice(SEPARATORS) for word in words)


def trained_bpe(tokenizer: Tokenizer, size: int, *, alphabet=(), special=()) -> tuple[dict[str, int], list]:
    """Vocabulary (by id) and merges of a BPE tokenizer after training."""
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([corpus()], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def all_merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token from two others, as the converters of SentencePiece and tiktoken list them."""
    merges = []
    for token in sorted(vocab, key=vocab.__getitem__):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in halves if left in vocab and right in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def wrapped(tokenizer: Tokenizer, bos: str, eos: str, **options) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, **options)


def gpt2(*, alphabet: bool = True, normalizer=None) -> PreTrainedTokenizerFast:
    """GPT-2: byte-level BPE with its own regex, one special token in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else ()
    trained_bpe(tokenizer, 460, alphabet=letters, special=["<|endoftext|>", "<|im_start|>"])
    return wrapped(tokenizer, "<|endoftext|>", "<|endoftext|>", unk_token="<|endoftext|>")


def byte_level_regex(*, normalizer=None, ignore_merges: bool, tiktoken: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    vocab, merges = trained_bpe(tokenizer, 460, alphabet=pre_tokenizers.ByteLevel.alphabet())
    if tiktoken:
        merges = all_merges(vocab)
        vocab["Ġunreachable"] = len(vocab)  # only `ignore_merges` finds it
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)
    tokenizer.add_tokens(ADDED)
    return tokenizer


def llama3() -> PreTrainedTokenizerFast:
    """Llama 3: tiktoken's merges, `ignore_merges`, special tokens after the vocabulary, a template for the first."""
    tokenizer = byte_level_regex(ignore_merges=True, tiktoken=True)
    first = tokenizer.token_to_id("<|begin|>")
    template = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A <|begin|>:1 $B:1", special_tokens=[("<|begin|>", first)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return wrapped(tokenizer, "<|begin|>", "<|end|>", pad_token="<|pad|>")


def qwen() -> PreTrainedTokenizerFast:
    """Qwen: NFC first, special tokens after the vocabulary."""
    tokenizer = byte_level_regex(normalizer=normalizers.NFC(), ignore_merges=False, tiktoken=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def smollm2() -> PreTrainedTokenizerFast:
    """SmolLM2: bytes that the training text lacks have no token, and vanish."""
    return gpt2(alphabet=False)


def sentencepiece_vocab() -> dict[str, int]:
    """Ids as in Llama 2: special tokens, bytes, pieces by rank, single characters last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", METASPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{METASPACE}*[^{METASPACE}]+"), behavior="isolated")
    vocab, merges = trained_bpe(tokenizer, 420)
    pieces = [left + right for left, right in merges] + [METASPACE * 2, METASPACE * 3, METASPACE * 4]
    letters = sorted(token for token in vocab if len(token) == 1)
    return {token: index for index, token in enumerate(dict.fromkeys([*SPECIAL, *BYTES, *pieces, *letters]))}


def sentencepiece_bpe(vocab: dict[str, int]) -> Tokenizer:
    made = {token: rank for token, rank in vocab.items() if token not in SPECIAL and token not in BYTES}
    model = models.BPE(vocab=vocab, merges=all_merges(made), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def sentencepiece_decoder(*, strip: bool = True) -> decoders.Decoder:
    parts = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)


def llama2() -> PreTrainedTokenizerFast:
    """Llama 2 and Mistral: SentencePiece BPE with byte fallback, no pre-tokenizer, several merges a token."""
    tokenizer = sentencepiece_bpe(sentencepiece_vocab())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)])
    tokenizer.decoder = sentencepiece_decoder()
    return wrapped(tokenizer, "<s>", "</s>", unk_token="<unk>")


def llama2_metaspace(*, prepend_scheme: str = "first") -> PreTrainedTokenizerFast:
    """Llama 2 as transformers 5 builds it: the pre-tokenizer Metaspace instead of the normalizer."""
    tokenizer = sentencepiece_bpe(sentencepiece_vocab())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = sentencepiece_decoder()
    return wrapped(tokenizer, "<s>", "</s>", unk_token="<unk>")


def metaspace_decoder() -> PreTrainedTokenizerFast:
    """The decoder Metaspace, which drops every stand-in of the first token; words are split at spaces."""
    tokenizer = sentencepiece_bpe(sentencepiece_vocab())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return wrapped(tokenizer, "<s>", "</s>", unk_token="<unk>")


def gemma() -> PreTrainedTokenizerFast:
    """Gemma: no space put in front, runs of spaces and HTML tags among the added tokens."""
    tokenizer = sentencepiece_bpe(sentencepiece_vocab())
    tokenizer.normalizer = normalizers.Replace(" ", METASPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = sentencepiece_decoder(strip=False)
    tokenizer.add_tokens([AddedToken("<table>", normalized=False), AddedToken(METASPACE * 4, normalized=False)])
    return wrapped(tokenizer, "<s>", "</s>", unk_token="<unk>")


def unigram(*, byte_fallback: bool) -> PreTrainedTokenizerFast:
    """Unigram with Metaspace, as T5 and XGLM have it; with byte fallback, as llm-jp has it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=330, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([corpus()], trainer)
    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    if byte_fallback:
        pieces[len(SPECIAL) : len(SPECIAL)] = [(byte, 0.0) for byte in BYTES]
    tokenizer.model = models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback)
    tokenizer.decoder = (
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]) if byte_fallback else decoders.Metaspace()
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.add_special_tokens(list(SPECIAL))
    return wrapped(tokenizer, "<s>", "</s>", unk_token="<unk>", pad_token="<unk>")


def edited(kind: str, edit) -> PreTrainedTokenizerFast:
    """Another kind with a change to its JSON."""
    state = json.loads(serialized(kind))
    edit(state)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def _without_some_bytes(state) -> None:
    kept = [token for token in state["model"]["vocab"] if token not in BYTES[0xE0:0xF0:2]]
    state["model"]["vocab"] = {token: index for index, token in enumerate(kept)}


def _words_of_missing_letters(state) -> None:
    state["model"]["ignore_merges"] = True
    for word in ("Ġqq", "zzz"):
        state["model"]["vocab"][word] = len(state["model"]["vocab"])


def added_bytes() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(serialized("gemma"))
    tokenizer.add_tokens([AddedToken(byte, normalized=False) for byte in BYTES])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def shuffled(kind: str) -> PreTrainedTokenizerFast:
    return edited(kind, lambda state: random.Random(1).shuffle(state["model"]["merges"]))


BUILDERS = {
    "gpt2": gpt2,
    "llama3": llama3,
    "qwen": qwen,
    "smollm2": smollm2,
    "llama2": llama2,
    "llama2-metaspace": llama2_metaspace,
    "gemma": gemma,
    "metaspace-decoder": metaspace_decoder,
    "unigram": lambda: unigram(byte_fallback=False),
    "unigram-bytes": lambda: unigram(byte_fallback=True),
}
ODD = {
    # Characters without a token are unknown, and `tokenizers` puts them after the byte tokens.
    "some-bytes-missing": lambda: edited("llama2", _without_some_bytes),
    # A text that reads "<0xE4>" becomes that byte.
    "bytes-typed-as-added-tokens": added_bytes,
    "bytes-typed-as-words": lambda: edited("gemma", lambda state: state["model"].update(ignore_merges=True)),
    # Words that are looked up whole, with letters that have no token.
    "words-of-missing-letters": lambda: edited("smollm2", _words_of_missing_letters),
    # A merge may have a lower rank than those that make its parts.
    "llama3-shuffled-merges": lambda: shuffled("llama3"),
    "llama2-shuffled-merges": lambda: shuffled("llama2"),
    "unknown-token": lambda: edited("smollm2", lambda state: state["model"].update(unk_token="<|endoftext|>")),
}
KINDS = [*BUILDERS]
ALL_KINDS = [*BUILDERS, *ODD]

quick = settings(max_examples=50, derandomize=True, deadline=None, database=None)
"""A fixed, bounded choice of examples."""


@cache
def serialized(kind: str) -> str:
    return (BUILDERS | ODD)[kind]().backend_tokenizer.to_str()


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A copy for every caller."""
    return copy.deepcopy(_built(kind))


@cache
def _built(kind: str) -> PreTrainedTokenizerFast:
    return BUILDERS[kind]()


def state_of(kind: str) -> dict:
    return json.loads(serialized(kind))


def pieces_of(kind: str) -> dict:
    """Vocabulary and merges, as the tokenizer classes of transformers take them."""
    state = state_of(kind)
    vocab = {token: index for token, index in state["model"]["vocab"].items() if token not in ADDED}
    return {"vocab": vocab, "merges": [tuple(pair) for pair in state["model"]["merges"]]}


def qwen2_class() -> Qwen2Tokenizer:
    return Qwen2Tokenizer(**pieces_of("qwen"), extra_special_tokens=["<|im_start|>", "<|im_end|>"])


def texts(contents) -> st.SearchStrategy[str]:
    """Any text, and what is most likely to go wrong: special tokens, byte tokens, spaces, tokens side by side."""
    special = [*SPECIAL, "<|endoftext|>", *(token.content for token in ADDED)]
    part = st.one_of(
        st.text(max_size=6),
        st.sampled_from(WORDS),
        st.sampled_from(sorted(contents)),
        st.sampled_from([*BYTES, *special]),
        st.sampled_from(" \n\t\0" + METASPACE).flatmap(lambda one: st.integers(1, 6).map(lambda count: one * count)),
        st.tuples(st.sampled_from(WORDS), st.integers(1, 300)).map(lambda word: word[0] * word[1]),
    )
    return st.lists(part, max_size=8).map("".join)
