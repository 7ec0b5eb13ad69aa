"""Read a fast tokenizer's JSON: which tokens must stay, and which tokens each of them is made from.

Exactness rests on one fact about byte-pair encoding. A merge never crosses the border of a final token, and the pair of
lowest rank is always merged first; so inside a word, the merges that lead to a token are the merges that lead to it
when it stands alone. If, with a token, all tokens of that derivation (its *closure*) are kept, every word whose tokens
are all kept is encoded as before: the pair that the full tokenizer merges next still exists, and still has the lowest
rank. Unigram needs nothing else: the best segmentation of all is also the best of fewer.

Decoded text is the same as before, because the pieces that a token is split into, down to characters or bytes, spell
the same text. One text might differ: whether a Unigram tokenizer with byte fallback reads a typed "<0xE4>" as a byte
depends on the scores of the pieces around it. With the scores of real tokenizers (0 for bytes, far below for pieces of
such a text) it stays a byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from hf_context_prune.errors import VocabularyError

SUPPORTED = ("BPE", "Unigram")
METASPACE = "\u2581"
"""The character that SentencePiece writes for a space."""
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class TokenTable:
    """A fast tokenizer's vocabulary, as its JSON describes it.

    Args:
        state: The parsed ``tokenizer.json``; never changed.
        rows: Embedding rows of the model. Added tokens beyond them (Gemma 3 has one for images, which its text models
            lack) are no ids here, and stay added tokens beyond the rows. None: every token has a row.

    Attributes:
        vocab: Ids of the model's own tokens by content (added tokens that the model lacks are not among them).
        added: Ids of added tokens by content.
        contents: Contents by id, of all tokens that have a row.

    Raises:
        VocabularyError: The tokenizer is of another kind, has dropout, or decodes a text differently when a token is
            split.
    """

    def __init__(self, state: Mapping[str, Any], rows: int | None = None) -> None:
        self.state = state
        model = state["model"]
        self.kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
        if self.kind not in SUPPORTED:
            raise VocabularyError(
                f"The tokenizer's model is {self.kind}; the vocabulary of byte-pair (BPE) and Unigram tokenizers can "
                f"be pruned. Prune this model without vocab_* options."
            )
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(name):
                raise VocabularyError(
                    f"The tokenizer has {name}={model[name]!r}; BPE without it is supported, since with it nothing is "
                    f"known about which merges a token needs. Prune this model without vocab_* options."
                )
        entries = model["vocab"]
        self.vocab: dict[str, int] = (
            dict(entries)
            if isinstance(entries, Mapping)
            else {piece: index for index, (piece, _) in enumerate(entries)}
        )
        self.added: dict[str, int] = {token["content"]: token["id"] for token in state.get("added_tokens") or ()}
        own = set(self.vocab.values())
        self.contents = {
            index: content
            for content, index in {**self.vocab, **self.added}.items()
            if rows is None or index < rows or index in own
        }
        self._closures: dict[int, frozenset[int]] = {}
        if self.kind == "Unigram":
            self._check_characters()
        _check_decoder(state)

    def __len__(self) -> int:
        return len(self.contents)

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs in the order of their rank; empty for Unigram."""
        pairs = self.state["model"].get("merges") or ()
        halves = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in pairs)
        return [(first, second) for first, second in halves]

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    @cached_property
    def _made(self) -> set[str]:
        """Contents that a merge results in."""
        return {left + right for left, right in self.merges}

    @cached_property
    def _spells_with_bytes(self) -> bool:
        """Whether byte tokens can replace any character at any place.

        They can't if one of them is missing (`tokenizers` then puts unknown characters in another order), or if a text
        that reads "<0xE4>" can become a byte token: the bytes of a character beside it would no longer be whole.
        """
        model = self.state["model"]
        typed = self.kind != "BPE" or model.get("ignore_merges") or not self._made.isdisjoint(_BYTES)
        return (
            bool(model.get("byte_fallback"))
            and not typed
            and all(byte in self.vocab and byte not in self.added for byte in _BYTES)
        )

    def mandatory(self) -> set[int]:
        """Return the ids without which some text would be decoded differently than by the full tokenizer."""
        model = self.state["model"]
        keep = {index for index in self.added.values() if index in self.contents}
        unknown = model.get("unk_token")
        if unknown in self.vocab:
            keep.add(self.vocab[unknown])
        if model.get("unk_id") is not None:
            keep.add(model["unk_id"])
        keep |= {self.vocab[content] for content in _strings(self.state.get("post_processor")) if content in self.vocab}
        if model.get("byte_fallback"):
            keep |= {self.vocab[byte] for byte in _BYTES if byte in self.vocab}
        # Characters that normalizer, pre-tokenizer and decoder write or look for ("\u2581") must not become bytes.
        parts = [self.state.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
        special = {METASPACE}.union(*_strings(parts))
        for content, index in self.vocab.items():
            if self._spells_with_bytes:
                needed = content in special
            else:  # a word that is looked up whole may have characters that are no tokens of their own
                needed = len(content) == 1 or any(character not in self.vocab for character in content)
            if needed:
                keep.add(index)
        if self.kind == "Unigram":
            # The unknown token's score is the lowest score less a constant.
            keep.add(min(self.vocab.values(), key=lambda index: model["vocab"][index][1]))
        padding = self.state.get("padding")
        if padding and padding["pad_id"] in self.contents:
            keep.add(padding["pad_id"])
        return self.closed(keep)

    def _check_characters(self) -> None:
        """Refuse pieces with characters that are no piece: which of them become unknown depends on all other pieces."""
        exempt = {*self.added, *_BYTES, self.contents.get(self.state["model"].get("unk_id"))}
        for content in self.vocab.keys() - exempt:
            for character in content:
                if character not in self.vocab:
                    raise VocabularyError(
                        f"The Unigram tokenizer has the piece {content!r}, but none for its character {character!r}: "
                        f"with fewer pieces other characters would be unknown. Prune this model without vocab_* "
                        f"options."
                    )

    def closed(self, ids: Iterable[int]) -> set[int]:
        """Return the ids together with all tokens that they are made from."""
        return {part for index in ids for part in self.closure(index)}

    def closure(self, index: int) -> frozenset[int]:
        """Return a token's id together with the ids of all tokens in its derivation."""
        if index not in self._closures:
            content = self.contents[index]
            parts = self._derive(content) if content in self._made else ()
            self._closures[index] = frozenset({index, *(self.vocab[part] for part in parts if part in self.vocab)})
        return self._closures[index]

    def _derive(self, content: str) -> set[str]:
        """Return every token that the encoding of a content on its own passes through, by applying the merges.

        Merges are applied one at a time, the leftmost of the lowest rank first, as in `tokenizers`: a merge may make a
        pair of a still lower rank possible.
        """
        symbols, passed = list(content), set(content)
        while len(symbols) > 1:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in pairwise(symbols)]
            lowest = min(ranks)
            if lowest == len(self._ranks):
                break
            place = ranks.index(lowest)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            passed.add(symbols[place])
        return passed


def _check_decoder(state: Mapping[str, Any]) -> None:
    """Refuse a decoder whose text depends on where one token ends and the next one starts."""
    for part in _parts(state.get("decoder")):
        kind = part["type"]
        if kind == "Fuse":  # the steps after it see one text
            return
        if kind == "Replace":
            safe = len(part["pattern"].get("String", "")) == 1
        elif kind == "Metaspace":  # drops every "\u2581" of the first token: safe if no token has two
            safe = part["prepend_scheme"] == "never" or any(
                other["type"] == "Metaspace" and other["split"] for other in _parts(state.get("pre_tokenizer"))
            )
        else:
            safe = kind in ("ByteLevel", "ByteFallback")
        if not safe:
            raise VocabularyError(
                f"The tokenizer's decoder {json.dumps(part, ensure_ascii=False)} decodes another text where a token is "
                f"split into pieces. Prune this model without vocab_* options."
            )
    if not state.get("decoder"):
        raise VocabularyError(
            "The tokenizer has no decoder, so it puts a space between all tokens, and splitting one changes the text. "
            "Prune this model without vocab_* options."
        )


def _parts(step: Any) -> list[Any]:  # noqa: ANN401
    """Return the steps of a sequence of decoders or pre-tokenizers; a single step is a sequence of one."""
    nested = (step or {}).get("decoders") or (step or {}).get("pretokenizers")
    return [part for other in nested for part in _parts(other)] if nested else [step] if step else []


def _strings(part: Any) -> list[str]:  # noqa: ANN401
    """Return all strings in a part of the JSON."""
    if isinstance(part, str):
        return [part]
    values = part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ()
    return [text for value in values for text in _strings(value)]
