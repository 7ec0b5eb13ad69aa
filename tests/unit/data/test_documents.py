import gzip
import json
import logging
import os
import random
import warnings
from types import SimpleNamespace

import datasets
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_context_prune.data import hub_datasets, json_records
from hf_context_prune.data.documents import TextDocument, TextSource, check_readable, load_documents
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.data.splits import TextSplit, hold_out_documents
from hf_context_prune.errors import CalibrationWarning, ConfigError, DataError
from tests.support.limits import within

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with a few merges; `<eos>` has id 0, and the context is short on purpose."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", model_max_length=16)


@pytest.fixture(autouse=True)
def hugging_face_cache(tmp_path, monkeypatch):
    """Keeps lock files of the tests' own datasets out of the user's cache."""
    cache = tmp_path.with_name(f"{tmp_path.name}-hugging-face-cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


def write_jsonl(path, records, compress=False):
    raw = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(raw) if compress else raw)
    return path


def source_of(*texts, sources=None, name="here"):
    sources = sources or ["s"] * len(texts)
    documents = (
        TextDocument(text, f"d{i}", source) for i, (text, source) in enumerate(zip(texts, sources, strict=True))
    )
    return TextSource.from_documents(documents, name=name)


# --- files ----------------------------------------------------------------------------------------------------------


def write_as(kind, path, texts):
    table = datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})
    if kind == ".jsonl":
        write_jsonl(path, list(table))
    elif kind == ".jsonl.gz":
        write_jsonl(path, list(table), compress=True)
    elif kind == ".json":
        path.write_text(json.dumps(list(table), indent=1))
    elif kind == ".csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_every_kind_of_table_reads_the_same(tmp_path, kind):
    texts = ["first text", "NA", 'with "quotes",\nnew lines and ünïcode']
    write_as(kind, tmp_path / f"corpus{kind}", texts)
    source = load_documents(tmp_path / f"corpus{kind}")
    assert [d.text for d in source.documents] == texts
    assert [d.doc for d in source.documents] == [f"corpus{kind}#{row}" for row in range(3)]
    assert {d.source for d in source.documents} == {f"corpus{kind}"}
    assert (source.name, source.revision, len(source)) == (f"corpus{kind}", None, 3)
    assert source.num_bytes == sum(len(t.encode()) for t in texts)
    assert source.fingerprint == load_documents(texts).fingerprint


def test_text_file_is_one_document_whatever_its_name(tmp_path):
    (tmp_path / "a[1] *.txt").write_text("\ufefffirst line\n\nsecond paragraph\n")
    (document,) = load_documents(str(tmp_path / "a[1] *.txt")).documents
    assert document == TextDocument("first line\n\nsecond paragraph\n", "a[1] *.txt#0", "a[1] *.txt")


def test_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.txt").write_text("bee")
    write_jsonl(folder / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    (folder / "sub" / "b.txt").write_text("sub bee")
    (folder / ".hidden" / "x.txt").write_text("no")
    (folder / ".x.txt").write_text("no")
    (folder / "image.png").write_bytes(b"\x89PNG")
    source = load_documents(folder)
    assert [(d.doc, d.text, d.source) for d in source.documents] == [
        ("a.jsonl#0", "one", "a.jsonl"),
        ("a.jsonl#1", "two", "a.jsonl"),
        ("b.txt#0", "bee", "corpus"),
        ("sub/b.txt#0", "sub bee", "corpus"),
    ]
    assert source.name == "corpus"


def test_records_of_a_doc_are_joined_in_order_and_source_is_kept(tmp_path):
    write_jsonl(
        tmp_path / "c.jsonl",
        [
            {"text": "a1", "doc": "a", "source": "x"},
            {"text": "b1", "doc": 7, "source": "y"},
            {"text": " ", "doc": "a", "source": "x"},
            {"text": "a2", "doc": "a", "source": "x"},
            {"text": "alone", "doc": None, "source": None},
        ],
    )
    documents = load_documents(tmp_path / "c.jsonl").documents
    assert [(d.text, d.doc, d.source) for d in documents] == [
        ("a1\n\na2", "a", "x"),
        ("b1", "7", "y"),
        ("alone", "c.jsonl#4", "c.jsonl"),
    ]


def test_records_without_a_name_are_documents_of_their_own(tmp_path):
    """NaN is what pandas writes for nothing: all such records were once one document."""
    names = [float("nan"), " ", "", None]
    records = [{"text": f"text {i}", "doc": name, "source": name} for i, name in enumerate(names)]
    write_jsonl(tmp_path / "c.jsonl", [*records, {"text": "last", "doc": "d", "source": " a "}])
    documents = load_documents(tmp_path / "c.jsonl").documents
    assert [document.doc for document in documents] == ["c.jsonl#0", "c.jsonl#1", "c.jsonl#2", "c.jsonl#3", "d"]
    assert [document.source for document in documents] == [*["c.jsonl"] * 4, "a"]


def test_a_document_of_several_sources_is_told(tmp_path, caplog):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}", "doc": i} for i in range(3)])
    source = load_documents(tmp_path)
    assert next((document.text, document.source) for document in source.documents) == ("a0\n\nb0", "a.jsonl")
    assert "3 of 3 documents have records of several sources, such as doc '0' in 'a.jsonl' and 'b.jsonl'" in caplog.text
    caplog.clear()
    load_documents(tmp_path / "a.jsonl")
    assert not caplog.text


def test_nothing_is_left_in_the_hugging_face_cache(tmp_path, hugging_face_cache):
    write_jsonl(tmp_path / "c.jsonl", [{"text": "a"}])
    load_documents(tmp_path / "c.jsonl")
    assert not hugging_face_cache.exists() or not list(hugging_face_cache.rglob("*"))


def test_max_documents_stops_at_whole_documents(tmp_path):
    records = [{"text": f"t{i}", "doc": f"d{i // 2}"} for i in range(10)]
    write_jsonl(tmp_path / "c.jsonl", records)
    source = load_documents(tmp_path / "c.jsonl", max_documents=2)
    assert [d.text for d in source.documents] == ["t0\n\nt1", "t2\n\nt3"]
    assert len(load_documents(source, max_documents=1)) == 1
    with pytest.raises(ConfigError, match="max_documents is 0"):
        load_documents(tmp_path / "c.jsonl", max_documents=0)


def test_saved_dataset_folder(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert [d.text for d in load_documents(tmp_path / "saved").documents] == ["a", "b"]
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="several splits"):
        load_documents(tmp_path / "splits")


# --- bad files ------------------------------------------------------------------------------------------------------

BROKEN = {
    "cut.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 1000)[:40],
    "not_gzip.jsonl.gz": b'{"text": "plain"}\n',
    "bad.jsonl": b'{"text": "a"}\n{"text": \n',
    "latin.jsonl": b'{"text": "caf\xe9"}\n',
    "latin.txt": b"caf\xe9 au lait",
    "latin.csv": b"text\ncaf\xe9\n",
    "quote.csv": b'text,doc\n"a\n',
    "not.parquet": b"nope",
    "scalar.json": b"3",
}


def test_unreadable_file_is_named(tmp_path, subtests):
    (tmp_path / "good.txt").write_text("good")
    for name, content in BROKEN.items():
        with subtests.test(name=name):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError, match=name):
                load_documents(tmp_path)
        (tmp_path / name).unlink()


EMPTY = ["empty.jsonl", "empty.txt", "empty.csv", "blank.txt", "blank.jsonl", "empty.jsonl.gz"]


def test_nothing_but_empty_text(tmp_path, subtests):
    for name in EMPTY:
        with subtests.test(name=name):
            raw = {"blank.txt": b" \n\t", "blank.jsonl": b'{"text": ""}\n{"text": null}\n{"text": " \\n"}\n'}.get(
                name, b""
            )
            (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
            with pytest.raises(DataError, match=f"{name}: no text"):
                load_documents(tmp_path / name)


MISSING = ["missing.jsonl", "./missing", "/missing/folder", "~missing", "a/b/missing.txt"]


def test_missing_path_is_no_hub_look_up(monkeypatch, subtests):
    for name in MISSING:
        with subtests.test(name=name):
            monkeypatch.setattr(hub_datasets, "HfApi", lambda: pytest.fail("the Hub was asked"))
            with pytest.raises(DataError, match="missing") as caught:
                load_documents(name)
            assert name in str(caught.value)


def test_folder_or_file_without_a_readable_kind(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    for path in (tmp_path, tmp_path / "image.png"):
        with pytest.raises(DataError, match=r"\.parquet"):
            load_documents(path)


# --- columns --------------------------------------------------------------------------------------------------------


COLUMNS = [
    ({"text": "t", "content": "c", "title": "x"}, None, "t"),
    ({"content": "c", "title": "x"}, None, "c"),
    ({"body": "b", "year": 1999, "doc": "d", "source": "s"}, None, "b"),
    ({"text": "t", "body": "b"}, "body", "b"),
    ({"en": "cat", "ch": "貓"}, "en, ch", "cat\n貓"),
    ({"a,b": "comma", "a": "x", "b": "y"}, "a,b", "comma"),
    ({"doc": "this is the text"}, "doc", "this is the text"),
]


def test_choice_of_the_column(subtests):
    for record, text_column, expected in COLUMNS:
        with subtests.test(record=record, text_column=text_column, expected=expected):
            (document,) = load_documents([record], text_column=text_column).documents
            assert document.text == expected


def test_column_errors_list_the_columns(tmp_path):
    with pytest.raises(DataError, match=r"'body'.*title, summary"):
        load_documents([{"title": "a", "summary": "b"}], text_column="body")
    with pytest.raises(DataError, match=r"text_column.*title, summary"):
        load_documents([{"title": "a", "summary": "b"}])
    with pytest.raises(DataError, match=r"record 2.*'text'.*int"):
        load_documents([{"text": "a"}, {"text": 3}])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="'body'"):
        load_documents(tmp_path, text_column="body")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "no", "body": "b"}])
    assert [d.text for d in load_documents(tmp_path, text_column="body").documents] == ["a", "b"]


@pytest.mark.parametrize("from_file", [True, False])
def test_messages_go_through_the_chat_template(tmp_path, tokenizer, from_file):
    record = {"id": "x", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    source = write_jsonl(tmp_path / "chat.jsonl", [record]) if from_file else [record]
    with pytest.raises(DataError, match=r"record 1.*no tokenizer"):
        load_documents(source)
    with pytest.raises(DataError, match="no chat template"):
        load_documents(source, tokenizer=tokenizer)
    chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=CHAT_TEMPLATE)
    (document,) = load_documents(source, tokenizer=chatty).documents
    assert document.text == "<user>hi<assistant>yo"
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        load_documents(source, tokenizer=chatty)


# --- Python objects -------------------------------------------------------------------------------------------------


def test_a_tokenised_dataset_is_decoded(tokenizer):
    """As a Trainer has it: columns of token ids, masks and labels, and no text."""
    words = ["the first text", "and another one"]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in map(tokenizer.encode, words)]
    torch_rows = datasets.Dataset.from_list(rows).with_format("torch")
    arrays = [{"input_ids": torch.tensor(row["input_ids"]).numpy()} for row in rows]
    for source in (rows, arrays, torch_rows, torch_rows.to_iterable_dataset()):
        assert [one.text for one in load_documents(source, tokenizer=tokenizer).documents] == words
    with pytest.raises(DataError, match="token ids, but no tokenizer was given"):
        load_documents(rows)
    with pytest.raises(DataError, match=r"record 1, 'input_ids': the token id 999999 is not one of this tokenizer"):
        load_documents([{"input_ids": [1, 999_999]}], tokenizer=tokenizer)
    end = tokenizer.eos_token_id
    (packed,) = load_documents(
        [{"input_ids": [*rows[0]["input_ids"], end, *rows[1]["input_ids"]]}], tokenizer=tokenizer
    ).documents
    assert packed.text == "\n\n".join(words)
    with pytest.raises(DataError, match="holds list, not text"):
        load_documents([{"input_ids": [True, False]}], tokenizer=tokenizer)
    assert load_documents([{"input_ids": [1], "body": "text"}], tokenizer=tokenizer).documents[0].text == "text"


def test_in_memory_sources_agree():
    texts = ["one", "two", "", "three"]
    dataset = datasets.Dataset.from_dict({"text": texts})
    read = [
        load_documents(source)
        for source in (texts, [{"text": t} for t in texts], dataset, dataset.to_iterable_dataset(), dataset["text"])
    ]
    assert all(source == read[0] for source in read)
    assert [d.doc for d in read[0].documents] == ["in-memory#0", "in-memory#1", "in-memory#3"]
    assert load_documents(read[0]) == read[0]


BAD_OBJECTS = [
    ([], "no text"),
    (["", " "], "no text"),
    (42, "type int"),
    (["a", 3], "type list"),
    (datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]})), "splits.*test"),
    (["half a pair \ud800"], "not valid Unicode"),
    (TextSource((), "x", None, ""), "no text"),
]


def test_bad_objects(subtests):
    for source, message in BAD_OBJECTS:
        with subtests.test(source=source, message=message), pytest.raises(DataError, match=message):
            load_documents(source)


# --- the Hub --------------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands in for HfApi and load_dataset; records what they are asked."""

    def __init__(self, monkeypatch, records=None, api_error=None, load_errors=()):
        self.records = records if records is not None else [{"text": f"text {i}"} for i in range(50)]
        self.api_error, self.load_errors, self.loads = api_error, list(load_errors), []
        monkeypatch.setattr(hub_datasets, "HfApi", lambda: self)
        monkeypatch.setattr(hub_datasets, "load_dataset", self.load_dataset)

    def dataset_info(self, repo_id, revision=None):
        if self.api_error:
            raise self.api_error
        return SimpleNamespace(sha=("e" if revision == "refs/convert/parquet" else "c") * 40)

    def load_dataset(self, *args, **kwargs):
        self.loads.append((args, kwargs))
        if self.load_errors:
            raise self.load_errors.pop(0)
        return datasets.IterableDataset.from_generator(lambda: iter(self.records))


def test_hub_stream_is_pinned_and_reproducible(monkeypatch):
    hub = FakeHub(monkeypatch)
    source = load_documents("owner/name:config@validation")
    assert hub.loads == [
        (("owner/name", "config"), {"split": "validation", "revision": "c" * 40, "streaming": True}),
    ]
    assert (source.name, source.revision) == ("owner/name:config@validation", "c" * 40)
    assert sorted(d.text for d in source.documents) == sorted(r["text"] for r in hub.records)
    assert load_documents("owner/name:config@validation") == source
    assert load_documents("owner/name:config@validation", seed=1).fingerprint != source.fingerprint
    assert load_documents("name").name == "name@train"


def test_hub_stream_is_cut_by_default(monkeypatch):
    FakeHub(monkeypatch)
    monkeypatch.setattr(hub_datasets, "HUB_MAX_DOCUMENTS", 7)
    assert len(load_documents("owner/name")) == 7
    assert len(load_documents("owner/name", max_documents=9)) == 9


def test_hub_records_of_a_doc_stay_in_order(monkeypatch):
    FakeHub(monkeypatch, [{"text": f"t{i}", "doc": f"d{i // 10}"} for i in range(30)])
    source = load_documents("owner/name")
    assert [d.text for d in source.documents] == ["\n\n".join(f"t{10 * i + j}" for j in range(10)) for i in range(3)]


def test_presets_name_id_config_split_and_column(monkeypatch):
    hub = FakeHub(monkeypatch, [{"en": "cat", "ch": "貓"}])
    source = load_documents("mini-gpts-translation")
    assert source.name == "zetavg/coct-en-zh-tw-translations-twp-300k@train"
    assert [d.text for d in source.documents] == ["cat\n貓"]
    assert [d.text for d in load_documents("mini-gpts-translation", text_column="ch").documents] == ["貓"]
    hub.records = [{"text": "law"}]
    assert [d.source for d in load_documents("mini-gpts-law").documents] == [
        f"lexlms/legal_lama:{config}" for config in ("us_terms", "us_crimes", "contract_sections")
    ]
    assert set(hub_datasets.PRESETS) == {f"mini-gpts-{name}" for name in ("medicine", "law", "translation", "wikitext")}


def test_local_path_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_datasets, "HfApi", lambda: pytest.fail("the Hub was asked"))
    for name in ("mini-gpts-law", "owner/name"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text(name)
        assert load_documents(name).documents[0].text == name


def test_dataset_with_a_script_is_read_from_its_parquet_export(monkeypatch):
    refusal = RuntimeError("Dataset scripts are no longer supported, but found legal_lama.py")
    hub = FakeHub(monkeypatch, load_errors=[refusal])
    assert load_documents("lexlms/legal_lama:us_terms@test").revision == "e" * 40
    assert hub.loads[-1] == (
        ("lexlms/legal_lama",),
        {"data_dir": "us_terms", "split": "test", "revision": "e" * 40, "streaming": True},
    )


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OfflineModeIsEnabled("offline mode is enabled"), "HF_HUB_OFFLINE"),
        (HTTPError("no route"), "network"),
        (ConnectionError("Couldn't reach the Hub"), "network"),
        (RepositoryNotFoundError("404", response=RESPONSE), "spelling"),
        (DatasetNotFoundError("doesn't exist"), "spelling"),
        (GatedRepoError("403", response=RESPONSE), "gated"),
        (ValueError("Unknown split 'x'. Should be one of ['train']"), "config and split.*Should be one of"),
        (RuntimeError("something else"), "something else"),
    ],
)
@pytest.mark.parametrize("where", ["api", "load"])
def test_hub_errors_have_a_remedy(monkeypatch, error, remedy, where):
    FakeHub(monkeypatch, api_error=error if where == "api" else None, load_errors=[error])
    with pytest.raises(DataError, match=f"owner/name.*{remedy}"):
        load_documents("owner/name")


def test_error_in_mid_stream_and_malformed_id(monkeypatch):
    FakeHub(monkeypatch)

    def broken():
        yield {"text": "a", "doc": "a"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(hub_datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(broken))
    with pytest.raises(DataError, match="reset by peer"):
        load_documents("owner/name")
    with pytest.raises(DataError, match="neither a file"):
        load_documents("not an id")


# --- holding out ----------------------------------------------------------------------------------------------------


def split_docs(source, **options):
    return tuple({d.doc for d in side.documents} for side in hold_out_documents(source, **options))


def test_hold_out_is_disjoint_complete_and_independent_of_order():
    source = source_of(*(f"text {i}" for i in range(100)))
    rest, held = split_docs(source)
    assert len(held) == 10
    assert not rest & held
    assert rest | held == {d.doc for d in source.documents}
    shuffled = list(source.documents)
    random.Random(3).shuffle(shuffled)
    assert split_docs(TextSource.from_documents(shuffled)) == (rest, held)
    assert split_docs(source, seed=1) != (rest, held)
    assert hold_out_documents(source) == hold_out_documents(source)
    assert len(split_docs(source, max_documents=3)[1]) == 3


def test_hold_out_takes_its_share_of_every_source():
    source = source_of(*(f"text {i}" for i in range(100)), sources=["a"] * 60 + ["b"] * 30 + ["c"] * 10)
    _, held = hold_out_documents(source, fraction=0.2)
    counts = {s: sum(d.source == s for d in held.documents) for s in "abc"}
    assert counts == {"a": 12, "b": 6, "c": 2}
    assert TextSplit.of(source).how.endswith("held out before calibration, by document.")


def test_a_split_tells_sources_that_are_too_small_to_be_tested():
    source = source_of(*(f"text {i}" for i in range(62)), sources=["a"] * 60 + ["b", "c"])
    assert TextSplit.of(source).how.endswith("by document, of 1 of its 3 sources.")


def test_hold_out_keeps_docs_and_equal_texts_together():
    documents = [TextDocument(f"text {i % 7} of {i}", f"d{i % 10}", "s") for i in range(40)]
    documents += [TextDocument("the same", f"twin{i}", "s") for i in range(5)]
    for seed in range(20):
        rest, held = hold_out_documents(TextSource.from_documents(documents), fraction=0.3, seed=seed)
        assert not {d.doc for d in rest.documents} & {d.doc for d in held.documents}
        assert not {d.text for d in rest.documents} & {d.text for d in held.documents}


def test_hold_out_leaves_a_document_on_each_side():
    two = source_of("a", "b")
    assert all(len(side) == 1 for fraction in (0.01, 0.99) for side in hold_out_documents(two, fraction=fraction))
    for source in (source_of("a"), source_of("same", "same")):
        with pytest.raises(DataError, match="at least 2"):
            hold_out_documents(source)
    for options in ({"fraction": 0.0}, {"fraction": 1.0}, {"fraction": 1.5}, {"max_documents": 0}):
        with pytest.raises(ConfigError):
            hold_out_documents(two, **options)


# --- blocks ---------------------------------------------------------------------------------------------------------


def words(n, seed=0):
    draw = random.Random(seed)
    return " ".join(draw.choice(["cat", "sat", "mat", "the", "on"]) for _ in range(n))


def test_blocks_are_the_documents_joined_by_eos(tokenizer):
    source = source_of(words(20, 1), words(20, 2), words(20, 3))
    parts = [tokenizer(d.text, add_special_tokens=False, verbose=False)["input_ids"] for d in source.documents]
    total = sum(map(len, parts)) + 2
    blocks = tokenize_samples(source, tokenizer, num_samples=1, max_seq_length=total, seed=0)
    assert (blocks.dtype, blocks.shape) == (torch.int64, (1, total))
    ids = blocks[0].tolist()
    assert ids.count(tokenizer.eos_token_id) == 2
    pieces = tokenizer.decode(ids).split("<eos>")
    assert sorted(pieces) == sorted(d.text for d in source.documents)


def test_blocks_are_deterministic_and_follow_the_seed(tokenizer):
    source = source_of(*(words(30, i) for i in range(50)))
    first, again, other = (
        tokenize_samples(source, tokenizer, num_samples=4, max_seq_length=32, seed=seed) for seed in (0, 0, 1)
    )
    assert first.shape == (4, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    backwards = TextSource.from_documents(reversed(source.documents))
    assert torch.equal(first, tokenize_samples(backwards, tokenizer, num_samples=4, max_seq_length=32))


def test_long_document_does_not_dominate(tokenizer):
    long = " ".join(["LONG"] * 20_000)
    source = source_of(long, *(words(40, i) for i in range(200)))
    for seed in range(5):
        blocks = tokenize_samples(source, tokenizer, num_samples=100, max_seq_length=32, seed=seed)
        long_tokens = tokenizer.decode(blocks.flatten().tolist()).count("LONG") * 4  # four letters, a token each
        assert long_tokens <= 4 * 32


def test_long_document_gives_more_where_there_is_too_little_text(tokenizer):
    text = words(5_000)
    blocks = tokenize_samples(source_of(text, "cat"), tokenizer, num_samples=40, max_seq_length=32)
    assert blocks.shape == (40, 32)
    longest = max(tokenizer.decode(blocks.flatten().tolist()).split("<eos>"), key=len)
    assert longest.strip() in text


def test_too_little_text_warns_with_both_numbers(tokenizer):
    source = source_of(words(100))
    with pytest.warns(CalibrationWarning, match=r"1000 .*\D\d+ of 8 tokens"):
        blocks = tokenize_samples(source, tokenizer, num_samples=1000, max_seq_length=8)
    assert 1 < len(blocks) < 1000
    with pytest.warns(CalibrationWarning, match="asked for 2 "):
        short = tokenize_samples(
            source_of("the cat sat on the mat, twice"), tokenizer, num_samples=2, max_seq_length=512
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="at least 8"):
            tokenize_samples(source_of("cat"), tokenizer, num_samples=2, max_seq_length=512)
        tokenize_samples(source, tokenizer, num_samples=1000, max_seq_length=8, warn_if_short=False)
    assert short.shape[0] == 1
    assert 8 <= short.shape[1] < 512


def test_shortened_single_block_warns_even_if_one_was_asked(tokenizer):
    with pytest.warns(CalibrationWarning, match="asked for 1 "):
        tokenize_samples(source_of("the dog sat on a mat"), tokenizer, num_samples=1, max_seq_length=512)


def test_bad_sizes_and_no_length_warning(tokenizer, capfd):
    for options in ({"num_samples": 0, "max_seq_length": 8}, {"num_samples": 1, "max_seq_length": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            tokenize_samples(source_of("a b c d e f g h i j"), tokenizer, **options)
    tokenize_samples(source_of(words(500)), tokenizer, num_samples=2, max_seq_length=64)
    assert "longer than" not in capfd.readouterr().err


def test_separator_falls_back_to_bos_then_to_none(tokenizer):
    source = source_of("aaaaaaaa", "bbbbbbbb")
    backend = tokenizer.backend_tokenizer
    with_bos = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<eos>")
    assert tokenize_samples(source, with_bos, num_samples=1, max_seq_length=17).flatten().tolist()[8] == 0
    bare = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert 0 not in tokenize_samples(source, bare, num_samples=1, max_seq_length=16)


# --- slips ----------------------------------------------------------------------------------------------------------


def test_blank_source_is_not_the_current_folder(tmp_path, monkeypatch, subtests):
    for blank in ["", " ", "\n"]:
        with subtests.test(blank=blank):
            write_jsonl(tmp_path / "a.jsonl", [{"text": "mine"}])
            monkeypatch.chdir(tmp_path)
            with pytest.raises(DataError, match="shell variable"):
                load_documents(blank)
            assert len(load_documents(".")) == 1


def test_model_folders_inside_a_folder_of_text_are_skipped(tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "mine"}])
    for name in ("out", "deep/out"):
        model = tmp_path / name
        (model / "inner").mkdir(parents=True)
        for file in ("config.json", "manifest.json", "tokenizer.json"):
            (model / file).write_text('{"format": "hf_context_prune"}')
        (model / "model.safetensors").write_bytes(b"")
        (model / "inner" / "notes.txt").write_text("not text for calibration")
    (tmp_path / "deep" / "b.txt").write_text("yours")
    assert [document.text for document in load_documents(tmp_path).documents] == ["mine", "yours"]
    assert "deep/out: skipped" in caplog.text
    with pytest.raises(DataError, match="model folder"):
        load_documents(tmp_path / "out")


def test_check_readable_looks_without_a_tokenizer(tmp_path):
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    check_readable(chat)
    check_readable(["a text"])
    check_readable(source_of("a text"))
    with pytest.raises(DataError, match="absent"):
        check_readable(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="'body'"):
        check_readable(chat, text_column="body")
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="can't be read"):
        check_readable(tmp_path / "bad.jsonl")


def test_pipes_and_devices_are_no_text(tmp_path, subtests):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "a.jsonl")
    ends = os.pipe()  # as bash gives for --data <(...)
    pipes = (tmp_path / "pipe.txt", tmp_path / "folder", f"/dev/fd/{ends[0]}")
    for path, kind in (*((pipe, "named pipe") for pipe in pipes), ("/dev/zero", "device")):
        for read in (load_documents, check_readable):
            with subtests.test(str(path), by=read), within(seconds=2), pytest.raises(DataError, match=f"{kind}.*save"):
                read(path)
    for end in ends:
        os.close(end)


def test_an_error_of_reading_is_told_once(tmp_path, caplog):
    (tmp_path / "bad.csv").write_text('text\n"a\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more PAR1")
    (tmp_path / "bad.jsonl").write_text('{"text": 1')
    for name in ("bad.csv", "bad.parquet", "bad.jsonl"):
        with pytest.raises(DataError, match=f"{name}: can't be read"):
            load_documents(tmp_path / name)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_paths_that_can_not_be_looked_up(subtests):
    for path in ("a" * 300, "a" * 300 + ".txt", "a\0b", "~nobody-here/a.txt", "b/" * 3000, "\ud800"):
        with subtests.test(repr(path[:10])), pytest.raises(DataError, match=r"The path '.*"):
            load_documents(path)


def test_reading_a_file_asks_no_server(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.load, "get_session", lambda: SimpleNamespace(head=lambda *a, **k: asked.append(a)))
    for name, content in (("a.txt", "a text"), ("a.jsonl", '{"text": "a text"}'), ("a.csv", "text\na text\n")):
        (tmp_path / name).write_text(content)
        assert [document.text.strip() for document in load_documents(tmp_path / name).documents] == ["a text"]
    assert asked == []
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_lines_that_are_null(tmp_path, subtests):
    """pyarrow 25 ends the process by a signal for the first of them."""
    line = b'{"text": "a"}\n'
    for name, content, number in (
        ("a.json", b"null", 1),
        ("b.jsonl", b" null \n" + line, 1),
        ("c.jsonl", b"\xef\xbb\xbfnull\n" + line, 1),
        ("d.jsonl", line * 3 + b"null\n", 4),
        ("e.jsonl.gz", gzip.compress(b"\n\nnull\n"), 3),
        ("i.jsonl", b" " * 1_100_000 + b"null\n" + line, 1),
        ("j.jsonl", line + b" " * 11_000_000 + b"null\n" + line, 2),
    ):
        (tmp_path / name).write_bytes(content)
        for read in (load_documents, check_readable):
            with subtests.test(name, read=read), pytest.raises(DataError, match=f"{name}: line {number} is null"):
                read(tmp_path / name)
    for name, content in (
        ("f.json", b"[null, 1]"),
        ("g.json", b'[1e999, {"text": "a"}]'),
        ("h.json", b"[[1]]"),
        ("k.jsonl", b"\n[null,\n1]"),
    ):
        (tmp_path / name).write_bytes(content)
        with subtests.test(name), pytest.raises(DataError, match=f"{name}: element 1 of the list is"):
            load_documents(tmp_path / name)
    (tmp_path / "strings.json").write_bytes(b'["a", "b"]')
    assert [document.text for document in load_documents(tmp_path / "strings.json").documents] == ["a", "b"]
    (tmp_path / "good.json").write_bytes(b'[\n{"text": "null", "b":\nnull}\n]')
    assert [document.text for document in load_documents(tmp_path / "good.json").documents] == ["null"]
    (tmp_path / "good.jsonl").write_bytes(b'{"text": "null"}\n{"text": null}\n')
    assert [document.text for document in load_documents(tmp_path / "good.jsonl").documents] == ["null"]


def test_json_that_is_no_plain_list_of_lines(tmp_path, monkeypatch, subtests):
    monkeypatch.setattr(json_records, "_MAX_BYTES", 2**21)
    for name, content, expected in (
        ("a.json", b'{\n "text": "a"\n}\n', ["a"]),
        ("b.jsonl", b'{\n"text": "a"}\r\n{"text":\n"b"}', ["a", "b"]),
        ("c.jsonl", b'\xef\xbb\xbf\n\n[\n"a"\n]\n\n', ["a"]),
        (
            "d.jsonl",
            b'"a"\n\n{"text": "2024-01-01", "doc": 1, "x": {}}\n{"text": "b", "y": [1, "z"]}',
            ["a", "2024-01-01", "b"],
        ),
    ):
        with subtests.test(name):
            (tmp_path / name).write_bytes(content)
            assert [document.text for document in load_documents(tmp_path / name).documents] == expected
    for name, content, said in (
        ("e.jsonl", b'{"text": "a"}\n{"text" 1}\n', "':' delimiter in line 2, column 9"),
        ("f.jsonl", b"{" * 100_000, "Expecting property name"),
        ("g.jsonl", b"[" * 1_000_000, "RecursionError"),
        ("h.json", b'{"text": "a"}\n[1]', r"line 2 is \[1\], not a record"),
        ("i.json", b'[1]\n{"text": "a"}', r"value 1 is \[1\], not a record"),
        ("j.jsonl", b'{"text": "a"}\n{"text": 3}', "record 2, 'text' holds int"),
        ("k.jsonl.gz", gzip.compress(b" " * (2**21 + 1)), "at once; write one record per line"),
    ):
        (tmp_path / name).write_bytes(content)
        with subtests.test(name), pytest.raises(DataError, match=said):
            load_documents(tmp_path / name)
