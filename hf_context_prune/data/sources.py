"""Where records come from (files, folders, Hub datasets, Python objects) and where their text is.

:func:`open_source` opens whatever a user may name; `data.py` turns its records into documents.
"""

import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import tqdm
from transformers import PreTrainedTokenizerBase

from hf_context_prune.errors import DataError

_LOGGER = logging.getLogger(__name__)

Record: TypeAlias = Mapping[str, Any]

#: Dataset ids that the code of "Mini-GPTs" (arXiv 2312.12682, its ``dataset.py``) calibrates on, as
#: (dataset id, config, split, text_column). Its law set is three configs one after the other ("+"); its Skyrim and
#: economics sets are CSV files of other repositories, not Hub datasets, and so have no preset.
PRESETS: dict[str, tuple[str, str | None, str, str | None]] = {
    "mini-gpts-medicine": ("Laurent1/MedQuad-MedicalQnADataset_128tokens_max", None, "train", "text"),
    "mini-gpts-law": ("lexlms/legal_lama", "us_terms+us_crimes+contract_sections", "test", "text"),
    "mini-gpts-translation": ("zetavg/coct-en-zh-tw-translations-twp-300k", None, "train", "en,ch"),
    "mini-gpts-wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
}
#: A Hub stream is cut after this many documents unless ``max_documents`` says otherwise.
HUB_MAX_DOCUMENTS = 20_000

#: File suffix -> (reader of the ``datasets`` library, its options).
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document"}),
    ".jsonl": ("json", {}),
    ".jsonl.gz": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # a text that reads "None" or "NA" is a text
    ".parquet": ("parquet", {}),
}
PEEK = 32  # records looked at to choose the text column
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")


@dataclass(frozen=True)
class Table:
    """Records with columns, opened but not read.

    Attributes:
        records: An iterable that can be read once; it raises `DataError` where reading fails.
        name: In messages, and in the names of documents that have none.
        source: Source of the records that don't name their own.
        has_columns: False for plain text, of which ``text_column`` says nothing.
    """

    records: Iterable[Record]
    name: str
    source: str
    has_columns: bool = True


@dataclass(frozen=True)
class OpenedSource:
    """Tables to read one after the other.

    Attributes:
        tables: The tables in reading order.
        name: A path's base name, a Hub id with config and split, or "in-memory".
        revision: Commit sha of a Hub dataset.
        text_column: The preset's text column.
        max_documents: Where to stop unless the user says otherwise.
    """

    tables: Sequence[Table]
    name: str
    revision: str | None = None
    text_column: str | None = None
    max_documents: int | None = None


def open_source(source: object, *, text_column: str | None, seed: int, scratch: str) -> OpenedSource:
    """Opens a path, a preset, a Hub dataset id or a Python object (see `load_documents`), in this order.

    Args:
        source: What the user named.
        text_column: The user's text column, to refuse one where there are no columns at all.
        seed: Order of a Hub stream.
        scratch: A folder that outlives the reading, for lock files of the ``datasets`` library.

    Raises:
        DataError: Nothing of that name or kind can be read.
    """
    if not isinstance(source, (str, Path)):
        return OpenedSource([Table(_in_memory_records(source), "in-memory", "in-memory")], "in-memory")
    if isinstance(source, str) and not source.strip():  # as a path it would be the current folder
        raise DataError(
            f"the text source is {source!r}, which names nothing (is a shell variable unset?); give a path, a preset "
            "or a Hub dataset id; the current folder is '.'"
        )
    path = Path(os.path.expanduser(source))  # unlike Path.expanduser, no error for the home of an unknown user
    if path.exists():
        path = path.resolve()
        return OpenedSource(_open_path(path, text_column, scratch), path.name)
    if isinstance(source, Path) or source.startswith((".", "/", "~")) or _suffix(path) is not None:
        raise DataError(f"{source}: no such file or folder; check the path")
    return _open_hub(source, seed)


def _suffix(path: Path) -> str | None:
    """The longest suffix of the path that has a reader, or None."""
    name = path.name.lower()
    return max((suffix for suffix in _READERS if name.endswith(suffix)), key=len, default=None)


def _open_path(path: Path, text_column: str | None, scratch: str) -> list[Table]:
    if (path / "dataset_dict.json").exists():
        raise DataError(f"{path}: this folder holds several splits; give the folder of one split inside it")
    if (path / "state.json").exists() and (path / "dataset_info.json").exists():  # written by Dataset.save_to_disk
        return [Table(_guarded(lambda: datasets.load_from_disk(str(path)), path), path.name, path.name)]
    files = _files_of(path) if path.is_dir() else [path]
    files = [file for file in files if _suffix(file) is not None]
    if not files:
        raise DataError(f"{path}: no file to read here; readable are {', '.join(_READERS)}, and folders of them")
    if text_column not in (None, "text") and all(_suffix(file) == ".txt" for file in files):
        raise DataError(f"{path}: text_column is {text_column!r}, but .txt files have no columns; leave it out")
    root = path if path.is_dir() else path.parent
    tables = []
    for file in files:
        name, has_columns = file.relative_to(root).as_posix(), _suffix(file) != ".txt"
        tables.append(Table(_file_records(file, scratch), name, name if has_columns else path.name, has_columns))
    return tables


def _files_of(folder: Path) -> list[Path]:
    """Files of a folder and those below it, but for hidden ones and model folders, whose JSON files hold no text."""
    files = []
    for parent, folders, names in os.walk(folder):
        if _holds_model(names):
            if Path(parent) == folder:
                raise DataError(f"{folder}: this is a model folder, not text; give a file or folder of text")
            _LOGGER.warning("%s: skipped, a model folder", Path(parent).relative_to(folder).as_posix())
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent) / name for name in names if not name.startswith(".")]
    return sorted(files)


def _holds_model(names: Sequence[str]) -> bool:
    return "config.json" in names and any(name.endswith((".safetensors", ".bin")) for name in names)


def _file_records(file: Path, scratch: str) -> Iterator[Record]:
    def open_file() -> Iterable[Record]:
        if file.stat().st_size == 0:
            return []
        reader, options = _READERS[_suffix(file) or ".txt"]
        # Streamed, and with a cache folder of its own: nothing is left in the Hugging Face cache. data_files are glob
        # patterns, in which a name such as "a[1].txt" would silently match nothing.
        return load_dataset(
            reader, data_files=[glob.escape(str(file))], split="train", streaming=True, cache_dir=scratch, **options
        )

    return _guarded(open_file, file)


def _guarded(open_records: Callable[[], Iterable[Record]], file: Path) -> Iterator[Record]:
    """Yields records; whatever the reading library raises becomes one error that names the file."""
    try:
        yield from open_records()
    except StopIteration:  # how `datasets` says that a compressed file is empty
        return
    except MemoryError:
        raise
    except Exception as error:  # pyarrow, pandas, gzip, zlib, codecs and json each have their own
        raise DataError(
            f"{file}: can't be read as {_suffix(file) or 'a saved dataset'} ({type(error).__name__}: {error}); "
            "files must be whole and in UTF-8"
        ) from error


def _in_memory_records(source: object) -> Iterable[Record]:
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise DataError(f"a dataset with splits {sorted(map(str, source))} was given; pass one of them, as data[split]")
    if isinstance(source, datasets.Dataset):
        return source.with_format(None)
    if isinstance(source, datasets.IterableDataset):
        return source
    if isinstance(source, Sequence) and all(isinstance(item, (str, Mapping)) for item in source):
        return [{"text": item} if isinstance(item, str) else item for item in source]
    raise DataError(
        f"text data of type {type(source).__name__} can't be read; give a path, a Hub dataset id, a datasets.Dataset, "
        "or a list of strings or of dicts"
    )


def _open_hub(reference: str, seed: int) -> OpenedSource:
    text_column: str | None = None
    if reference in PRESETS:
        dataset_id, configs, split, text_column = PRESETS[reference]
    elif (match := _HUB_ID.fullmatch(reference)) is not None:
        dataset_id, configs, split = match["id"], match["config"], match["split"] or "train"
    else:
        raise DataError(
            f"{reference!r} is neither a file, nor a Hub dataset id (id[:config][@split]), nor a preset "
            f"({', '.join(PRESETS)})"
        )
    tables = []
    try:
        revision, streams = _hub_streams(dataset_id, configs.split("+") if configs else [None], split)
        for config, stream in streams:
            # Records of a document must stay in order; others are shuffled, as datasets are often sorted by topic.
            if "doc" not in (stream.column_names or next(iter(stream.take(1)), {})):
                stream = stream.shuffle(seed=seed, buffer_size=1000)
            name = dataset_id if config is None else f"{dataset_id}:{config}"
            tables.append(Table(_hub_records(reference, stream), name, name))
    except Exception as error:
        raise _hub_error(reference, error) from error
    name = f"{dataset_id}{f':{configs}' if configs else ''}@{split}"
    return OpenedSource(tables, name, revision, text_column, HUB_MAX_DOCUMENTS)


def _hub_streams(
    dataset_id: str, configs: Sequence[str | None], split: str
) -> tuple[str, list[tuple[str | None, Any]]]:
    """Pins the dataset to a commit.

    Returns:
        (commit sha, for each config its name and stream).
    """
    api = HfApi()
    revision = str(api.dataset_info(dataset_id).sha)
    try:
        return revision, [
            (config, load_dataset(dataset_id, config, split=split, revision=revision, streaming=True))
            for config in configs
        ]
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    # A dataset with a loading script (LegalLAMA is one): the Hub keeps an export to Parquet, a folder a config.
    revision = str(api.dataset_info(dataset_id, revision="refs/convert/parquet").sha)
    return revision, [
        (config, load_dataset(dataset_id, data_dir=config or "default", split=split, revision=revision, streaming=True))
        for config in configs
    ]


def _hub_records(reference: str, stream: Iterable[Record]) -> Iterator[Record]:
    try:
        yield from tqdm(stream, desc=f"Reading {reference}", unit=" records", name="hf_context_prune.data")
    except Exception as error:
        raise _hub_error(reference, error) from error


def _hub_error(reference: str, error: Exception) -> DataError:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    # The client's words on a repository that is not there name gated ones too; those of `datasets` don't.
    gated = isinstance(error, DatasetNotFoundError) and "gated" in str(error)
    if gated or isinstance(error, GatedRepoError):
        what = "the dataset is gated; ask for access on its page, then log in with `hf auth login`"
    elif isinstance(error, (RepositoryNotFoundError, DatasetNotFoundError)):
        what = (
            "there is no such file, preset or public Hub dataset; check the spelling "
            f"(presets: {', '.join(PRESETS)}), or log in with `hf auth login` if it is private"
        )
    elif isinstance(error, ConnectionError) or (isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError)):
        what = (
            "there is no such file, and the Hub can't be reached; check the path, or the network and HF_HUB_OFFLINE, "
            "or give a local file"
        )
    elif status == 429 or status >= 500 or "LocalEntryNotFoundError" in str(error):  # what `datasets` makes of a 503
        what = "the Hub does not answer now; try again in some minutes"
    else:
        what = "the Hub dataset can't be read; check config and split (id[:config][@split])"
    return DataError(f"{reference}: {what} ({type(error).__name__}: {error})")


def choose_text_columns(head: list[Record], text_column: str | None, name: str) -> list[str]:
    """Chooses the columns to read by the first records; none where there are no records.

    Raises:
        DataError: The asked column is not there, or there is no single candidate; the message lists the columns.
    """
    columns = list(dict.fromkeys(str(column) for record in head for column in record))
    if not head:
        return []
    if text_column is not None:
        wanted = [text_column] if text_column in columns else [column.strip() for column in text_column.split(",")]
        if set(wanted) <= set(columns):
            return wanted
        raise DataError(f"{name}: there is no text column {text_column!r}; its columns are {', '.join(columns)}")
    for column in ("text", "content", "messages"):
        if column in columns:
            return [column]
    values = {column: [v for record in head if (v := record.get(column)) is not None] for column in columns}
    strings = [
        column
        for column in columns
        if column not in ("doc", "source") and values[column] and all(isinstance(v, str) for v in values[column])
    ]
    if len(strings) == 1:
        return strings
    raise DataError(
        f"{name}: can't tell which column holds the text; name it with text_column (--text-column), "
        f"or several as a,b; its columns are {', '.join(columns)}"
    )


def render_text(value: object, tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    """Text of a record's value: a string, chat messages (through the chat template), or None (empty).

    Raises:
        DataError: It is something else, or the messages can't be rendered; the message names the record (``where``).
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(turn, Mapping) and "role" in turn for turn in value):
        if not value:
            return ""
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{where}: chat messages, but "
                + ("no tokenizer was given" if tokenizer is None else "this tokenizer has no chat template")
                + "; use an instruction-tuned model's tokenizer, or data with a column of plain text"
            )
        try:
            return str(tokenizer.apply_chat_template(list(value), tokenize=False))
        except Exception as error:  # Jinja's errors, and whatever the template raises itself
            raise DataError(f"{where}: the chat template refuses these messages ({error})") from error
    raise DataError(f"{where}: holds {type(value).__name__}, not text; name a column of strings with text_column")
