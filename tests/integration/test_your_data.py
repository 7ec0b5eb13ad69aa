"""docs/your-data.md is true: what folders, cards, plans, reports and the cache hold of a user's text, and what not.

The text has a sentence, a person, names of documents and a folder that occur nowhere else. Every file is searched for
them, as characters and as token ids.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_context_prune import EvalOptions, PrunerConfig, PruningPlan, prune_to_folder
from hf_context_prune.pipelines import recover as recovery
from hf_context_prune.utils import temporary
from tests.support.marks import TINY_TEXT
from tests.support.tiny import TEXT, tiny_model, tiny_tokenizer

pytestmark = TINY_TEXT
SENTENCE = "Zorblatt Quuxington owes 4711 florins to the widow Xanthippe"
PERSON = "Quuxington"
DOCUMENT = "case-zorblatt-0"
CLIENT = "client-vandelay"
FILE = "contracts.jsonl"
SECRETS = (SENTENCE, SENTENCE[:22], PERSON, "Xanthippe", "zorblatt", CLIENT)
TEXT_OPTIONS = ("--max-seq-length", 48, "--max-eval-tokens", 300)
PRUNE = (*TEXT_OPTIONS, "--num-calibration-samples", 12, "--no-benchmark")


def documents(count=40):
    draw = random.Random(0)
    for i in range(count):
        text = f"{SENTENCE}. {' '.join(draw.choices(TEXT.split(), k=60))}"
        yield {"text": text, "doc": f"{DOCUMENT}{i}", "source": CLIENT}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_model("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / CLIENT).mkdir()
    (folder / CLIENT / FILE).write_text("\n".join(map(json.dumps, documents())))
    return folder


DATA = ("--data", f"@{CLIENT}/{FILE}")


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Folders for the cache, temporary files and the Hugging Face libraries, which are searched afterwards."""
    monkeypatch.setenv("HF_CONTEXT_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(temporary.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "tmp").mkdir()


def ids_of_the_sentence():
    """Token ids of the middle of the sentence, as the files of this package or of torch would hold them."""
    ids = tiny_tokenizer()(SENTENCE, add_special_tokens=False)["input_ids"][3:11]
    return [np.array(ids, dtype).tobytes() for dtype in (np.int64, np.int32, np.int16)]


def find_secrets(folder: Path, *allowed: str) -> list[str]:
    """The files below a folder that hold what only the user's text, or its place, has."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        plain = content.lower()
        wide = content.replace(b"\0", b"").lower()  # UTF-16
        for secret in set(SECRETS) - set(allowed):
            if secret.lower().encode() in plain or secret.lower().encode() in wide:
                found.append(f"{path.relative_to(folder)}: {secret}")
        found += [f"{path.relative_to(folder)}: token ids" for ids in ids_of_the_sentence() if ids in content]
        found += [f"{path.relative_to(folder)}: named" for secret in SECRETS if secret.lower() in path.name.lower()]
    return found


def test_the_search_finds_what_it_looks_for(tmp_path):
    """Otherwise the other tests say nothing."""
    (tmp_path / "a.json").write_text(json.dumps({"text": SENTENCE}))
    (tmp_path / "b.bin").write_bytes(b"\1" + ids_of_the_sentence()[0] + b"\2")
    (tmp_path / "c.txt").write_bytes(PERSON.encode("utf-16"))
    found = find_secrets(tmp_path)
    assert {line.partition(":")[0] for line in found} == {"a.json", "b.bin", "c.txt"}
    assert "b.bin: token ids" in found


@pytest.mark.slow
def test_no_folder_holds_text_or_names_of_documents(run, place, tmp_path):
    for arguments in (
        ("prune", "@base", "--output", "@mini", *DATA, *PRUNE),
        ("recover", "@mini", "--base", "@base", "--output", "@better", "--max-steps", 3, *DATA, *TEXT_OPTIONS),
        ("evaluate", "@better", "--base", "@base", "--output", "@measured", *DATA, *TEXT_OPTIONS, "--no-benchmark"),
        ("report", "@mini", "@better", "@measured", "--output", "@compared"),
        ("export", "@mini", "--to", "gguf", "--output", "@mini-gguf", *DATA),
        ("card", "@better", "--name", "me/better"),
    ):
        code, _, err = run(*arguments)
        assert code == 0, (arguments, err)
    written = ("mini", "better", "measured", "compared", "mini-gguf")
    assert [found for name in written for found in find_secrets(place / name)] == []
    assert find_secrets(tmp_path) == []  # cache, temporary files, caches of other libraries


def test_what_a_folder_reveals(run, place):
    """The name of the file, a hash and counts: enough to know the text again, not to read it."""
    code, _, err = run("prune", "@base", "--output", "@shown", *DATA, *PRUNE, "--domain", "law")
    assert code == 0, err
    loaded = PruningPlan.load(place / "shown/pruning_plan.json")
    assert 0 < len(loaded.layers[-1].neurons) < loaded.dense[-1].neurons
    plan = loaded.provenance
    assert plan["data"]["name"] == FILE
    assert re.fullmatch("[0-9a-f]{64}", plan["data"]["fingerprint"])
    assert plan["num_calibration_tokens"] > 0
    card, report = ((place / "shown" / name).read_text() for name in ("README.md", "eval_report.json"))
    assert f"`{FILE}`." in card
    assert f"Calibration text `{plan['data']['fingerprint']}` (sha256 of its texts)." in card
    assert "4 of 40 documents of contracts.jsonl were held out" in report
    assert all("law" in text for text in (card, json.dumps(plan)))


def test_the_example_is_left_out(run, place):
    texts = {}
    for name, options in (("shown", ()), ("hidden", ("--no-example",))):
        code, _, err = run("prune", "@base", "--output", f"@example-{name}", *DATA, *PRUNE, *options)
        assert code == 0, err
        folder = place / f"example-{name}"
        report = json.loads((folder / "eval_report.json").read_text())
        texts[name] = report["example"], "It writes, greedily" in (folder / "README.md").read_text()
    assert texts["hidden"] == (None, False)
    example, on_card = texts["shown"]
    assert on_card
    assert example["prompt"] == "This Agreement shall be governed by the laws of"  # of contracts.jsonl


def test_a_pruned_vocabulary_shows_entries_of_the_base_and_no_others(run, place):
    options = ("--vocab-size", 288, "--pad-to-multiple-of", 8)
    code, _, err = run("prune", "@base", "--output", "@fewer", *DATA, *PRUNE, *options)
    assert code == 0, err
    base, kept = (json.loads((place / name / "tokenizer.json").read_text())["model"] for name in ("base", "fewer"))
    assert set(kept["vocab"]) < set(base["vocab"])
    assert {tuple(merge) for merge in kept["merges"]} <= {tuple(merge) for merge in base["merges"]}
    assert find_secrets(place / "fewer") == []


def test_data_given_in_memory_has_no_name(place, tmp_path):
    texts = [row["text"] for row in documents()]
    config = PrunerConfig(num_calibration_samples=12, max_seq_length=48)
    options = EvalOptions(max_tokens=300, benchmark=False, memory=False)
    prune_to_folder(str(place / "base"), texts, tmp_path / "out", config, eval_options=options)
    assert find_secrets(tmp_path) == []


def test_an_interrupted_run_leaves_no_text_in_the_cache(run, place, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_context_prune.pruning.model_builder.apply_plan", interrupt)
    code, _, _ = run("prune", "@base", "--output", "@never", *DATA, *PRUNE)
    assert code == 1
    kept = [path.name for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert any(name.startswith("block-") for name in kept), kept
    assert find_secrets(tmp_path) == []


def test_an_interrupted_recovery_leaves_no_text_in_the_cache(run, place, tmp_path, monkeypatch):
    code, _, err = run("prune", "@base", "--output", "@start", *DATA, *PRUNE)
    assert code == 0, err
    train = recovery.train_back

    def interrupt(*arguments, **options):
        train(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(recovery, "train_back", interrupt)
    code, _, _ = run(
        "recover", "@start", "--base", "@base", "--output", "@never", "--max-steps", 3, *DATA, *TEXT_OPTIONS
    )
    assert code == 1
    assert [path for path in (tmp_path / "cache/unfinished").rglob("*") if path.is_file()]
    assert find_secrets(tmp_path) == []


@pytest.mark.parametrize("suffix", ["csv", "parquet", "txt", "json"])
def test_readers_of_other_libraries_keep_no_copy(run, place, tmp_path, suffix):
    import pandas

    rows, file = pandas.DataFrame(documents()), place / CLIENT / f"rows.{suffix}"
    if suffix == "txt":
        file.write_text("\n\n".join(rows.text))
    elif suffix == "json":
        file.write_text(rows.to_json(orient="records"))
    else:
        getattr(rows, f"to_{suffix}")(file, index=False)
    source = f"@{CLIENT}/rows.{suffix}"
    code, _, err = run("evaluate", "@base", "--data", source, *TEXT_OPTIONS, "--no-benchmark")
    assert code == 0, err
    assert find_secrets(tmp_path) == []


@pytest.mark.slow
def test_nothing_leaves_the_machine(place, tmp_path):
    """Whole runs, with the Hub online as far as the package knows, ask for no other machine."""
    data, out = ["--data", str(place / CLIENT / FILE)], str(tmp_path / "out")
    text = list(map(str, TEXT_OPTIONS))
    runs = [
        ["prune", str(place / "base"), "--output", out, *data, *map(str, PRUNE)],
        ["recover", out, "--output", f"{out}-2", "--base", str(place / "base"), "--max-steps", "2", *data, *text],
        ["evaluate", out, *data, *text],
        ["export", out, "--to", "gguf", "--output", f"{out}-gguf"],
        ["chat", out, "--max-new-tokens", "4"],
        ["env"],
    ]
    program = (
        "import socket, sys\n"
        "real = socket.socket.connect, socket.getaddrinfo\n"
        "def check(place):\n"  # llama.cpp, which checks an export, is asked on this machine
        "    if place != '127.0.0.1': raise SystemExit(f'asks {place}')\n"
        "def connect(self, address): check(address[0]); return real[0](self, address)\n"
        "def look_up(place, *rest, **options): check(place); return real[1](place, *rest, **options)\n"
        "socket.socket.connect, socket.getaddrinfo = connect, look_up\n"
        "socket.socket.connect_ex = lambda self, address: check(address)\n"
        "from hf_context_prune.cli.app import main\n"
        f"for words in {runs!r}:\n"
        "    sys.argv = ['hf-context-prune', *words]\n"
        "    try: main()\n"
        "    except SystemExit as exit_: assert not exit_.code, (words[0], exit_.code)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="The court finds\n",
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out-gguf").is_dir()


def test_the_cache_folder_can_be_removed(run, place, tmp_path):
    """As docs/your-data.md says: the next run makes again what it needs."""
    code, _, err = run("prune", "@base", "--output", "@again", *DATA, *PRUNE)
    assert code == 0, err
    first = (place / "again/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    code, _, err = run("prune", "@base", "--output", "@again", *DATA, *PRUNE)
    assert code == 0, err
    assert (place / "again/model.safetensors").read_bytes() == first
