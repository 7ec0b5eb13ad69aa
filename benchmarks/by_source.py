"""The change of the loss by source of the test text: what a domain's worst source loses, beside the mean."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import corpus, table
from hf_context_prune.evaluation.bootstrap import Estimate, bootstrap_estimate, ratio, ratio_to_change
from hf_context_prune.evaluation.reports.formatting import format_change

RESAMPLES = 2_000
Sources = Mapping[str, Mapping[str, str]]
"""The source of each document of the test text, by domain."""


class SourceChange(NamedTuple):
    """What one source loses."""

    source: str
    change: Estimate
    documents: int

    def __str__(self) -> str:
        """Return it as a cell of a table."""
        plural = "" if self.documents == 1 else "s"
        return f"{format_change(self.change)} ({self.source}, {self.documents} document{plural})"


def read_sources(args: argparse.Namespace, domains: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the source of every document of the validation text, by domain: rows have the names of documents alone."""
    return {
        domain: {record.doc: record.source for record in corpus(args, "validation", domain).documents}
        for domain in domains
    }


def sources_of(base: Mapping[str, Any], known: Mapping[str, str]) -> list[str]:
    """Return the source of each document of a base model's row.

    Raises:
        SystemExit: The data has no such document any more.
    """
    docs = [doc for doc, *_ in base["documents"]]
    if missing := [doc for doc in docs if doc not in known]:
        raise SystemExit(
            f"The row of the base model was measured on {missing[0]!r}, which --data does not have. Give the data that "
            f"it was measured on, or start over with --fresh."
        )
    return [known[doc] for doc in docs]


def mean_change(before: Sequence[float], after: Sequence[float], sources: Sequence[str], seed: int) -> Estimate:
    """Return the relative change of the summed loss; sources are drawn, then documents, as in reports."""
    found = bootstrap_estimate(ratio, (after, before), sources, seed=seed, n_resamples=RESAMPLES)
    return ratio_to_change(found)


def changes_by_source(
    before: Sequence[float], after: Sequence[float], sources: Sequence[str], seed: int
) -> list[SourceChange]:
    """Return the relative change of each source, the largest first; with intervals where it has ten documents."""
    found = []
    for name in sorted(set(sources)):
        own = [place for place, source in enumerate(sources) if source == name]
        pair = [before[place] for place in own], [after[place] for place in own]
        found.append(SourceChange(name, mean_change(*pair, [name] * len(own), seed), len(own)))
    return sorted(found, key=lambda one: -one.change.value)


def worst_change(
    before: Sequence[float],
    afters: Sequence[Sequence[float]],
    sources: Sequence[str],
    seed: int,
    *,
    fewest: int = 1,
) -> list[Estimate]:
    """Return the relative change of the worst source of several models, then the second's less the first's, and so on.

    Documents are drawn within each source, the same ones for all models, and the worst source is that of each draw, so
    that intervals hold for "the worst source" and not for the one that came out worst.

    Args:
        before: Losses of the base model by document.
        afters: Losses of each model.
        sources: The source of each document.
        seed: Seed of the draws.
        fewest: Sources with fewer documents are left out.

    Raises:
        ValueError: No source has as many documents.
    """
    names, counts = np.unique(np.asarray(sources), return_counts=True)
    groups = [np.flatnonzero(np.asarray(sources) == name) for name in names[counts >= fewest]]
    if not groups:
        raise ValueError(f"no source has {fewest} test documents; allow fewer (--fewest), or more text (--eval-tokens)")
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(group), (RESAMPLES, len(group))) for group in groups]
    dense = np.asarray(before, dtype=np.float64)

    def changes(after: Sequence[float], picks: Sequence[np.ndarray]) -> np.ndarray:
        losses = np.asarray(after, dtype=np.float64)
        return np.max([losses[own].sum(axis=-1) / dense[own].sum(axis=-1) - 1 for own in picks], axis=0)

    values = [float(changes(after, groups)) for after in afters]
    spreads = [changes(after, [group[pick] for group, pick in zip(groups, draws, strict=True)]) for after in afters]
    found = [*zip(values, spreads, strict=True)]
    found += [(value - values[0], spread - spreads[0]) for value, spread in zip(values[1:], spreads[1:], strict=True)]
    ends = [np.percentile(spread, [2.5, 97.5]).tolist() for _, spread in found]
    return [Estimate(value, (low, high)) for (value, _), (low, high) in zip(found, ends, strict=True)]


def worst_table(
    cells: Mapping[float, Mapping[str, tuple[Estimate, SourceChange | None]]], domains: Sequence[str]
) -> str:
    """Return a table of the mean and the worst source, by share and domain; None where there is a single source."""
    body = [
        [
            f"{share:.0%}",
            *(
                text
                for domain in domains
                for mean, worst in [found[domain]]
                for text in (format_change(mean), "one source" if worst is None else str(worst))
            ),
        ]
        for share, found in cells.items()
    ]
    header = [what for domain in domains for what in (f"{domain}, mean", f"{domain}, worst source")]
    return table(["asked", *header], body)


def mean_and_worst(
    before: Sequence[float], after: Sequence[float], sources: Sequence[str], seed: int
) -> tuple[Estimate, SourceChange | None]:
    """Return the mean change and that of the worst source; None where the text has a single one."""
    changes = changes_by_source(before, after, sources, seed)
    return mean_change(before, after, sources, seed), changes[0] if len(changes) > 1 else None
