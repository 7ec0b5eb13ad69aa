"""Text sources -> documents.

A user names a *source*: a file, a folder, a Hub dataset id, a preset, or Python objects (`sources.py` opens them). The
source is read into a [`TextSource`][], which carries its provenance. Documents, never samples, are the unit of every
split.
"""

import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from hf_context_prune.errors import ConfigError, DataError
from hf_context_prune.utils.temporary import scratch_folder

from .records import IN_MEMORY, PEEK, Record, Table, choose_text_columns, render_texts
from .sources import open_source

TextData: TypeAlias = "str | Path | TextSource | Sequence[str] | Sequence[Mapping[str, Any]] | Any"
"""A text source, as [`load_documents`][] reads it.

``datasets.Dataset`` and ``datasets.IterableDataset`` are read too; `Any` stands for them, so that a type checker
without ``datasets`` agrees.
"""


_CHUNK = 64  # records that are rendered together
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextDocument:
    """A text with the names that a split and a report need.

    Attributes:
        text: The text, never empty.
        doc: Texts of one ``doc`` belong together and never straddle a split.
        source: Where the text comes from: splits are stratified by it, and results may be grouped by it.
    """

    text: str
    doc: str
    source: str


@dataclass(frozen=True)
class TextSource:
    """Documents and their provenance.

    Attributes:
        documents: The documents in reading order.
        name: Base name of a path, a Hub id with config and split, or "in-memory".
        revision: Commit sha of a Hub dataset, else None.
        fingerprint: sha256 over the texts in order.
    """

    documents: tuple[TextDocument, ...]
    name: str
    revision: str | None
    fingerprint: str

    @classmethod
    def from_documents(
        cls, documents: Iterable[TextDocument], *, name: str = IN_MEMORY, revision: str | None = None
    ) -> "TextSource":
        """Build a source and its fingerprint from documents.

        Raises:
            DataError: A text holds half a surrogate pair, which no tokenizer accepts.
        """
        documents = tuple(documents)
        digest = hashlib.sha256()
        for document in documents:
            try:
                raw = document.text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{name}: document {document.doc!r} is not valid Unicode text: {error}") from error
            digest.update(len(raw).to_bytes(8, "big") + raw)
        return cls(documents, name, revision, digest.hexdigest())

    @property
    def identity(self) -> dict[str, str | None]:
        """Name, revision and fingerprint, by which a plan identifies a text."""
        return {"name": self.name, "revision": self.revision, "fingerprint": self.fingerprint}

    @property
    def num_bytes(self) -> int:
        """Size of all texts in UTF-8 bytes."""
        return sum(len(document.text.encode()) for document in self.documents)

    def __len__(self) -> int:
        return len(self.documents)


def load_documents(
    source: TextData,
    *,
    text_column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_documents: int | None = None,
    seed: int = 0,
) -> TextSource:
    """Read a text source into documents.

    Args:
        source: A file (``.txt``, ``.jsonl[.gz]``, ``.json``, ``.csv``, ``.parquet``), a folder of them (read
            recursively in sorted order, hidden files and model folders skipped), a folder of ``Dataset.save_to_disk``,
            a key of [`PRESETS`][], a Hub dataset id ``id[:config[+config...]][@split]`` (streamed; by default the
            split ``train``), a ``datasets.Dataset`` or ``IterableDataset``, a sequence of strings or of dicts, or a
            `TextSource`. A local path that exists wins over a preset and over a Hub id.
        text_column: Column that holds the text, or several separated by commas, joined by a newline. By default
            ``text``, else ``content``, else ``messages``, else the only column of strings, else ``input_ids`` (decoded
            by `tokenizer`). Records that share a value of the column ``doc`` become one document, joined in order by a
            blank line; a column ``source`` is kept.
        tokenizer: Renders chat messages (lists of role and content) with its chat template, and decodes token ids.
        max_documents: Stop after that many documents. By default all of a local source and
            [`HUB_MAX_DOCUMENTS`][] of a Hub stream.
        seed: Order in which a Hub stream without a ``doc`` column is read (shards, then a buffer of 1,000 records).

    Returns:
        The documents with their provenance; empty texts are left out.

    Raises:
        DataError: The source is blank, missing, unreadable or empty, the Hub can't be reached, or the column is not
            there.
        ConfigError: ``max_documents`` is below 1.

    Example:
        ```python
        from hf_context_prune import load_documents

        source = load_documents("contracts.jsonl", text_column="body")
        print(len(source), source.name, source.fingerprint)
        ```
    """
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"max_documents is {max_documents}; it must be at least 1")
    if isinstance(source, TextSource):
        documents, name, revision = list(source.documents[:max_documents]), source.name, source.revision
    else:
        with scratch_folder() as scratch:
            opened = open_source(source, text_column=text_column, seed=seed, scratch=scratch)
            name, revision = opened.name, opened.revision
            documents = _read_documents(
                opened.tables, text_column or opened.text_column, tokenizer, max_documents or opened.max_documents
            )
    if not documents:
        raise DataError(f"{name}: no text (every record is empty); give a source with at least one text")
    return TextSource.from_documents(documents, name=name, revision=revision)


def check_readable(source: TextData, *, text_column: str | None = None) -> None:
    """Open a source and read its first records, so that a mistake shows before anything costly.

    Args:
        source: As for [`load_documents`][], which makes the other checks.
        text_column: As for [`load_documents`][].

    Raises:
        DataError: As [`load_documents`][], as far as the first records show it.
    """
    if isinstance(source, TextSource):
        return
    with scratch_folder() as scratch:
        opened = open_source(source, text_column=text_column, seed=0, scratch=scratch)
        for table in opened.tables[:1]:
            head = list(itertools.islice(table.records, PEEK))
            asked = text_column or opened.text_column
            choose_text_columns(head, asked if table.has_columns else None, table.name)


def _read_documents(
    tables: Iterable[Table],
    text_column: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    max_documents: int | None,
) -> list[TextDocument]:
    texts: dict[str, list[str]] = {}
    sources: dict[str, str] = {}
    spread: dict[str, str] = {}
    for table in tables:
        records = iter(table.records)
        head = list(itertools.islice(records, PEEK))
        columns = choose_text_columns(head, text_column if table.has_columns else None, table.name)
        rows = enumerate(itertools.chain(head, records))
        # Never more than the documents that are still wanted: a later record may be one that can't be rendered.
        while chunk := list(itertools.islice(rows, _chunk_size(max_documents, len(texts)))):
            for (row, record), text in zip(chunk, _texts_of(chunk, columns, tokenizer, table.name), strict=True):
                if not text.strip():
                    continue
                doc, source = (_name_of(record.get(key)) if key not in columns else None for key in ("doc", "source"))
                doc, source = doc or f"{table.name}#{row}", source or table.source
                if doc not in texts:
                    if len(texts) == max_documents:
                        return _joined(texts, sources, spread)
                    sources[doc] = source
                elif source != sources[doc]:
                    spread.setdefault(doc, source)
                texts.setdefault(doc, []).append(text)
    return _joined(texts, sources, spread)


def _name_of(value: object) -> str | None:
    """Return what a record calls its document or its source; None where it names none (also by NaN, or by spaces)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(value).strip() or None


def _chunk_size(max_documents: int | None, found: int) -> int:
    return _CHUNK if max_documents is None else min(_CHUNK, max(1, max_documents - found))


def _texts_of(
    chunk: Sequence[tuple[int, Record]], columns: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, name: str
) -> Iterator[str]:
    """Yield the text of each of some numbered records: of its columns, with a newline between them."""
    places = [
        (record.get(column), f"{name}, record {row + 1}, {column!r}") for row, record in chunk for column in columns
    ]
    parts = iter(render_texts(places, tokenizer))
    for _ in chunk:
        row_parts = itertools.islice(parts, len(columns))
        yield "\n".join(part for part in row_parts if part.strip()).removeprefix("\ufeff")


def _joined(texts: dict[str, list[str]], sources: dict[str, str], spread: dict[str, str]) -> list[TextDocument]:
    if spread:
        doc, other = next(iter(spread.items()))
        _LOGGER.warning(
            "%s of %s documents have records of several sources, such as doc %.80r in %.80r and %.80r. Each counts as "
            "one document, of its first source. Name documents that differ differently in the column 'doc'.",
            f"{len(spread):,}",
            f"{len(texts):,}",
            doc,
            sources[doc],
            other,
        )
    return [TextDocument("\n\n".join(parts), doc, sources[doc]) for doc, parts in texts.items()]


def stable_hash(*parts: object) -> bytes:
    """Return a hash of some values that is the same in every process and on every machine."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
