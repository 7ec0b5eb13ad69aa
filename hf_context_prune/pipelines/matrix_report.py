"""What a domain matrix found, as tables and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_context_prune.evaluation.accuracy import Accuracy, PairedAccuracy, compare_answers, summarize_answers
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.general_text import build_loss_facts
from hf_context_prune.evaluation.losses import relative_change, summarize_losses
from hf_context_prune.evaluation.reports.formatting import format_accuracy, format_change
from hf_context_prune.evaluation.reports.report import (
    DatasetFacts,
    Environment,
    EvalReport,
    LossFacts,
    SizeFacts,
    TextLosses,
)
from hf_context_prune.evaluation.reports.run_report import ReportTable, RunReport
from hf_context_prune.evaluation.scores import HeldOut, Scores, choice_facts, summary_of

DENSE = "dense"


def mixed_name(domain: str, share: float) -> str:
    """Name of the model of a domain that a share of general text was mixed in for; no domain can be named so."""
    return f"{domain}+{share:g}"


@dataclass(frozen=True)
class DomainMatrix:
    """Scores of every model on every domain.

    Attributes:
        name: Of the dense model.
        domains: Names, in order; each is a domain calibrated on, and one measured on.
        held_out: What was scored, by domain.
        splits: How each domain's text was kept apart, by domain.
        scores: By (model, measured on); a model is the domain that it was calibrated on, or ``"dense"``.
        reference: The domain that the others are compared with, if there is one.
        seed: Of the intervals.
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
        """Bits a byte over those of another model on the same documents, less 1; paired interval over documents."""
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
        """What one model scored on its domain's text and questions, and on the reference, as a report.

        Args:
            name: Of the model.
            domain: The one that it was calibrated on.
            environment: Where it was measured.
            base_bytes: Size of the dense weights on disk, if they are there.
            pruned_bytes: Size of its own.
            asked: Share of the parameters that was to go, if the config has one.
            notes: Sentences that a reader of the figures must know.
        """
        dense, own, held_out = self.scores[DENSE, domain], self.scores[name, domain], self.held_out[domain]
        choice = None
        if held_out.questions is not None and dense.answers is not None and own.answers is not None:
            how: dict[str, Any] = {"scorer": held_out.scorer, "num_fewshot": held_out.num_fewshot}
            choice = choice_facts(held_out.questions, dense.answers, own.answers, **how)
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
        """Scorer and examples, once where they are the same on all domains."""
        ways: dict[str, list[str]] = {}
        for domain in self.asked:
            some, fewest = self.held_out[domain], self._groups(DENSE, domain)[-1].shots[0]
            way = f"scorer {some.scorer}, {some.num_fewshot}-shot"
            if fewest < some.num_fewshot:
                way += f" (of some sources only {fewest}: they have no more examples)"
            ways.setdefault(way, []).append(domain)
        return "; ".join(way if len(ways) == 1 else f"{', '.join(names)}: {way}" for way, names in ways.items())

    def _scored(self) -> str:
        """How much text the losses are of; without a second document there is no interval."""
        parts = []
        for domain in self.domains:
            losses = self.scores[DENSE, domain].losses
            tokens = sum(loss.num_tokens for loss in losses)
            parts.append(f"{domain} {tokens:,} tokens of {len(losses):,} document{'' if len(losses) == 1 else 's'}")
        return f"Scored: {'; '.join(parts)} (one document has no interval)."

    def _dataset(self, domain: str) -> DatasetFacts:
        text = self.held_out[domain].text
        return DatasetFacts(text.name, text.revision, text.fingerprint, self.splits[domain])

    def _losses(self, calibrated: str, measured: str) -> LossFacts:
        pruned = {"pruned": self.scores[calibrated, measured].losses}
        return build_loss_facts(self.scores[DENSE, measured].losses, pruned, seed=self.seed)

    def loss_rows(self) -> list[tuple[str, ...]]:
        """Bits a byte: (calibrated on, parameters, one cell a domain)."""
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
        """Domains that have questions."""
        return [domain for domain in self.domains if self.held_out[domain].questions is not None]

    def accuracy_rows(self) -> list[tuple[str, ...]]:
        """Accuracy on all of a domain's questions: (calibrated on, one cell a domain); empty without any."""
        asked = self.asked
        models = (DENSE, *self.domains) if asked else ()
        return [(name, *(self._accuracy(name, domain, -1) for domain in asked)) for name in models]

    @property
    def source_header(self) -> tuple[str, ...]:
        """Names of the columns of [`source_rows`][]."""
        against = () if self.reference is None else (f"own against {self.reference}",)
        return ("questions", "number", DENSE, *self.domains, *against)

    def source_rows(self) -> list[tuple[str, ...]]:
        """Accuracy source by source, and last of all of a domain, of every model; and own domain against reference."""
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
        """(domain, own against reference there, own against reference on the reference's text), of equal size.

        Empty without a reference.

        Below 0 in the first: the domain's own context makes a better model for it than the reference's text does.
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
        """(share of the reference's text, change on the domain's text, change on the reference's), by domain.

        From the domain's own model (0) to the reference's (1); empty where nothing was mixed in.
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
        """(domain, share of the reference's text, change on the domain's text, on the reference's)."""
        return [
            (domain, f"{100 * share:g} %", format_change(own), format_change(general))
            for domain, curve in self.curves().items()
            for share, own, general in curve
        ]

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
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
                    **summary_of(
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
        """All of it, as a report."""
        reference = self.reference
        tables = [
            ReportTable(
                "Bits a byte",
                ("calibrated on", "parameters", *(f"on {name}" for name in self.domains)),
                tuple(self.loss_rows()),
                f"Bits a byte on held-out text; in brackets the change against the dense model, with a 95 % interval "
                f"over documents. {self._scored()}",
            )
        ]
        if reference is not None:
            tables.append(
                ReportTable(
                    f"Own domain against {reference}",
                    ("domain", "on its own text", f"on {reference} text"),
                    tuple(self.context_rows()),
                    f"Does the context matter? Models of equal size (to one unit), calibrated on their own domain, "
                    f"against the one calibrated on {reference} (below 0: better).",
                )
            )
        if self.mixes:
            tables.append(
                ReportTable(
                    f"Text of {reference} mixed in",
                    ("domain", f"{reference} text", "on its own text", f"on {reference} text"),
                    tuple(self.mix_rows()),
                    f"Change of the bits a byte against the dense model, by the share of {reference} text among the "
                    f"calibration samples (general_data_ratio): the domain's own model has none, {reference}'s "
                    f"nothing else.",
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
                    f"Wilson intervals; p of McNemar's exact test against the dense one. *: its interval is not clear "
                    f"of guessing, so these questions say nothing about this model.",
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
