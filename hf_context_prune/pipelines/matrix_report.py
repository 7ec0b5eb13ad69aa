"""The results of a domain matrix, as tables and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_context_prune.evaluation.accuracy import Accuracy, PairedAccuracy, compare_answers, summarize_answers
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.general_text import build_loss_facts, dataset_facts
from hf_context_prune.evaluation.losses import relative_change, summarize_losses
from hf_context_prune.evaluation.reports.formatting import INTERVALS, format_accuracy, format_change
from hf_context_prune.evaluation.reports.report import (
    DatasetFacts,
    Environment,
    EvalReport,
    LossFacts,
    SizeFacts,
    TextLosses,
)
from hf_context_prune.evaluation.reports.run_report import ReportTable, RunReport
from hf_context_prune.evaluation.scores import HeldOut, Scores, build_choice_facts, summarize_scores

DENSE = "dense"


def mixed_name(domain: str, share: float) -> str:
    """Return the name of a domain's model with a share of general text mixed in; no domain can have such a name."""
    return f"{domain}+{share:g}"


@dataclass(frozen=True)
class DomainMatrix:
    """Scores of every model on every domain.

    Attributes:
        name: Name of the base model.
        domains: Names, in order; each domain is calibrated on and measured on.
        held_out: Test text and questions, by domain.
        splits: How calibration and test text were kept apart, by domain.
        scores: By (model, measured on); a model is named by the domain that it was calibrated on, or ``"dense"``.
        reference: The domain that the others are compared with, if there is one.
        seed: Seed of the intervals.
        mixes: Shares of the reference's text that were mixed in, by domain; their models are named by
            [`mixed_name`][], and have losses on the domain and on the reference.
    """

    name: str
    domains: tuple[str, ...]
    held_out: Mapping[str, HeldOut]
    splits: Mapping[str, str]
    scores: Mapping[tuple[str, str], Scores]
    reference: str | None
    seed: int = 0
    mixes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def change(self, calibrated: str, measured: str, against: str = DENSE) -> Estimate:
        """Return the relative change in bits per byte against another model on the same documents, with an interval."""
        base, own = self.scores[against, measured], self.scores[calibrated, measured]
        return relative_change(base.losses, own.losses, self.seed)

    def model_report(
        self,
        name: str,
        domain: str,
        environment: Environment,
        *,
        base_bytes: int | None,
        pruned_bytes: int,
        asked: float | None,
        notes: tuple[str, ...] = (),
    ) -> EvalReport:
        """Return the report of one model: its domain's text and questions, and the reference text.

        Args:
            name: Name of the model.
            domain: Domain that the model was calibrated on.
            environment: Where it was measured.
            base_bytes: Size of the base weights on disk, if they are there.
            pruned_bytes: Size of the pruned weights on disk.
            asked: Share of the parameters to remove, if the config has one.
            notes: Sentences that a reader of the numbers must know.
        """
        dense, own, held_out = self.scores[DENSE, domain], self.scores[name, domain], self.held_out[domain]
        choice = None
        if held_out.questions is not None and dense.answers is not None and own.answers is not None:
            how: dict[str, Any] = {"scorer": held_out.scorer, "num_fewshot": held_out.num_fewshot}
            choice = build_choice_facts(held_out.questions, dense.answers, own.answers, **how)
        general = None
        if self.reference not in (None, domain):
            general = TextLosses(self._dataset(self.reference), self._losses(name, self.reference))
        return EvalReport(
            base_model=self.name,
            dataset=self._dataset(domain),
            size=SizeFacts.measured(
                dense.parameters,
                own.parameters,
                asked_ratio=asked,
                base_weight_bytes=base_bytes,
                pruned_weight_bytes=pruned_bytes,
            ),
            loss=self._losses(name, domain),
            environment=environment,
            multiple_choice=choice,
            general=general,
            notes=notes,
        )

    def _asked_how(self) -> str:
        """Return scorer and number of examples, once where they are the same on all domains."""
        ways: dict[str, list[str]] = {}
        for domain in self.asked:
            some, fewest = self.held_out[domain], self._groups(DENSE, domain)[-1].shots[0]
            way = f"scorer {some.scorer}, {some.num_fewshot}-shot"
            if fewest < some.num_fewshot:
                way += f" (only {fewest} for some sources, which have no more examples)"
            ways.setdefault(way, []).append(domain)
        return "; ".join(way if len(ways) == 1 else f"{', '.join(names)}: {way}" for way, names in ways.items())

    def _scored(self) -> str:
        """Return how much text was scored."""
        parts = []
        for domain in self.domains:
            losses = self.scores[DENSE, domain].losses
            tokens = sum(loss.num_tokens for loss in losses)
            parts.append(f"{domain} {tokens:,} tokens of {len(losses):,} document{'' if len(losses) == 1 else 's'}")
        return f"Scored: {'; '.join(parts)}."

    def _dataset(self, domain: str) -> DatasetFacts:
        held_out = self.held_out[domain]
        return dataset_facts(held_out.passages, self.splits[domain], held_out.max_seq_length)

    def _losses(self, calibrated: str, measured: str) -> LossFacts:
        pruned = {"pruned": self.scores[calibrated, measured].losses}
        return build_loss_facts(self.scores[DENSE, measured].losses, pruned, seed=self.seed)

    def loss_rows(self) -> list[tuple[str, ...]]:
        """Return bits per byte: (calibrated on, parameters, one cell per domain)."""
        rows = [(DENSE, self._size(DENSE), *(f"{self._bits(DENSE, domain):.4f}" for domain in self.domains))]
        return rows + [
            (
                name,
                self._size(name),
                *(f"{self._bits(name, d):.4f} ({format_change(self.change(name, d))})" for d in self.domains),
            )
            for name in self.domains
        ]

    @property
    def asked(self) -> list[str]:
        """Domains with questions."""
        return [domain for domain in self.domains if self.held_out[domain].questions is not None]

    def accuracy_rows(self) -> list[tuple[str, ...]]:
        """Return the accuracy on all questions: (calibrated on, one cell per domain); empty without questions."""
        asked = self.asked
        models = (DENSE, *self.domains) if asked else ()
        return [(name, *(self._accuracy(name, domain, -1) for domain in asked)) for name in models]

    @property
    def source_header(self) -> tuple[str, ...]:
        """Names of the columns of [`source_rows`][]."""
        against = () if self.reference is None else (f"own against {self.reference}",)
        return ("questions", "number", DENSE, *self.domains, *against)

    def source_rows(self) -> list[tuple[str, ...]]:
        """Return the accuracy of every model by source, then of the whole domain, and own domain against reference."""
        rows = []
        for domain in self.asked:
            for index, group in enumerate(self._groups(DENSE, domain)):
                rows.append(
                    (
                        f"{domain} / {group.source}",
                        f"{group.num_questions:,}",
                        *(self._accuracy(name, domain, index) for name in (DENSE, *self.domains)),
                        *([] if self.reference is None else [self._own(domain, self.reference, index)]),
                    )
                )
        return rows

    def _own(self, domain: str, reference: str, index: int) -> str:
        if domain == reference:
            return ""
        paired = self._paired(domain, domain, reference)[index]
        return f"{format_change(paired.difference)}, p {paired.p_value:.2g}"

    def _groups(self, name: str, domain: str) -> tuple[Accuracy, ...]:
        questions, answers = self.held_out[domain].questions, self.scores[name, domain].answers
        assert questions is not None and answers is not None  # noqa: PT018
        return summarize_answers(questions, answers)

    def _paired(self, name: str, domain: str, against: str) -> tuple[PairedAccuracy, ...]:
        base, own = self.scores[against, domain].answers, self.scores[name, domain].answers
        assert base is not None and own is not None  # noqa: PT018
        return compare_answers(base, own)

    def _accuracy(self, name: str, domain: str, index: int) -> str:
        paired = None if name == DENSE else self._paired(name, domain, DENSE)[index]
        return format_accuracy(self._groups(name, domain)[index], paired)

    def _bits(self, name: str, domain: str) -> float:
        return summarize_losses(self.scores[name, domain].losses, seed=self.seed).bits_per_byte.value

    def _size(self, name: str) -> str:
        return f"{self.scores[name, self.domains[0]].parameters:,}"

    def context_rows(self) -> list[tuple[str, ...]]:
        """Return (domain, own against reference model on its text, the same on the reference's text).

        The models have equal sizes. Empty without a reference. Below 0 in the first column: calibrating on the domain
        makes a better model for it than calibrating on the reference's text.
        """
        reference = self.reference
        return [
            (
                name,
                format_change(self.change(name, name, against=reference)),
                format_change(self.change(name, reference, against=reference)),
            )
            for name in self.domains
            if reference is not None and name != reference
        ]

    def curves(self) -> dict[str, list[tuple[float, Estimate, Estimate]]]:
        """Return (share of the reference's text, change on the domain's text, on the reference's text), by domain.

        From the domain's own model (0) to the reference's model (1); empty where nothing was mixed in.
        """
        reference = self.reference
        return {
            domain: [
                (share, self.change(name, domain), self.change(name, reference))
                for share, name in [
                    (0.0, domain),
                    *((share, mixed_name(domain, share)) for share in sorted(shares)),
                    (1.0, reference),
                ]
            ]
            for domain, shares in self.mixes.items()
            if reference is not None
        }

    def mix_rows(self) -> list[tuple[str, ...]]:
        """Return (domain, share of the reference's text, change on the domain's text, on the reference's text)."""
        return [
            (domain, f"{100 * share:g} %", format_change(own), format_change(general))
            for domain, curve in self.curves().items()
            for share, own, general in curve
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON values."""
        return {
            "domains": list(self.domains),
            "reference": self.reference,
            "mixes": {
                domain: [[share, own.value, general.value] for share, own, general in curve]
                for domain, curve in self.curves().items()
            },
            "cells": [
                {
                    "calibrated": name,
                    "measured": domain,
                    **summarize_scores(
                        self.scores[name, domain],
                        self.held_out[domain],
                        None if name == DENSE else self.scores[DENSE, domain],
                        seed=self.seed,
                    ),
                }
                for name, domain in self.scores
            ],
        }

    def run_report(self, environment: Environment) -> RunReport:
        """Return everything as a report."""
        reference = self.reference
        tables = [
            ReportTable(
                "Bits per byte",
                ("calibrated on", "parameters", *(f"on {name}" for name in self.domains)),
                tuple(self.loss_rows()),
                f"Bits per byte on test text; in parentheses the change against the base model. {INTERVALS} "
                f"{self._scored()}",
            )
        ]
        if reference is not None:
            tables.append(
                ReportTable(
                    f"Own domain against {reference}",
                    ("domain", "on its own text", f"on {reference} text"),
                    tuple(self.context_rows()),
                    f"Does the context matter? Models of equal size (to one unit), calibrated on their own domain, "
                    f"against the model calibrated on {reference} (below 0: better).",
                )
            )
        if self.mixes:
            tables.append(
                ReportTable(
                    f"Text of {reference} mixed in",
                    ("domain", f"{reference} text", "on its own text", f"on {reference} text"),
                    tuple(self.mix_rows()),
                    f"Change of the bits per byte against the base model, by the share of {reference} text among the "
                    f"calibration samples (general_data_ratio): 0 is the domain's own model, 1 that of {reference}.",
                )
            )
        if self.asked:
            against = "" if reference is None else f", and each domain's own model against {reference}'s"
            tables += [
                ReportTable(
                    "Accuracy, all sources",
                    ("calibrated on", *(f"on {name}" for name in self.asked)),
                    tuple(self.accuracy_rows()),
                    f"Accuracy on multiple-choice questions, all sources together ({self._asked_how()}), with 95 % "
                    f"Wilson intervals; p of McNemar's exact test against the base model. An asterisk marks "
                    f"questions that a model answers no better than chance, so a change there means nothing.",
                ),
                ReportTable(
                    "Accuracy by source", self.source_header, tuple(self.source_rows()), f"The same by source{against}."
                ),
            ]
        return RunReport(
            "matrix",
            self.name,
            f"Domain matrix of {self.name}",
            tuple(tables),
            self.to_dict(),
            environment,
            tuple(f"{domain}: {how}" for domain, how in self.splits.items()),
        )
