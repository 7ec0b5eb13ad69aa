"""The results of the paper's grid of thresholds, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_context_prune.evaluation.accuracy import compare_answers, summarize_answers
from hf_context_prune.evaluation.losses import relative_change, summarize_losses
from hf_context_prune.evaluation.reports.formatting import INTERVALS, format_accuracy, format_change
from hf_context_prune.evaluation.reports.report import Environment
from hf_context_prune.evaluation.reports.run_report import ReportTable, RunReport
from hf_context_prune.evaluation.scores import HeldOut, Scores, summarize_scores

Thresholds = tuple[float | None, float | None, float | None]
"""Thresholds of linear layers, activations and embedding; None: off."""


@dataclass(frozen=True)
class SweepRow:
    """One point of the grid.

    Attributes:
        point: The thresholds.
        zeroed: Share of the base parameters that became zero and stay in the file.
        zeros: Share of the base parameters that become zero in the paper's code, which calls them removed.
        pruned: Scores after pruning.
        tuned: Scores after recovery training, if there was one.
    """

    point: Thresholds
    zeroed: float
    zeros: float
    pruned: Scores
    tuned: Scores | None


@dataclass(frozen=True)
class Sweep:
    """All points of the grid, beside the base model.

    Attributes:
        name: Name of the base model.
        text: How calibration and test text were kept apart.
        held_out: Test text and questions.
        base: Scores of the base model.
        rows: One per point, in the order of the grid.
        seed: Seed of the intervals.
    """

    name: str
    text: str
    held_out: HeldOut
    base: Scores
    rows: tuple[SweepRow, ...]
    seed: int = field(default=0)

    @property
    def header(self) -> tuple[str, ...]:
        """Names of the columns of `table_rows`; what was not measured has no column."""
        measures = ("bits per byte", "perplexity", *(["accuracy"] if self.base.answers is not None else []))
        return (
            *("linear", "activation", "embedding", "removed", "zeroed, not removed", "paper's non-zero size"),
            *(f"{measure}{when}" for measure in measures for when in self._whens),
        )

    @property
    def _whens(self) -> tuple[str, ...]:
        return ("", ", tuned") if any(row.tuned for row in self.rows) else ("",)

    def table_rows(self) -> list[tuple[str, ...]]:
        """Return the table for people: the base model, then one row per point.

        A perplexity with ``*`` is per token of another vocabulary.
        """
        dense = ("dense", "", "", "", "", "", *self._cells(self.base, None))
        return [dense, *(self._row(row) for row in self.rows)]

    def _row(self, row: SweepRow) -> tuple[str, ...]:
        return (
            *(format_threshold(value) for value in row.point),
            f"{1 - row.pruned.parameters / self.base.parameters:.2%}",
            f"{row.zeroed:.2%}",
            f"{1 - row.zeros:.2%}",
            *self._cells(row.pruned, row.tuned),
        )

    def _cells(self, pruned: Scores, tuned: Scores | None) -> list[str]:
        shown = (pruned, tuned)[: len(self._whens)]
        measures = [self._bits, self._perplexity, *([self._accuracy] if self.base.answers is not None else [])]
        return ["" if scores is None else measure(scores) for measure in measures for scores in shown]

    def _bits(self, scores: Scores) -> str:
        bits = f"{summarize_losses(scores.losses, seed=self.seed).bits_per_byte.value:.4f}"
        if scores is self.base:
            return bits
        return f"{bits} ({format_change(relative_change(self.base.losses, scores.losses, self.seed))})"

    def _perplexity(self, scores: Scores) -> str:
        value = summarize_losses(scores.losses, seed=self.seed).perplexity.value
        same = [x.num_tokens for x in scores.losses] == [x.num_tokens for x in self.base.losses]
        return f"{value:,.2f}{'' if same else '*'}"

    def _accuracy(self, scores: Scores, index: int = -1) -> str:
        assert scores.answers is not None and self.held_out.questions is not None  # noqa: PT018
        alone = scores is self.base or self.base.answers is None
        paired = None if alone else compare_answers(self.base.answers, scores.answers)[index]  # type: ignore[arg-type]
        return format_accuracy(summarize_answers(self.held_out.questions, scores.answers)[index], paired)

    def source_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return (header, rows) of the accuracies by source, then of all; no rows where none were measured."""
        asked, answers = self.held_out.questions, self.base.answers
        groups = () if asked is None or answers is None else summarize_answers(asked, answers)
        header = tuple(f"{x.source} (n {x.num_questions:,})" for x in groups)
        models = [("dense", "", "", "", self.base)]
        for row in self.rows:
            point = [format_threshold(value) for value in row.point]
            models += [
                (*point, when, scores)  # type: ignore[misc]
                for when, scores in (("pruned", row.pruned), ("tuned", row.tuned))
                if scores is not None
            ]
        rows = [(*names, *(self._accuracy(x, i) for i in range(len(groups)))) for *names, x in models]
        return ("linear", "activation", "embedding", "", *header), rows if groups else []

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON values."""
        return {
            "base": summarize_scores(self.base, self.held_out, seed=self.seed),
            "rows": [
                {
                    **dict(zip(("linear", "activation", "embedding"), row.point, strict=True)),
                    "removed": 1 - row.pruned.parameters / self.base.parameters,
                    "zeroed_not_removed": row.zeroed,
                    "nonzero_of_paper": 1 - row.zeros,
                    **{
                        name: None
                        if scores is None
                        else summarize_scores(scores, self.held_out, self.base, seed=self.seed)
                        for name, scores in (("pruned", row.pruned), ("tuned", row.tuned))
                    },
                }
                for row in self.rows
            ],
        }

    def run_report(self, environment: Environment) -> RunReport:
        """Return everything as a report."""
        losses, asked = self.base.losses, self.held_out.questions
        caption = (
            "Removed: share of the parameters that are gone from the file. Zeroed, not removed: zeros that stay in the "
            "file, because no whole unit is dead; training leaves them zero. Paper's non-zero size: the relative size "
            "in the paper's terms, with everything still in the file; its code also zeroes rows of tokens that must "
            f"stay here. Bits per byte: in parentheses the change. {INTERVALS} A perplexity with * is per token of "
            f"another vocabulary, and can't be compared."
        )
        notes = [f"{self.text} Scored on {sum(x.num_tokens for x in losses):,} tokens of {len(losses):,} documents."]
        tables = [ReportTable("Grid of thresholds", self.header, tuple(self.table_rows()), caption)]
        if asked is not None and self.base.answers is not None:
            group = summarize_answers(asked, self.base.answers)[-1]
            header, rows = self.source_table()
            tables.append(ReportTable("Accuracy by source", header, tuple(rows)))
            notes.append(
                f"Accuracy: {group.num_questions:,} questions of {asked.name}, scorer {self.held_out.scorer}, "
                f"{self.held_out.num_fewshot}-shot, with 95 % Wilson intervals; p of McNemar's exact test against the "
                f"base model. An asterisk marks questions that a model answers no better than chance."
            )
        return RunReport(
            "sweep",
            self.name,
            f"Thresholds of the paper (arXiv 2312.12682) on {self.name}",
            tuple(tables),
            self.to_dict(),
            environment,
            tuple(notes),
        )


def format_threshold(value: float | None) -> str:
    """Return a threshold as text; "off" where there is none."""
    return "off" if value is None else f"{value:g}"
