"""The facts of a run that compares several models: figures for programs, tables for people."""

import os
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_context_prune.errors import LoadError

from .codec import Saved, decode, load_json, now
from .report import Environment, EvalReport

SCHEMA_VERSION = 1

RunKind = Literal["bench", "matrix", "sweep"]


@dataclass(frozen=True)
class ReportTable:
    """One table.

    Attributes:
        title: Title of the table.
        header: Names of the columns.
        rows: One cell per column.
        caption: Sentences that a reader of the table must know; may be empty.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class RunReport(Saved):
    """The results of a run.

    Attributes:
        kind: Kind of the run.
        model: Name of the base.
        title: Title of the report.
        tables: Tables for people.
        figures: The figures of the tables and more, for programs, as plain JSON values.
        environment: Where the figures were measured.
        notes: Sentences on how the figures were measured.
        created: UTC time, ISO 8601 to the second.
        schema_version: Version of the JSON layout.
    """

    kind: RunKind
    model: str
    title: str
    tables: tuple[ReportTable, ...]
    figures: dict[str, Any]
    environment: Environment
    notes: tuple[str, ...] = ()
    created: str = field(default_factory=now)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RunReport":
        """Return the report that `to_dict` gave.

        Raises:
            LoadError: The kind or schema version is unknown, a key is missing, unknown or of the wrong type, or a row
                has other cells than its table has columns.
        """
        kinds = typing.get_args(RunKind)
        if data.get("kind") not in kinds or data.get("schema_version") != SCHEMA_VERSION:
            raise LoadError(
                f"The report is of kind {data.get('kind')!r} and schema_version {data.get('schema_version')!r}; this "
                f"version of hf_context_prune reads {', '.join(kinds)} of version {SCHEMA_VERSION}. Install the "
                f"version that wrote it, or measure again."
            )
        report = decode(cls, {"created": None, **data}, "report")
        for table in report.tables:
            if any(len(row) != len(table.header) for row in table.rows):
                raise LoadError(f"The table {table.title!r} of the report has rows of other lengths than its header.")
        return report


AnyReport = EvalReport | RunReport


def load_report(path: str | os.PathLike[str]) -> AnyReport:
    """Read a saved report of any kind.

    Raises:
        LoadError: The file is missing, is no JSON, or is no report of a known kind and version.
    """
    data = load_json(path)
    return RunReport.from_dict(data) if isinstance(data, dict) and "kind" in data else EvalReport.from_dict(data)
