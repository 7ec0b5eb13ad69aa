"""Where records come from: files, folders, Hub datasets and Python objects.

[`open_source`][] opens whatever a user may name; `documents.py` turns its records into documents.
"""

import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import load_dataset

from hf_context_prune.errors import DataError
from hf_context_prune.utils.failed_writes import find_failed_write
from hf_context_prune.utils.files import expand_home, open_regular

from .hub_datasets import open_hub
from .json_records import read_json_records
from .records import IN_MEMORY, OpenedSource, Record, Table

_LOGGER = logging.getLogger(__name__)

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document"}),
    ".jsonl": ("json", {}),
    ".jsonl.gz": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # a text that reads "None" or "NA" is a text
    ".parquet": ("parquet", {}),
}
"""File suffix -> (reader of the ``datasets`` library, its options); JSON is read by `read_json_records`."""


def open_source(source: object, *, text_column: str | None, seed: int, scratch: Path) -> OpenedSource:
    """Open a path, a preset, a Hub dataset id or a Python object (see `load_documents`).

    A path that exists wins over a preset, and a preset over a Hub id.

    Args:
        source: The source, as the user named it.
        text_column: Text column that the user named; refused where there are no columns.
        seed: Order of a Hub stream.
        scratch: A folder that outlives the reading, for lock files of the ``datasets`` library.

    Raises:
        DataError: There is no readable source of that name or kind.
    """
    if not isinstance(source, (str, Path)):
        return OpenedSource([Table(_in_memory_records(source), IN_MEMORY, IN_MEMORY)], IN_MEMORY)
    if isinstance(source, str) and not source.strip():  # as a path it would be the current folder
        raise DataError(
            f"the text source is {source!r}, an empty name (is a shell variable unset?); give a path, a preset or a "
            "Hub dataset id; the current folder is '.'"
        )
    path = expand_home(source, DataError)
    if path.exists():
        if not path.is_dir():
            _check_regular(path)  # before the links of /dev/stdin are resolved
        path = path.resolve()
        return OpenedSource(_open_path(path, text_column, scratch), path.name)
    if isinstance(source, Path) or source.startswith((".", "/", "~")) or _suffix(path) is not None:
        raise DataError(f"{source}: no such file or folder; check the path")
    return open_hub(source, seed)


def _suffix(path: Path) -> str | None:
    """Return the longest suffix of the path that has a reader, or None."""
    name = path.name.lower()
    return max((suffix for suffix in _READERS if name.endswith(suffix)), key=len, default=None)


def _open_path(path: Path, text_column: str | None, scratch: Path) -> list[Table]:
    if (path / "dataset_dict.json").exists():
        raise DataError(f"{path}: this folder holds several splits; give the folder of one split inside it")
    if (path / "state.json").exists() and (path / "dataset_info.json").exists():  # written by Dataset.save_to_disk
        return [Table(_guarded(lambda: datasets.load_from_disk(str(path)), path, scratch), path.name, path.name)]
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
        tables.append(
            Table(_file_records(_check_regular(file), scratch), name, name if has_columns else path.name, has_columns)
        )
    return tables


def _check_regular(file: Path) -> Path:
    """Refuse what has no content of its own: a pipe would seem empty, and a device endless."""
    try:
        open_regular(file).close()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; save the text to a file first") from error
    return file


def _files_of(folder: Path) -> list[Path]:
    """Return all files below a folder except hidden ones and those of model folders, whose JSON files hold no text."""
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


def _file_records(file: Path, scratch: Path) -> Iterator[Record]:
    def open_file() -> Iterable[Record]:
        if file.stat().st_size == 0:
            return []
        reader, options = _READERS[_suffix(file) or ".txt"]
        if reader == "json":
            return read_json_records(file)
        # Streaming with a separate cache folder leaves nothing in the Hugging Face cache. data_files are glob patterns,
        # so a name such as "a[1].txt" would silently match nothing.
        files = [glob.escape(str(file))]
        with _without_counting():
            return load_dataset(
                reader, data_files=files, split="train", streaming=True, cache_dir=str(scratch), **options
            )

    return _guarded(open_file, file, scratch)


@contextmanager
def _without_counting() -> Iterator[None]:
    """Keep `datasets` from telling a server that a local file is read: without a network, that waits for seconds."""
    before, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _guarded(open_records: Callable[[], Iterable[Record]], file: Path, scratch: Path) -> Iterator[Record]:
    """Yield records; any error of the reading library becomes one `DataError` that names the file.

    A failed write to the scratch folder is raised as it is, and explained where the folder was made.
    """
    loggers = [logging.getLogger(f"datasets.packaged_modules.{kind}.{kind}") for kind in ("csv", "parquet")]
    for logger in loggers:
        logger.addFilter(_is_no_read_error)
    try:
        yield from open_records()
    except StopIteration:  # raised by `datasets` for an empty compressed file
        return
    except (MemoryError, DataError):
        raise
    except Exception as error:  # pyarrow, pandas, gzip, zlib, codecs and json each raise their own
        if isinstance(error, OSError) and find_failed_write(error, scratch) is not None:
            raise
        raise DataError(
            f"{file}: can't be read as {_suffix(file) or 'a saved dataset'} ({type(error).__name__}: {error}); "
            "files must be complete and in UTF-8"
        ) from error
    finally:
        for logger in loggers:
            logger.removeFilter(_is_no_read_error)


def _is_no_read_error(record: logging.LogRecord) -> bool:
    """Return False for an error that `datasets` logs before it raises it."""
    return not (record.levelno == logging.ERROR and record.getMessage().startswith("Failed to "))


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
