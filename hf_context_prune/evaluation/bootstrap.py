"""A figure with its bootstrap interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hf_context_prune.errors import ConfigError

CONFIDENCE = 0.95
MIN_DOCUMENTS = 10
"""With fewer documents there is no interval: what so few show of their spread is chance."""

FloatArray = NDArray[np.float64]
Statistic = Callable[..., FloatArray]

# Resampled values held in memory at once, per column: bounds memory to tens of MB whatever the number of documents.
_VALUES_PER_BATCH = 2_000_000


@dataclass(frozen=True)
class Estimate:
    """A point estimate with its 95 % percentile bootstrap interval.

    Attributes:
        value: The point estimate over all documents.
        interval: (low, high), or None where there are fewer than [`MIN_DOCUMENTS`][] documents.
    """

    value: float
    interval: tuple[float, float] | None


def ratio_to_change(ratio: Estimate) -> Estimate:
    """Return a ratio as a relative change: less 1."""
    interval = None if ratio.interval is None else (ratio.interval[0] - 1, ratio.interval[1] - 1)
    return Estimate(ratio.value - 1, interval)


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
    *,
    seed: int,
    n_resamples: int,
) -> Estimate:
    """Estimate `statistic` with a percentile interval, resampling whole documents.

    The columns are resampled together (row i of every column is one document), so a statistic of several columns
    is a ratio or a paired difference as it should be, and calls with one seed see the same resamples.

    Args:
        statistic: Function of the columns ([..., documents], float64) and the keyword `axis`, reduced over `axis`.
        columns: Equally long sequences, one value per document.
        seed: Seed of the resampling.
        n_resamples: Number of resamples, at least 1.

    Raises:
        ConfigError: `n_resamples` is below 1.
    """
    if n_resamples < 1:
        raise ConfigError(f"n_resamples is {n_resamples}; it must be at least 1 (2000 is a good number).")
    arrays: list[FloatArray] = [np.asarray(column, dtype=np.float64) for column in columns]
    value = float(statistic(*arrays, axis=-1))
    documents = len(arrays[0])
    if documents < MIN_DOCUMENTS:
        return Estimate(value, None)
    result = stats.bootstrap(
        arrays,
        statistic,
        n_resamples=n_resamples,
        batch=min(n_resamples, max(1, _VALUES_PER_BATCH // documents)),
        vectorized=True,
        paired=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Estimate(value, (float(result.confidence_interval.low), float(result.confidence_interval.high)))
