"""Text of the demo: software licences, from a pinned wheel of the Python package index.

The wheel is fetched with pip (no Hub access), checked against a sha256, and kept in the package's cache.
"""

import hashlib
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
import yaml

from hf_context_prune.errors import DataError
from hf_context_prune.storage.cache import cache_dir
from hf_context_prune.storage.packages import fetch_wheel

from .decontamination import drop_overlapping, gram_hashes, words_of
from .documents import TextDocument, TextSource

LICENCE_WHEEL = ("licensedcode-data", "32.1.0", "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96")
_LICENCE_FOLDER = "licensedcode/data/licenses/"
_NOT_A_LICENCE = ("is_exception", "is_deprecated", "is_generic", "is_unknown")  # flags of the front matter
_FRONT_MATTER = re.compile(r"\A---\s*\n(?P<facts>.*?)\n---\s*(?:\n(?P<text>.*))?\Z", re.DOTALL)
_FUNCTION_WORDS = frozenset(
    ("a", "and", "any", "by", "for", "from", "in", "is", "not", "of", "or", "that", "the", "this", "to", "with", "you")
)
_MIN_WORDS = 100
_MIN_FUNCTION_WORDS = 0.2  # share; below it are lists of names, and texts half in another language
_NEAR_DUPLICATE = 0.8  # share of a text's 13-grams that one longer text has
_HELD_OUT_FRACTION = 0.2
_LARGE_FAMILY = 0.05  # families with a larger share of the texts (BSD, GNU, ...) stay on the calibration side


@dataclass(frozen=True)
class Attribution:
    """Source and licence of data, for output and model cards."""

    source: str
    version: str
    licence: str
    notice: str


@dataclass(frozen=True)
class LicenceCorpus:
    """Software licences, split by licence family.

    Attributes:
        calibration: Texts to calibrate on.
        held_out: Texts of other families that share at most a quarter of their 13-grams with all of `calibration`.
        texts_found: Number of licence texts in the wheel.
        texts_used: Number of these that are current, whole, English licences of some length.
        exact_duplicates: Number of these that were removed, since another has the same words.
        near_duplicates: Number of these that were removed, since a longer one has over 80 % of their 13-grams.
        families: Number of licence families among the rest; no family is on both sides.
        held_out_dropped: Number of texts of held-out families that were dropped for overlap with the calibration side.
        attribution: Source, version and licence of the data.
    """

    calibration: TextSource
    held_out: TextSource
    texts_found: int
    texts_used: int
    exact_duplicates: int
    near_duplicates: int
    families: int
    held_out_dropped: int
    attribution: Attribution


def licence_texts() -> LicenceCorpus:
    """Fetch the licence texts of licensedcode-data and split them by family.

    Raises:
        DownloadError: The wheel is not in the cache and can't be fetched, verified or written.
    """
    name, version, sha256 = LICENCE_WHEEL
    return build_licence_corpus(fetch_wheel(name, version, sha256, cache_dir=cache_dir()), version=version)


@dataclass(frozen=True)
class _Licence:
    key: str  # such as "gpl-2.0"
    owner: str  # such as "Free Software Foundation (FSF)"
    text: str
    words: tuple[str, ...]


def build_licence_corpus(wheel: Path, *, version: str, seed: int = 0) -> LicenceCorpus:
    """Read the licence texts from a licensedcode-data wheel and split them by family.

    Licences borrow from one another. So near-duplicates are removed first; a family (licences that have the first word
    of the key or the owner in common, transitively) is wholly on one side; and texts of held-out families that share
    over a quarter of their 13-grams with the calibration side are dropped. Both sides are in a shuffled order, so that
    a prefix is a fair sample.

    Args:
        wheel: Path of the wheel.
        version: Version in the attribution.
        seed: Seed of the choice of the held-out families.

    Raises:
        DataError: A licence file has another form, or no text is left on one of the sides.
    """
    found, licences = _read_licences(wheel)
    if len(licences) < 2:
        raise DataError(f"{wheel.name}: {len(licences)} usable licence texts can't be split; at least 2 are needed")
    licences.sort(key=lambda licence: (-len(licence.words), licence.key))  # the longest of near-duplicates is kept
    grams = _gram_matrix(licences)
    kept, exact, near = _without_duplicates(licences, grams)

    family_of = _families([licences[i] for i in kept])
    members: dict[str, list[int]] = {}
    for i in kept:
        members.setdefault(family_of[licences[i].key], []).append(i)
    held: list[int] = []
    for family in sorted(members, key=lambda family: _shuffle_key(seed, family)):
        if len(members[family]) <= max(1.0, _LARGE_FAMILY * len(kept)) and len(held) < _HELD_OUT_FRACTION * len(kept):
            held += members[family]
    calibration = sorted(set(kept) - set(held))
    if not calibration or not held:
        raise DataError(
            f"{wheel.name}: {len(kept)} licences in {len(members)} families can't be split; more families are needed"
        )
    attribution = Attribution(
        source="licensedcode-data (texts of software licences, from ScanCode)",
        version=version,
        licence="CC-BY-4.0",  # by NOTICE in the wheel's dist-info, and licensedcode/data/scancode-data.ABOUT
        notice="Copyright (c) nexB Inc. and others. ScanCode is a trademark of nexB Inc.",
    )
    name = f"software licences (licensedcode-data {version}, CC-BY-4.0)"
    sides = []
    for side in (calibration, held):
        chosen = sorted((licences[i] for i in side), key=lambda licence: _shuffle_key(seed, licence.key))
        documents = (TextDocument(licence.text, licence.key, "licensedcode-data") for licence in chosen)
        sides.append(TextSource.from_documents(documents, name=name))
    held_out, dropped = drop_overlapping(sides[1], sides[0])
    if not len(held_out):
        raise DataError(
            f"{wheel.name}: all {len(held)} held-out licences overlap with the calibration side; more are needed"
        )
    return LicenceCorpus(
        calibration=sides[0],
        held_out=held_out,
        texts_found=found,
        texts_used=len(licences),
        exact_duplicates=exact,
        near_duplicates=near,
        families=len(members),
        held_out_dropped=dropped,
        attribution=attribution,
    )


def _read_licences(wheel: Path) -> tuple[int, list[_Licence]]:
    """Read the current, whole, English licences.

    Returns:
        (number of licence files, the licences).
    """
    licences = []
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith(_LICENCE_FOLDER) and n.endswith(".LICENSE")]
        for name in names:
            match = _FRONT_MATTER.match(archive.read(name).decode())
            if match is None:
                raise DataError(f"{wheel.name}: {name} has no front matter between two lines of ---")
            facts, text = yaml.safe_load(match["facts"]), (match["text"] or "").strip()
            if facts.get("language", "en") != "en" or any(facts.get(flag) for flag in _NOT_A_LICENCE):
                continue
            words = tuple(words_of(text))
            function_words = sum(word in _FUNCTION_WORDS for word in words)
            if len(words) >= _MIN_WORDS and function_words >= _MIN_FUNCTION_WORDS * len(words):
                licences.append(_Licence(str(facts["key"]), str(facts["owner"]), text, words))
    return len(names), licences


def _gram_matrix(licences: list[_Licence]) -> scipy.sparse.csr_matrix:
    """Mark the distinct 13-grams of words of each text.

    Returns:
        int32 ones [texts, distinct 13-grams of all texts].
    """
    hashes = [gram_hashes(licence.words) for licence in licences]
    columns = np.unique(np.concatenate(hashes), return_inverse=True)[1]
    starts = np.concatenate([[0], np.cumsum([len(text) for text in hashes])])
    matrix = scipy.sparse.csr_matrix((np.ones(len(columns), np.int32), columns, starts))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _without_duplicates(licences: list[_Licence], grams: scipy.sparse.csr_matrix) -> tuple[list[int], int, int]:
    """Keep one of texts that are equal, or mostly contained in a text that is kept already.

    Returns:
        (indices kept, exact duplicates, near-duplicates).
    """
    shared = (grams @ grams.T).tocsr()  # [texts, texts]: number of 13-grams in common
    sizes = np.diff(grams.indptr)
    kept: list[int] = []
    is_kept = np.zeros(len(licences), bool)
    words_seen: set[tuple[str, ...]] = set()
    exact = near = 0
    for i, licence in enumerate(licences):
        span = slice(shared.indptr[i], shared.indptr[i + 1])
        others, counts = shared.indices[span], shared.data[span]
        if licence.words in words_seen:
            exact += 1
        elif np.any(counts[is_kept[others]] > _NEAR_DUPLICATE * sizes[i]):
            near += 1
        else:
            kept.append(i)
            is_kept[i] = True
            words_seen.add(licence.words)
    return kept, exact, near


def _families(licences: list[_Licence]) -> dict[str, str]:
    """Return the family of each licence key, named by the least key in it."""
    leader: dict[str, str] = {licence.key: licence.key for licence in licences}

    def find(key: str) -> str:
        while leader[key] != key:
            key = leader[key]
        return key

    first_with: dict[tuple[str, str], str] = {}
    for licence in licences:
        traits = [("stem", re.split(r"[-.]", licence.key)[0])]  # "gpl" of "gpl-2.0-plus"
        if licence.owner != "Unspecified":
            traits.append(("owner", licence.owner))
        for trait in traits:
            low, high = sorted((find(licence.key), find(first_with.setdefault(trait, licence.key))))
            leader[high] = low
    return {key: find(key) for key in leader}


def _shuffle_key(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
