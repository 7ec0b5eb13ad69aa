"""Report of an export: written beside the artefact, read by `inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_context_prune.errors import LoadError
from hf_context_prune.evaluation.reports.codec import decode
from hf_context_prune.utils.files import write_file
from hf_context_prune.utils.reading import read_json, why

from .verify import Verification

_SCHEMA = 1


@dataclass(frozen=True)
class ExportReport:
    """An export and its comparison with the folder.

    Attributes:
        format: Name of the format.
        weights: Data type of the weights.
        source: Name of the folder or Hub id.
        plan_sha256: sha256 of the pruning plan; None for a folder without a plan.
        packages: Versions of the packages that wrote and ran it.
        machine: Processor and threads of the speed measurement.
        verification: The comparison.
        importance: Name of the text by which the errors of a k-quant were weighed; None: none.
    """

    format: str
    weights: str
    source: str
    plan_sha256: str | None
    packages: dict[str, str]
    machine: str
    verification: Verification
    importance: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {"schema": _SCHEMA, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the report as JSON.

        Raises:
            SaveError: The file can't be written.
        """
        write_file(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> ExportReport:
        """Read a report.

        Raises:
            LoadError: The file is not an export report.
        """
        try:
            values = read_json(path)
            if values.pop("schema") != _SCHEMA:
                raise ValueError(f"its schema is not {_SCHEMA}")
            report = decode(cls, values, "report")
            for name in ("bytes_before", "tokens_per_second_before", "bits_per_byte_before"):  # divisors
                if (value := getattr(report.verification, name)) is not None and value <= 0:
                    raise ValueError(f"{name} is {value}; it must be above 0")
            return report
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LoadError(f"{path} is not an export report: {why(error)}. Export the model again.") from error

    def caption(self) -> str:
        """Return what the figures of the table were measured on, and what its differences are."""
        found = self.verification
        return (
            f"Losses of {found.num_tokens:,} tokens ({found.text}): they check the export, not the model. The largest "
            f"difference is that of the log-probability of one token; the largest gap, how much the model before "
            f"preferred its own token where a greedy text parts from it. Speed on {self.machine}, each in its own "
            f"runtime."
        )

    def table_rows(self) -> list[tuple[str, str, str, str]]:
        """Return rows of measure, the folder's own model, the artefact, change."""
        found = self.verification
        rows = [
            ("loss, nats per token", f"{found.before:.4f}", f"{found.after:.4f}", f"{found.after - found.before:+.4f}"),
            ("perplexity", "", "", f"{found.perplexity_change:+.3%} (allowed: {found.tolerance.perplexity:.2%})"),
            ("largest difference per token, nats", "", "", f"{found.largest_difference:.2g}"),
            (
                f"greedy texts of {found.new_tokens} tokens",
                "",
                f"{found.equal_texts} of {found.prompts} equal",
                f"largest gap {found.largest_gap:.2g} nats",
            ),
            _ratio("weights, bytes", found.bytes_before, found.bytes_after, ",.0f"),
            _ratio("tokens per second, greedy", found.tokens_per_second_before, found.tokens_per_second_after, ".1f"),
        ]
        if found.bits_per_byte_before is not None and found.bits_per_byte_after is not None:
            before, after = found.bits_per_byte_before, found.bits_per_byte_after
            rows.insert(0, ("bits per byte", f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.2%}"))
        return rows


def _ratio(name: str, before: float, after: float, layout: str) -> tuple[str, str, str, str]:
    return (name, format(before, layout), format(after, layout), f"x{after / before:.2f}")
