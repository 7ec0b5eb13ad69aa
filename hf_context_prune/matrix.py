"""The domain matrix: prune once for every domain, measure each model on every domain. Does the context matter?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .config import PrunerConfig
from .data import TextSource
from .errors import ConfigError, unknown
from .evaluation import Estimate, compare_answers, compare_losses, summarize_answers, summarize_losses
from .global_budget import check_budget, check_general_mix, smaller_model
from .loading import LoadedModel, load_model
from .measuring import QuestionOptions
from .overlap import drop_overlapping
from .pipeline import as_loaded, split_text
from .plan import PruningPlan, fingerprint
from .rendering import matrix_picture
from .rows import Rows
from .saving import PLAN_NAME, check_target, save_pruned
from .scores import HeldOut, Scores, held_out_of, score, summary_of

DENSE = "dense"
ROWS_NAME, TABLE_NAME, PICTURE_NAME, MODELS = "matrix.jsonl", "matrix.md", "matrix.png", "models"


@dataclass(frozen=True)
class DomainMatrix:
    """Scores of every model on every domain.

    Attributes:
        name: Of the dense model.
        domains: Names, in order; each is a domain calibrated on, and one measured on.
        held_out: What was scored, by domain.
        splits: How each domain's text was kept apart, by domain.
        scores: By (model, measured on); a model is the domain that it was calibrated on, or ``"dense"``.
        seed: Of the intervals.
    """

    name: str
    domains: tuple[str, ...]
    held_out: Mapping[str, HeldOut]
    splits: Mapping[str, str]
    scores: Mapping[tuple[str, str], Scores]
    seed: int = 0

    def change(self, calibrated: str, measured: str, against: str = DENSE) -> Estimate:
        """Bits a byte over those of another model on the same documents, less 1; paired interval over documents."""
        return relative_change(self.scores[against, measured], self.scores[calibrated, measured], self.seed)

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

    def accuracy_rows(self) -> list[tuple[str, ...]]:
        """Accuracy of the domains that have questions: (calibrated on, one cell a domain); empty without any."""
        asked = self.asked
        return [(name, *(self._accuracy(name, d) for d in asked)) for name in (DENSE, *self.domains)] if asked else []

    @property
    def asked(self) -> list[str]:
        """Domains that have questions."""
        return [domain for domain in self.domains if self.held_out[domain].questions is not None]

    def _accuracy(self, name: str, domain: str) -> str:
        questions, scores, base = self.held_out[domain].questions, self.scores[name, domain], self.scores[DENSE, domain]
        assert questions is not None and scores.answers is not None and base.answers is not None  # noqa: PT018
        group = summarize_answers(questions, scores.answers)[-1]
        low, high = group.accuracy.interval or (group.accuracy.value,) * 2
        cell = f"{group.accuracy.value:.1%} [{low:.1%}, {high:.1%}]"
        if name == DENSE:
            return f"{cell}, guessing {group.chance:.0%}"
        return f"{cell}, p {compare_answers(base.answers, scores.answers, seed=self.seed)[-1].p_value:.2g}"

    def _bits(self, name: str, domain: str) -> float:
        return summarize_losses(self.scores[name, domain].losses, seed=self.seed).bits_per_byte.value

    def _size(self, name: str) -> str:
        return f"{self.scores[name, self.domains[0]].parameters:,}"

    def context_rows(self, reference: str) -> list[tuple[str, str, str]]:
        """(domain, own against reference there, own against reference on the reference's text), of equal size.

        Below 0 in the first: the domain's own context makes a better model for it than the reference's text does.
        """
        return [
            (
                name,
                percent(self.change(name, name, against=reference)),
                percent(self.change(name, reference, against=reference)),
            )
            for name in self.domains
            if name != reference
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

    def markdown(self, *, reference: str | None) -> str:
        """The tables as Markdown."""
        parts = [
            f"# Domain matrix of {self.name}",
            f"![Change of the bits a byte]({PICTURE_NAME})",
            "Bits a byte on held-out text; in brackets the change against the dense model, with a 95 % interval over "
            "documents.",
            _table(("calibrated on", "parameters", *(f"on {d}" for d in self.domains)), self.loss_rows()),
        ]
        if reference is not None:
            parts += [
                f"Does the context matter? Models of equal size, calibrated on their own domain, against the one "
                f"calibrated on {reference} (below 0: better):",
                _table(("domain", "on its own text", f"on {reference} text"), self.context_rows(reference)),
            ]
        if self.asked:
            some = self.held_out[self.asked[0]]
            parts += [
                f"Accuracy on multiple-choice questions, all sources together (scorer `{some.scorer}`, "
                f"{some.num_shots}-shot), with 95 % Wilson intervals; p of McNemar's exact test against the dense one:",
                _table(("calibrated on", *(f"on {d}" for d in self.asked)), self.accuracy_rows()),
            ]
        parts += [f"- {domain}: {how}" for domain, how in self.splits.items()]
        return "\n\n".join(parts[: -len(self.splits)]) + "\n\n" + "\n".join(parts[-len(self.splits) :]) + "\n"


def relative_change(base: Scores, own: Scores, seed: int) -> Estimate:
    """Bits a byte over those of another model on the same documents, less 1; paired interval over documents."""
    ratio = compare_losses(base.losses, own.losses, seed=seed).bits_per_byte_ratio
    interval = None if ratio.interval is None else (ratio.interval[0] - 1, ratio.interval[1] - 1)
    return Estimate(ratio.value - 1, interval)


def percent(estimate: Estimate) -> str:
    """A share with its interval, in per cent with a sign."""
    text = f"{estimate.value:+.1%}"
    if estimate.interval is None:
        return text
    return f"{text} [{estimate.interval[0]:+.1%}, {estimate.interval[1]:+.1%}]"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]] | list[tuple[str, str, str]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def domain_matrix(
    model: PreTrainedModel | LoadedModel | str | Path,
    domains: Mapping[str, Any],
    output: str | Path,
    config: PrunerConfig | None = None,
    *,
    tokenizer: Any = None,  # noqa: ANN401
    eval_data: Mapping[str, Any] | None = None,
    questions: Mapping[str, QuestionOptions] | None = None,
    reference: str = "general",
    max_tokens: int | None = 20_000,
) -> DomainMatrix:
    """Prune a model once for each domain, and measure every result on every domain.

    Writes ``matrix.md``, ``matrix.png``, ``matrix.jsonl`` and the pruned folders (``models/<domain>``); a run that was
    killed goes on from there.

    Args:
        model: A `PreTrainedModel`, or what [`load_model`][] reads.
        domains: Text by the name of the domain; two or more.
        output: Folder of all results.
        config: What to remove and how: the same for all.
        tokenizer: As for [`prune`][].
        eval_data: Text for the figures by domain; a domain without one holds out a tenth of its documents. What any of
            the calibration texts has too is dropped.
        questions: Multiple-choice questions by domain.
        reference: The domain that the others are compared with, if it is one of them: text of no domain.
        max_tokens: Held-out tokens a domain at most, whole documents.

    Raises:
        ConfigError: Fewer than two domains, or names that are none.
        ContextPruneError: See `hf_context_prune.errors`. What was finished stays.
    """
    config, folder = config or PrunerConfig(), Path(output)
    names = tuple(domains)
    _check_names(names, eval_data or {}, questions or {})
    base = as_loaded(model, tokenizer)
    check_budget(base.model, base.tokenizer, config)
    check_general_mix(config, None)
    train, held_out, splits = _texts(base, domains, eval_data or {}, questions or {}, config, max_tokens)
    rows = Rows(
        folder / ROWS_NAME,
        {
            "model": [base.name, fingerprint(base.model), str(base.model.dtype)],
            "config": config.to_dict(),
            "domains": {name: [text.name, text.fingerprint] for name, text in train.items()},
            "held_out": {name: one.setting() for name, one in held_out.items()},
        },
    )
    for name, text in train.items():  # before the long work
        _finished(base, text, folder / MODELS / name, config)
    scores: dict[tuple[str, str], Scores] = {}
    for calibrated in (DENSE, *names):
        loaded: list[LoadedModel] = []

        def smaller(name: str = calibrated, loaded: list[LoadedModel] = loaded) -> LoadedModel:
            if not loaded:  # nothing is loaded or pruned where all rows are there
                loaded.append(base if name == DENSE else _pruned(base, train[name], folder / MODELS / name, config))
            return loaded[0]

        for measured, one in held_out.items():
            row = rows.get(
                [calibrated, measured],
                lambda one=one, get=smaller: score(get().model, get().tokenizer, one).to_row(),  # type: ignore[misc]
            )
            scores[calibrated, measured] = Scores.from_row(row)
    result = DomainMatrix(base.name, names, held_out, splits, scores, config.pruning_seed)
    matrix_picture(names, {(a, b): result.change(a, b).value for a in names for b in names}, folder / PICTURE_NAME)
    shown = reference if reference in names else None
    (folder / TABLE_NAME).write_text(result.markdown(reference=shown), encoding="utf-8")
    return result


def _check_names(names: tuple[str, ...], *others: Mapping[str, Any]) -> None:
    if len(names) < 2:
        raise ConfigError(f"There {'is one domain' if names else 'are no domains'}; a matrix needs two or more.")
    for name in names:
        if name == DENSE or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(
                f"The domain is named {name!r}; names are letters, digits, - and _, and {DENSE!r} is the model itself."
            )
    for other in others:
        for name in other:
            if name not in names:
                raise ConfigError(unknown("domain", name, names))


def _texts(
    base: LoadedModel,
    domains: Mapping[str, Any],
    eval_data: Mapping[str, Any],
    questions: Mapping[str, QuestionOptions],
    config: PrunerConfig,
    max_tokens: int | None,
) -> tuple[dict[str, TextSource], dict[str, HeldOut], dict[str, str]]:
    """Calibration text, what is held out, and a sentence on how, by domain."""
    train, given, splits = dict[str, TextSource](), dict[str, TextSource](), dict[str, str]()
    for name, data in domains.items():
        train[name], given[name], splits[name] = split_text(data, eval_data.get(name), config, base.tokenizer)
    held_out = {}
    for name, text in given.items():
        left, number = text, len(text)
        for other, calibration in train.items():
            left = left if other == name else drop_overlapping(left, calibration)[0]
        if not len(left):
            raise ConfigError(f"The calibration texts of the other domains have all held-out documents of {name}.")
        if number > len(left):
            splits[name] += f" {number - len(left):,} more were dropped: the other domains' calibration text has them."
        held_out[name] = held_out_of(
            left,
            base.tokenizer,
            max_tokens=max_tokens,
            max_seq_length=config.max_seq_length,
            questions=questions.get(name),
        )
    return train, held_out, splits


def _provenance(base: LoadedModel, text: TextSource) -> dict[str, Any]:
    return {
        "base_model": base.name,
        "base_revision": base.revision,
        "dtype": str(base.model.dtype),
        "data": {"name": text.name, "revision": text.revision, "fingerprint": text.fingerprint},
    }


def _finished(base: LoadedModel, text: TextSource, folder: Path, config: PrunerConfig) -> bool:
    """Whether an earlier run left the very model of a domain in its folder.

    Raises:
        ConfigError: It holds another one.
        SaveError: It holds something else, or can't be written.
    """
    if not (folder / PLAN_NAME).is_file():
        check_target(folder)
        return False
    plan, asked = PruningPlan.load(folder / PLAN_NAME), {**_provenance(base, text), "config": config.to_dict()}
    known = {name: plan.provenance.get(name) for name in asked}
    if plan.model_fingerprint != fingerprint(base.model) or known != asked:
        raise ConfigError(
            f"{folder} holds a model that was pruned from another one, or with other options or text. Name another "
            f"--output, or remove it."
        )
    return True


def _pruned(base: LoadedModel, text: TextSource, folder: Path, config: PrunerConfig) -> LoadedModel:
    """The model of a domain, from its folder if an earlier run left it there."""
    if not _finished(base, text, folder, config):
        model, tokenizer, plan = smaller_model(
            base.model, base.tokenizer, text, config, provenance=_provenance(base, text)
        )
        save_pruned(model, folder, tokenizer=tokenizer, plan=plan)
    return load_model(folder, device=str(base.model.device))
