"""A figure with its bootstrap interval."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_context_prune.errors import ConfigError

CONFIDENCE = 0.95
MIN_DOCUMENTS = 10
"""With fewer documents there is no interval: what so few show of their spread is chance."""
MIN_SOURCES = 5
"""With fewer sources, but more than one, there is no interval either: documents of a source are alike."""

FloatArray = NDArray[np.float64]
Statistic = Callable[..., FloatArray]

_RESAMPLES_PER_BATCH = 25  # held in memory at once


@dataclass(frozen=True)
class Estimate:
    """A point estimate with its 95 % percentile bootstrap interval, or with the range over its sources.

    Attributes:
        value: The point estimate over all documents.
        interval: (low, high), or None where there are fewer than [`MIN_DOCUMENTS`][] documents, or several sources but
            fewer than [`MIN_SOURCES`][].
        span: (lowest, highest) value of a source, where there are several and no interval.
    """

    value: float
    interval: tuple[float, float] | None
    span: tuple[float, float] | None = None

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """Return an increasing function of the estimate, with the ends of its interval and its range transformed.

        Args:
            function: The function.
        """
        ends = (pair and (function(pair[0]), function(pair[1])) for pair in (self.interval, self.span))
        return Estimate(function(self.value), *ends)


def ratio_to_change(ratio: Estimate) -> Estimate:
    """Return a ratio as a relative change: less 1."""
    return ratio.map(lambda value: value - 1)


def ratio(numerator: ArrayLike, denominator: ArrayLike, axis: int = -1) -> FloatArray:
    """Return the sum over `axis` of the first column over that of the second."""
    return np.asarray(np.sum(numerator, axis=axis) / np.sum(denominator, axis=axis))


def bits_per_byte(nll: ArrayLike, num_bytes: ArrayLike, axis: int = -1) -> FloatArray:
    """Return the bits per byte of all documents together.

    Args:
        nll: Negative log-likelihoods (nats), summed over each document; shape [..., documents].
        num_bytes: UTF-8 bytes of each document.
        axis: Of the documents.
    """
    return ratio(nll, num_bytes, axis) / math.log(2)


def bootstrap_estimate(
    statistic: Statistic,
    columns: Sequence[Sequence[float]],
    sources: Sequence[str],
    *,
    seed: int,
    n_resamples: int,
) -> Estimate:
    """Estimate `statistic` with a percentile interval, resampling sources and then whole documents of each.

    Documents of one source share a template or a subject, so they are no independent draws. Of a single source, its
    documents are resampled alone, and the interval is one for further text of that source.

    The columns are resampled together (row i of every column is one document), so a statistic of several columns
    is a ratio or a paired difference as it should be, and calls with one seed see the same resamples.

    Args:
        statistic: Function of the columns ([..., documents], float64) and the keyword `axis`, reduced over `axis`: of
            their sums, so that a document that is drawn twice may be given as twice its values.
        columns: Equally long sequences, one value per document.
        sources: The source of each document.
        seed: Seed of the resampling.
        n_resamples: Number of resamples, at least 1.

    Raises:
        ConfigError: `n_resamples` is below 1.
    """
    if n_resamples < 1:
        raise ConfigError(f"n_resamples is {n_resamples}; it must be at least 1 (2000 is a good number).")
    arrays: list[FloatArray] = [np.asarray(column, dtype=np.float64) for column in columns]
    value = float(statistic(*arrays, axis=-1))
    groups = [np.flatnonzero(np.asarray(sources) == name) for name in sorted(set(sources))]
    if len(sources) < MIN_DOCUMENTS or 1 < len(groups) < MIN_SOURCES:
        values = [float(statistic(*(array[group] for array in arrays), axis=-1)) for group in groups]
        return Estimate(value, None, (min(values), max(values)) if len(groups) > 1 else None)
    rng = np.random.default_rng(seed)
    found = np.concatenate(
        [
            statistic(*(array * times for array in arrays), axis=-1)
            for times in _draw(groups, len(sources), n_resamples, rng)
        ]
    )
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, (float(low), float(high)))


def _draw(
    groups: Sequence[NDArray[np.intp]], documents: int, n_resamples: int, rng: np.random.Generator
) -> Iterator[FloatArray]:
    """Yield how often each document is drawn, [resamples, documents], some resamples at a time."""
    for begin in range(0, n_resamples, _RESAMPLES_PER_BATCH):
        count = min(_RESAMPLES_PER_BATCH, n_resamples - begin)
        drawn = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=count)
        times = np.empty((count, documents))
        for group, often in zip(groups, drawn.T, strict=True):
            times[:, group] = rng.multinomial(often * len(group), np.full(len(group), 1 / len(group)))
        yield times
