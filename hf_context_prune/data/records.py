"""Records of text data: opened tables, the columns that hold the text, and the text of a record."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from hf_context_prune.errors import DataError

Record: TypeAlias = Mapping[str, Any]

PEEK = 32
"""Number of records that choose the text column."""


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
    raise DataError(
        f"{name}: can't tell which column holds the text; name it with text_column (--text-column), or several as a,b; "
        f"its columns are {', '.join(columns)}"
    )


def render_text(value: object, tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    """Return the text of a value of a record.

    Args:
        value: A string, chat messages (rendered by the chat template), or None (no text).
        tokenizer: The tokenizer whose chat template is used.
        where: Name of the record in errors.

    Raises:
        DataError: The value is something else, or the messages can't be rendered.
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
                + "; use the tokenizer of an instruction-tuned model, or data with a column of plain text"
            )
        try:
            return str(tokenizer.apply_chat_template(list(value), tokenize=False))
        except Exception as error:  # Jinja's errors, and whatever the template raises itself
            raise DataError(f"{where}: the chat template refuses these messages ({error})") from error
    raise DataError(f"{where} holds {type(value).__name__}, not text; name a column of strings with text_column")
