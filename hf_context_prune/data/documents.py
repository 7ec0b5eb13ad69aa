"""Text sources -> documents -> token blocks.

A *source* is what a user names: a file, a folder, a Hub dataset id, a preset, or Python objects (`sources.py` opens
them). It is read into a :class:`TextSource`, a value that carries its own provenance. Documents, never blocks, are the
unit of every split.
"""

import hashlib
import itertools
import random
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from hf_context_prune.errors import ConfigError, DataError

from .samples import leading_token
from .sources import HUB_MAX_DOCUMENTS, PEEK, PRESETS, Table, choose_text_columns, open_source, text_of

__all__ = [
    "HUB_MAX_DOCUMENTS",
    "PRESETS",
    "CalibrationWarning",
    "TextDocument",
    "TextSource",
    "check_readable",
    "hold_out_documents",
    "load_documents",
    "token_blocks",
]

#: What `load_documents` reads; the rest are ``datasets.Dataset`` and ``datasets.IterableDataset``, kept out of the type
#: so that a checker without ``datasets`` agrees.
TextData: TypeAlias = "str | Path | TextSource | Sequence[str] | Sequence[Mapping[str, Any]] | Any"

_BLOCKS_PER_DOCUMENT = 4  # so that a few long documents don't make up all the calibration text
_SHORTEST_BLOCK = 8


class CalibrationWarning(UserWarning):
    """There is less text than was asked for; the message names both numbers."""


@dataclass(frozen=True)
class TextDocument:
    """A text with the names that a split and a report need.

    Attributes:
        text: The text, never empty.
        doc: Texts of one ``doc`` belong together and never straddle a split.
        source: Where it comes from: splits are stratified, and results may be grouped, by it.
    """

    text: str
    doc: str
    source: str


@dataclass(frozen=True)
class TextSource:
    """Documents and their provenance.

    Attributes:
        documents: The documents in reading order.
        name: What was asked for: a path's base name, a Hub id with config and split, or "in-memory".
        revision: Commit sha of a Hub dataset, else None.
        fingerprint: sha256 over the texts in order.
    """

    documents: tuple[TextDocument, ...]
    name: str
    revision: str | None
    fingerprint: str

    @classmethod
    def from_documents(
        cls, documents: Iterable[TextDocument], *, name: str = "in-memory", revision: str | None = None
    ) -> "TextSource":
        """Builds a source and its fingerprint from documents.

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
        """Name, revision and fingerprint: what a plan says of a text."""
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
    """Reads a text source into documents.

    Args:
        source: A file (``.txt``, ``.jsonl[.gz]``, ``.json``, ``.csv``, ``.parquet``), a folder of them (read
            recursively in sorted order, hidden files and model folders skipped), a folder of ``Dataset.save_to_disk``,
            a key of :data:`PRESETS`, a Hub dataset id ``id[:config[+config...]][@split]`` (streamed; by default the
            split ``train``), a ``datasets.Dataset`` or ``IterableDataset``, a sequence of strings or of dicts, or a
            `TextSource`. A local path that exists wins over a preset and over a Hub id.
        text_column: Column that holds the text, or several separated by commas, joined by a newline. By default
            ``text``, else ``content``, else ``messages``, else the only column of strings. Records that share a value
            of the column ``doc`` become one document, joined in order by a blank line; a column ``source`` is kept.
        tokenizer: Renders chat messages (lists of role and content) with its chat template.
        max_documents: Stop after that many documents. By default all of a local source and
            :data:`HUB_MAX_DOCUMENTS` of a Hub stream.
        seed: Order in which a Hub stream without a ``doc`` column is read (shards, then a buffer of 1,000 records).

    Returns:
        The documents with their provenance; empty texts are left out.

    Raises:
        DataError: The source is blank, missing, unreadable or empty, the Hub can't be reached, or the column is not
            there.
        ConfigError: ``max_documents`` is below 1.
    """
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"max_documents is {max_documents}, but must be at least 1")
    if isinstance(source, TextSource):
        documents, name, revision = list(source.documents[:max_documents]), source.name, source.revision
    else:
        with tempfile.TemporaryDirectory(prefix="hf_context_prune-") as scratch:
            opened = open_source(source, text_column=text_column, seed=seed, scratch=scratch)
            name, revision = opened.name, opened.revision
            documents = _read_documents(
                opened.tables, text_column or opened.text_column, tokenizer, max_documents or opened.max_documents
            )
    if not documents:
        raise DataError(f"{name}: no text in it (every record is empty); give a source with at least one text")
    return TextSource.from_documents(documents, name=name, revision=revision)


def check_readable(source: TextData, *, text_column: str | None = None) -> None:
    """Opens a source and looks at its first records, so that a mistake shows before anything costly.

    Args:
        source: As for `load_documents`, which does the rest of the checks.
        text_column: As for `load_documents`.

    Raises:
        DataError: As `load_documents`, as far as the first records tell.
    """
    if isinstance(source, TextSource):
        return
    with tempfile.TemporaryDirectory(prefix="hf_context_prune-") as scratch:
        opened = open_source(source, text_column=text_column, seed=0, scratch=scratch)
        for table in opened.tables[:1]:
            head = list(itertools.islice(table.records, PEEK))
            asked = text_column or opened.text_column
            choose_text_columns(head, asked if table.has_columns else None, table.name)


def hold_out_documents(
    source: TextSource, *, fraction: float = 0.1, max_documents: int | None = None, seed: int = 0
) -> tuple[TextSource, TextSource]:
    """Splits off documents for evaluation.

    Documents of one ``doc``, and documents with the same text, stay on one side. The choice depends on the seed and the
    names alone, not on the order of the input, and takes its share of every ``source``.

    Args:
        source: Documents to split.
        fraction: Share of the documents to hold out, in (0, 1).
        max_documents: Hold out at most that many.
        seed: Chooses the documents.

    Returns:
        (rest, held out), each in the order of the input and with at least one document.

    Raises:
        DataError: There is only one distinct document.
        ConfigError: ``fraction`` or ``max_documents`` is out of range.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out fraction is {fraction}, but must lie strictly between 0 and 1")
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"max_documents is {max_documents}, but must be at least 1")
    leader = _groups(source.documents)
    strata: dict[str, list[str]] = {}
    stratum_of: dict[str, str] = {}
    for document in source.documents:
        group = leader[document.doc]
        stratum_of[group] = min(document.source, stratum_of.get(group, document.source))
    for group, stratum in stratum_of.items():
        strata.setdefault(stratum, []).append(group)
    total = len(stratum_of)
    if total < 2:
        raise DataError(
            f"{source.name}: {total} distinct document(s), but a split by document needs at least 2; "
            "give data whose records are separate documents"
        )
    wanted = min(max(1, round(fraction * total)), max_documents or total, total - 1)
    # Largest remainders: every source gives its share to within one document, and the sum is exact.
    quota = {stratum: wanted * len(groups) / total for stratum, groups in strata.items()}
    take = {stratum: int(share) for stratum, share in quota.items()}
    by_remainder = sorted(quota, key=lambda stratum: (take[stratum] - quota[stratum], stratum))
    for stratum in by_remainder[: wanted - sum(take.values())]:
        take[stratum] += 1
    held = {
        group
        for stratum, groups in strata.items()
        for group in sorted(groups, key=lambda group: _stable_hash("hold-out", seed, group))[: take[stratum]]
    }
    sides: tuple[list[TextDocument], list[TextDocument]] = ([], [])
    for document in source.documents:
        sides[leader[document.doc] in held].append(document)
    rest, held_out = (TextSource.from_documents(side, name=source.name, revision=source.revision) for side in sides)
    return rest, held_out


def token_blocks(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    max_seq_length: int,
    seed: int = 0,
    fewer: bool = False,
) -> torch.LongTensor:
    """Cuts documents into blocks of tokens for calibration.

    Documents are taken in an order shuffled by the seed until there are enough tokens, tokenised without special
    tokens, and joined by the end-of-sequence token (or beginning-of-sequence where there is no end). A long document
    gives one contiguous stretch of at most four blocks, more only where the text is too little otherwise. Blocks
    begin with the token that the tokenizer itself puts before a text ([`leading_token`][]).

    Args:
        source: Documents to read.
        tokenizer: A ``transformers`` tokenizer.
        num_samples: Blocks asked for.
        max_seq_length: Tokens of a block.
        seed: Order of the documents, and the stretch taken of a long one.
        fewer: Nobody asked for as many, so fewer are no reason to warn.

    Returns:
        int64 token ids [blocks, max_seq_length] without padding, blocks <= num_samples. With less text than one block,
        one shorter block of at least 8 tokens.

    Warns:
        CalibrationWarning: Fewer or shorter blocks than asked.

    Raises:
        DataError: Less than 8 tokens of text.
        ConfigError: ``num_samples`` or ``max_seq_length`` is below 1.
    """
    for option, value in (("num_calibration_samples", num_samples), ("max_seq_length", max_seq_length)):
        if value < 1:
            raise ConfigError(f"{option} is {value}, but must be at least 1")
    order = sorted(source.documents, key=lambda document: _stable_hash("blocks", seed, document.doc))
    lead = leading_token(tokenizer) if max_seq_length > 1 else None
    length = max_seq_length - (lead is not None)
    needed, cap = num_samples * length, _BLOCKS_PER_DOCUMENT * length
    while True:
        tokens, was_cut = _gather_tokens(order, tokenizer, needed, cap, seed)
        if len(tokens) >= needed or not was_cut:
            break
        cap *= 4
    blocks = min(num_samples, len(tokens) // length)
    if blocks == 0:
        if len(tokens) < _SHORTEST_BLOCK:
            raise DataError(
                f"{source.name}: {len(tokens)} tokens of text, but a block needs at least {_SHORTEST_BLOCK}; "
                "give more text"
            )
        blocks, length = 1, len(tokens)
    if blocks * length < needed and not fewer:
        warnings.warn(
            f"{source.name}: asked for {num_samples} blocks ({num_samples * max_seq_length} tokens), but there is text "
            f"for {blocks} of {length + (lead is not None)} tokens: calibrating on those. Give more text, or lower "
            f"num_calibration_samples.",
            CalibrationWarning,
            stacklevel=2,
        )
    own = torch.tensor(tokens[: blocks * length], dtype=torch.long).view(blocks, length)
    return own if lead is None else torch.nn.functional.pad(own, (1, 0), value=lead)


def _read_documents(
    tables: Iterable[Table],
    text_column: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    max_documents: int | None,
) -> list[TextDocument]:
    texts: dict[str, list[str]] = {}
    sources: dict[str, str] = {}
    for table in tables:
        records = iter(table.records)
        head = list(itertools.islice(records, PEEK))
        columns = choose_text_columns(head, text_column if table.has_columns else None, table.name)
        for row, record in enumerate(itertools.chain(head, records)):
            where = f"{table.name}, record {row + 1}"
            parts = (text_of(record.get(column), tokenizer, f"{where}, {column!r}") for column in columns)
            text = "\n".join(part for part in parts if part.strip()).removeprefix("\ufeff")
            if not text.strip():
                continue
            ids = {key: record.get(key) for key in ("doc", "source") if key not in columns}
            doc = str(ids["doc"]) if ids.get("doc") not in (None, "") else f"{table.name}#{row}"
            if doc not in texts:
                if len(texts) == max_documents:
                    return _joined(texts, sources)
                sources[doc] = str(ids["source"]) if ids.get("source") not in (None, "") else table.source
            texts.setdefault(doc, []).append(text)
    return _joined(texts, sources)


def _joined(texts: dict[str, list[str]], sources: dict[str, str]) -> list[TextDocument]:
    return [TextDocument("\n\n".join(parts), doc, sources[doc]) for doc, parts in texts.items()]


def _stable_hash(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()


def _groups(documents: Iterable[TextDocument]) -> dict[str, str]:
    """Maps each ``doc`` to the least name of those that it is tied to by an equal text."""
    leader: dict[str, str] = {}

    def find(doc: str) -> str:
        while leader[doc] != doc:
            doc = leader[doc]
        return doc

    first_with: dict[bytes, str] = {}
    for document in documents:
        leader.setdefault(document.doc, document.doc)
        other = first_with.setdefault(_stable_hash(document.text.strip()), document.doc)
        low, high = sorted((find(document.doc), find(other)))
        leader[high] = low
    return {doc: find(doc) for doc in leader}


def _gather_tokens(
    documents: Sequence[TextDocument], tokenizer: PreTrainedTokenizerBase, needed: int, cap: int, seed: int
) -> tuple[list[int], bool]:
    """Joins documents' tokens until there are enough.

    Returns:
        (token ids, at least ``needed`` where the documents hold that many; whether a document was cut to ``cap``).
    """
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    tokens: list[int] = []
    was_cut = False
    for start in range(0, len(documents), 64):
        batch = documents[start : start + 64]
        draws = [random.Random(_stable_hash("stretch", seed, document.doc)) for document in batch]
        texts = [_window(document.text, 16 * cap, draw) for document, draw in zip(batch, draws, strict=True)]
        # verbose=False: a document longer than the model's context is fine here, it is cut into blocks.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document, text, draw, ids in zip(batch, texts, draws, encoded, strict=True):
            was_cut |= len(ids) > cap or len(text) < len(document.text)
            first = draw.randrange(len(ids) - cap + 1) if len(ids) > cap else 0
            if tokens and ids and separator is not None:
                tokens.append(separator)
            tokens.extend(ids[first : first + cap])
            if len(tokens) >= needed:
                return tokens, was_cut
    return tokens, was_cut


def _window(text: str, num_chars: int, draw: random.Random) -> str:
    """A random stretch of a very long text that starts with a word, so that tokenising it stays cheap."""
    if len(text) <= num_chars:
        return text
    start = draw.randrange(len(text) - num_chars + 1)
    if start:
        space = re.compile(r"\s").search(text, start, start + num_chars // 2)
        start = space.start() if space else start
    return text[start : start + num_chars]
