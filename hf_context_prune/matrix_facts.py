"""What a domain matrix found, as tables and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .cells import less_one, percent
from .evaluation import (
    Accuracy,
    DatasetFacts,
    Environment,
    Estimate,
    EvalReport,
    LossFacts,
    PairedAccuracy,
    SizeFacts,
    TextLosses,
    compare_answers,
    compare_losses,
    summarize_answers,
    summarize_losses,
)
from .evaluation.texts import loss_facts
from .markdown import inert, table
from .measuring import choice_facts
from .scores import HeldOut, Scores, summary_of

DENSE, PICTURE_NAME = "dense", "matrix.png"


def relative_change(base: Scores, own: Scores, seed: int) -> Estimate:
    """Bits a byte over those of another model on the same documents, less 1; paired interval over documents."""
    return less_one(compare_losses(base.losses, own.losses, seed=seed).bits_per_byte_ratio)


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
    """

    name: str
    domains: tuple[str, ...]
    held_out: Mapping[str, HeldOut]
    splits: Mapping[str, str]
    scores: Mapping[tuple[str, str], Scores]
    reference: str | None
    seed: int = 0

    def change(self, calibrated: str, measured: str, against: str = DENSE) -> Estimate:
        """Bits a byte over those of another model on the same documents, less 1; paired interval over documents."""
        return relative_change(self.scores[against, measured], self.scores[calibrated, measured], self.seed)

    def report(
        self, domain: str, dtype: str, *, base_bytes: int | None, pruned_bytes: int, asked: float | None
    ) -> EvalReport:
        """What a domain's model scored on its own text and questions, and on the reference, as a report.

        Args:
            domain: The one that it was calibrated on.
            dtype: Of the weights.
            base_bytes: Size of the dense weights on disk, if they are there.
            pruned_bytes: Size of its own.
            asked: Share of the parameters that was to go, if the config has one.
        """
        dense, own, held_out = self.scores[DENSE, domain], self.scores[domain, domain], self.held_out[domain]
        choice = None
        if held_out.questions is not None and dense.answers is not None:
            how: dict[str, Any] = {"scorer": held_out.scorer, "num_shots": held_out.num_shots}
            choice = choice_facts(held_out.questions, dense.answers, own.answers, **how)
        general = None
        if self.reference not in (None, domain):
            general = TextLosses(self._dataset(self.reference), self._losses(domain, self.reference))
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
            loss=self._losses(domain, domain),
            environment=Environment.current(dtype),
            multiple_choice=choice,
            general=general,
        )

    def _dataset(self, domain: str) -> DatasetFacts:
        text = self.held_out[domain].text
        return DatasetFacts(text.name, text.revision, text.fingerprint, self.splits[domain])

    def _losses(self, calibrated: str, measured: str) -> LossFacts:
        pruned = {"pruned": self.scores[calibrated, measured].losses}
        return loss_facts(self.scores[DENSE, measured].losses, pruned, seed=self.seed)

    def loss_rows(self) -> list[tuple[str, ...]]:
        """Bits a byte: (calibrated on, parameters, one cell a domain)."""
        rows = [(DENSE, self._size(DENSE), *(f"{self._bits(DENSE, domain):.4f}" for domain in self.domains))]
        return rows + [
            (
                name,
                self._size(name),
                *(f"{self._bits(name, d):.4f} ({percent(self.change(name, d))})" for d in self.domains),
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
        return f"{percent(paired.difference)}, p {paired.p_value:.2g}"

    def _groups(self, name: str, domain: str) -> tuple[Accuracy, ...]:
        questions, answers = self.held_out[domain].questions, self.scores[name, domain].answers
        assert questions is not None and answers is not None  # noqa: PT018
        return summarize_answers(questions, answers)

    def _paired(self, name: str, domain: str, against: str) -> tuple[PairedAccuracy, ...]:
        base, own = self.scores[against, domain].answers, self.scores[name, domain].answers
        assert base is not None and own is not None  # noqa: PT018
        return compare_answers(base, own)

    def _accuracy(self, name: str, domain: str, index: int) -> str:
        group = self._groups(name, domain)[index]
        low, high = group.accuracy.interval or (group.accuracy.value,) * 2
        cell = f"{group.accuracy.value:.1%} [{low:.1%}, {high:.1%}]"
        if name == DENSE:
            return f"{cell}, guessing {group.chance:.0%}{'' if low > group.chance else '*'}"
        return f"{cell}, p {self._paired(name, domain, DENSE)[index].p_value:.2g}"

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
                percent(self.change(name, name, against=reference)),
                percent(self.change(name, reference, against=reference)),
            )
            for name in self.domains
            if reference is not None and name != reference
        ]

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {
            "model": self.name,
            "domains": list(self.domains),
            "held_out": dict(self.splits),
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
                for name in (DENSE, *self.domains)
                for domain in self.domains
            ],
        }

    def markdown(self) -> str:
        """The tables as Markdown."""
        parts = [
            f"# Domain matrix of {inert(self.name)}",
            f"![Change of the bits a byte]({PICTURE_NAME})",
            "Bits a byte on held-out text; in brackets the change against the dense model, with a 95 % interval over "
            "documents.",
            table(("calibrated on", "parameters", *(f"on {d}" for d in self.domains)), self.loss_rows()),
        ]
        if self.reference is not None:
            parts += [
                f"Does the context matter? Models of equal size (to one unit), calibrated on their own domain, against "
                f"the one calibrated on {self.reference} (below 0: better):",
                table(("domain", "on its own text", f"on {self.reference} text"), self.context_rows()),
            ]
        if self.asked:
            how = [
                f"{domain}: scorer `{some.scorer}`, {some.num_shots}-shot" + ("" if fewest >= some.num_shots else said)
                for domain in self.asked
                for some, fewest in [(self.held_out[domain], self._groups(DENSE, domain)[-1].shots[0])]
                for said in [f" (of some sources only {fewest}: they have no more examples)"]
            ]
            parts += [
                f"Accuracy on multiple-choice questions, all sources together ({'; '.join(how)}), with 95 % Wilson "
                f"intervals; p of McNemar's exact test against the dense one. *: its interval is not clear of "
                f"guessing, so these questions say nothing about this model:",
                table(("calibrated on", *(f"on {d}" for d in self.asked)), self.accuracy_rows()),
                "The same by source"
                + ("" if self.reference is None else f", and each domain's own model against {self.reference}'s")
                + ":",
                table(self.source_header, self.source_rows()),
            ]
        return (
            "\n\n".join(parts)
            + "\n\n"
            + "\n".join(f"- {domain}: {inert(how)}" for domain, how in self.splits.items())
            + "\n"
        )
