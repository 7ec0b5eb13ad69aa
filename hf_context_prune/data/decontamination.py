"""Decontamination: drop held-out documents that the calibration text contains, by hashed 13-grams of words.

13 words in a row are rarely the same by chance. So they find copied text even if its ends, case or punctuation were
changed, or if it was cut into other documents.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from .documents import TextDocument, TextSource

GRAM = 13  # words
MAX_SHARE = 0.25

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana and Chinese characters, written without spaces: a word each
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:'[^\W_{_CJK}]+)?")
_BLANK_LINE = re.compile(r"\n\s*\n")
_CHUNK = 1 << 18  # words of calibration text looked up at once
_MULTIPLIERS = np.random.default_rng(0).integers(0, 2**63, size=GRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

_Hashes = npt.NDArray[np.uint64]


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; each Chinese character or kana is a word."""
    return _WORD.findall(text.lower())


def gram_hashes(words: Sequence[str]) -> _Hashes:
    """Hash the 13-grams of words, in order.

    Args:
        words: Words of a text.

    Returns:
        uint64 [max(0, words - 12)]; equal for equal 13-grams within one process, not across processes.
    """
    return _hashes_of(_word_hashes(words))


def drop_overlapping(
    held_out: TextSource, calibration: TextSource, *, max_share: float = MAX_SHARE
) -> tuple[TextSource, int]:
    """Drop held-out documents that the calibration text contains in large part.

    A document is dropped if the calibration text, read as one, has over `max_share` of its distinct 13-grams. A
    document under 13 words is dropped if its words are those of a calibration document, or of a part of one between
    blank lines (which join the records of one ``doc``).

    Args:
        held_out: Documents to judge. Memory is a small multiple of their size.
        calibration: Text to compare with; read in pieces.
        max_share: Share of a document's 13-grams that may be in the calibration text, in [0, 1).

    Returns:
        (the documents left, in order, perhaps none; number of documents dropped).
    """
    short: list[object | None] = []  # the key of each document under 13 words, else None
    hashes: list[_Hashes] = []
    for document in held_out.documents:
        words = words_of(document.text)
        short.append(_key(document.text, words) if len(words) < GRAM else None)
        hashes.append(np.unique(gram_hashes(words)))
    grams = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
    seen = np.zeros(len(grams), bool)
    if len(grams):
        for chunk in _chunks(calibration.documents):
            at = np.searchsorted(grams, chunk)
            at[at == len(grams)] = 0
            seen[at[grams[at] == chunk]] = True
    short_seen = _short_keys(calibration.documents) if any(key is not None for key in short) else set()

    def overlaps(key: object | None, own: _Hashes) -> bool:
        if key is not None:
            return key in short_seen
        return bool(seen[np.searchsorted(grams, own)].mean() > max_share)

    left = [
        document for document, key, own in zip(held_out.documents, short, hashes, strict=True) if not overlaps(key, own)
    ]
    if len(left) == len(held_out):
        return held_out, 0
    clean = TextSource.from_documents(left, name=held_out.name, revision=held_out.revision)
    return clean, len(held_out) - len(left)


def _word_hashes(words: Sequence[str]) -> _Hashes:
    # Python's own hash of a string: 64 bits, and random from process to process.
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def _hashes_of(values: _Hashes) -> _Hashes:
    # One odd multiplier per position: among 10^6 grams, a collision is practically impossible.
    count = max(0, len(values) - GRAM + 1)
    hashes = np.zeros(count, np.uint64)
    for at, multiplier in enumerate(_MULTIPLIERS):
        hashes += values[at : at + count] * multiplier
    return hashes


def _chunks(documents: Iterable[TextDocument]) -> Iterator[_Hashes]:
    """Yield the hashes of all 13-grams of the documents, read as one text, some at a time."""
    pending: list[_Hashes] = []
    count = 0
    for document in documents:
        pending.append(_word_hashes(words_of(document.text)))
        count += len(pending[-1])
        if count >= _CHUNK:
            values = np.concatenate(pending)
            yield _hashes_of(values)
            pending, count = [values[-(GRAM - 1) :]], GRAM - 1
    if pending:
        yield _hashes_of(np.concatenate(pending))


def _key(text: str, words: list[str]) -> object:
    return tuple(words) or text.strip()  # a text without words, such as "!?", is its own key


def _short_keys(documents: Iterable[TextDocument]) -> set[object]:
    keys: set[object] = set()
    for document in documents:
        for part in {document.text, *_BLANK_LINE.split(document.text)}:
            words = words_of(part)
            if len(words) < GRAM and part.strip():
                keys.add(_key(part, words))
    return keys
