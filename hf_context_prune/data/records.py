"""Records of text data: opened tables, the columns that hold the text, and the text of a record."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Integral
from typing import Any, TypeAlias, TypeGuard

from transformers import PreTrainedTokenizerBase

from hf_context_prune.errors import DataError

from .chat_templates import ChatRefused, render_chats

Record: TypeAlias = Mapping[str, Any]

PEEK = 32
"""Number of records that choose the text column."""
IN_MEMORY = "in-memory"
"""Name of text that was given in Python."""
TOKENS = "input_ids"
"""Column of a tokenised data set."""


@dataclass(frozen=True)
class Table:
    """Records with columns, opened but not read.

    Attributes:
        records: An iterable that can be read once; it raises `DataError` where reading fails.
        name: Name in messages, and in the names of documents that have none.
        source: Source of the records that don't name their own.
        has_columns: False for plain text, to which ``text_column`` does not apply.
    """

    records: Iterable[Record]
    name: str
    source: str
    has_columns: bool = True


@dataclass(frozen=True)
class OpenedSource:
    """Tables to read one after the other.

    Attributes:
        tables: The tables, in reading order.
        name: A path's base name, a Hub id with config and split, or "in-memory".
        revision: Commit sha of a Hub dataset.
        text_column: Text column of a preset.
        max_documents: Largest number of documents, unless the user gives one.
    """

    tables: Sequence[Table]
    name: str
    revision: str | None = None
    text_column: str | None = None
    max_documents: int | None = None


def choose_text_columns(head: list[Record], text_column: str | None, name: str) -> list[str]:
    """Choose the columns to read.

    Args:
        head: The first records; without any, no column is chosen.
        text_column: Column that the user named, or several separated by commas.
        name: Name of the table in errors.

    Raises:
        DataError: There is no such column, or there is no single candidate; the message lists the columns.
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
    if not strings and TOKENS in columns:
        return [TOKENS]
    raise DataError(
        f"{name}: can't tell which column holds the text; name it with text_column (--text-column), or several as a,b; "
        f"its columns are {', '.join(columns)}"
    )


def render_texts(values: Iterable[tuple[object, str]], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return the texts of values of records.

    Args:
        values: Pairs of a value and the name of its record in errors. A value is a string, chat messages (rendered by
            the chat template), token ids (decoded, without special tokens), or None (no text).
        tokenizer: The tokenizer whose chat template is used, and which made the token ids.

    Raises:
        DataError: A value is something else, or messages can't be rendered.
        LoadError: The chat template exceeds its limits; see [`render_chats`][].
    """
    texts: list[str] = []
    chats: dict[int, tuple[list[object], str]] = {}
    for given, where in values:
        value: object = given.tolist() if hasattr(given, "tolist") else given  # of numpy and torch
        if isinstance(value, str):
            texts.append(value)
            continue
        if _is_token_ids(value):
            texts.append(_decoded(value, where, tokenizer))
            continue
        if value is not None and not _is_chat(value):
            raise DataError(
                f"{where} holds {type(value).__name__}, not text; name a column of strings with text_column"
            )
        if value:
            chats[len(texts)] = list(value), where  # type: ignore[call-overload]
        texts.append("")
    if not chats:
        return texts
    first = next(where for _, where in chats.values())
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{first}: chat messages, but "
            + ("no tokenizer was given" if tokenizer is None else "this tokenizer has no chat template")
            + "; use the tokenizer of an instruction-tuned model, or data with a column of plain text"
        )
    try:
        results = render_chats(tokenizer, [(messages, {}) for messages, _ in chats.values()])
    except ChatRefused as error:
        raise DataError(f"{first}: the chat template can't be given these messages ({error})") from error
    for (index, (_, where)), result in zip(chats.items(), results, strict=True):
        if isinstance(result, ChatRefused):
            raise DataError(f"{where}: the chat template refuses these messages ({result})")
        texts[index] = result
    return texts


def _is_token_ids(value: object) -> TypeGuard[Sequence[int]]:
    if not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(item, Integral) and not isinstance(item, bool) for item in value)


def _decoded(ids: Sequence[int], where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        raise DataError(f"{where}: token ids, but no tokenizer was given; give data with a column of plain text")
    if (most := max(ids)) >= len(tokenizer) or min(ids) < 0:
        raise DataError(
            f"{where}: the token id {most if min(ids) >= 0 else min(ids)} is not one of this tokenizer, which has "
            f"{len(tokenizer):,}; give data that the model's own tokenizer made, or a column of plain text"
        )
    parts = [[*part] for ends, part in groupby(ids, lambda token: token == tokenizer.eos_token_id) if not ends]
    return "\n\n".join(str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)  # packed texts


def _is_chat(value: object) -> bool:
    return isinstance(value, Sequence) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
