"""Held-out text that the calibration text has already, under whatever disguise."""

import random
import zlib

import numpy as np

from hf_context_prune.data import decontamination as overlap
from hf_context_prune.data.decontamination import drop_overlapping, gram_hashes, words_of
from hf_context_prune.data.documents import TextDocument, TextSource

WORDS = [f"word{i}" for i in range(5000)]


def text(seed, n=100):
    return " ".join(random.Random(seed).choices(WORDS, k=n))


def source(*texts):
    return TextSource.from_documents((TextDocument(t, f"d{i}", "s") for i, t in enumerate(texts)), name="here")


def dropped(held_out, calibration):
    left, count = drop_overlapping(source(*held_out), source(*calibration))
    assert len(left) + count == len(held_out)
    return [i for i in range(len(held_out)) if f"d{i}" not in {document.doc for document in left.documents}]


CALIBRATION = [text(seed) for seed in range(5)]


DISGUISES = [
    CALIBRATION[0],
    CALIBRATION[0] + "\n",
    CALIBRATION[0] + " .",
    CALIBRATION[0].upper().replace(" ", ",\n"),
    "\n\n".join(CALIBRATION),
    "\n\n".join(reversed(CALIBRATION)),
    CALIBRATION[0] + " " + text(99, 200),
    " ".join(CALIBRATION[0].split()[:13]),
    CALIBRATION[3][-400:] + " " + CALIBRATION[4][:400],
]


def test_a_copy_in_disguise_is_dropped(subtests):
    for copy in DISGUISES:
        with subtests.test(copy=copy):
            assert dropped([text(50), copy, text(51)], CALIBRATION) == [1]


def test_a_quarter_is_allowed():
    shared = CALIBRATION[0].split()
    fitting = " ".join(shared[: 22 + 12] + text(60, 66).split())  # 22 of 88 13-grams
    over = " ".join(shared[: 23 + 12] + text(61, 65).split())
    assert dropped([fitting, over], CALIBRATION) == [1]


def test_nothing_in_common_leaves_the_source_as_it_is():
    held_out = source(text(50), text(51))
    assert drop_overlapping(held_out, source(*CALIBRATION)) == (held_out, 0)
    assert drop_overlapping(held_out, source()) == (held_out, 0)
    assert drop_overlapping(source(), held_out) == (source(), 0)


def test_all_may_go():
    left, count = drop_overlapping(source(*CALIBRATION), source(*CALIBRATION))
    assert (len(left), count, left.name) == (0, 5, "here")


def test_short_documents_are_compared_whole():
    calibration = ["What is it?", "Take two a day.\n\nThen rest, well.", "one two three four", "!?", *CALIBRATION]
    held_out = ["what is IT", "then rest well", "two three", "?!", "!? ", "...", CALIBRATION[0][:30]]
    assert dropped(held_out, calibration) == [0, 1, 4]


def test_short_records_merged_under_one_document_are_found():
    records = [text(seed, 8) for seed in range(20)]
    assert dropped(["\n\n".join(records[5:15]), text(90)], records) == [0]


def test_calibration_text_is_read_in_pieces_without_seams(monkeypatch):
    whole = " ".join(CALIBRATION)
    held_out = [" ".join(whole.split()[start : start + 13]) for start in range(0, 480, 7)]
    monkeypatch.setattr(overlap, "_CHUNK", 20)
    pieces = [" ".join(whole.split()[start : start + 9]) for start in range(0, 500, 9)]
    assert dropped(held_out, pieces) == list(range(len(held_out)))


def test_text_without_spaces():
    chinese = "".join(chr(0x4E00 + zlib.crc32(bytes([i])) % 20000) for i in range(60))
    assert len(words_of(chinese)) == 60
    assert dropped([chinese + "。", chinese[:40], chinese[::-1]], [chinese]) == [0, 1]


def test_hashes_tell_order_apart():
    words = WORDS[:14]
    assert gram_hashes(words).shape == (2,)
    assert gram_hashes(words[:12]).shape == (0,)
    assert gram_hashes(words).dtype == np.uint64
    assert gram_hashes(words[:13])[0] == gram_hashes(words)[0] != gram_hashes(words[12::-1])[0]
