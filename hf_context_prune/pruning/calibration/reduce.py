"""Sum statistics over the processes of accelerate, each of which has its own pivots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_context_prune.utils.distributed import all_gather, all_reduce_, gather_tensors, num_processes, sum_counts

if TYPE_CHECKING:
    import torch

    from .statistics import RegressionMoments, TargetStatistics


def _first_pivot(pivot: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Return the pivot of the lowest-ranked process that has one (a process that saw no token has none), or None."""
    holders = all_gather(pivot is not None)
    if not any(holders):
        return None
    given = like.new_zeros(like.shape) if pivot is None else pivot.to(like)
    return gather_tensors(given)[holders.index(True)].to(like.device)


def _move_pivots(
    product: torch.Tensor,
    count: int,
    x: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    t: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Turn a sum of (x - p)(t - q)^T over tokens into one about other pivots p' and q', in place.

    (x - p')(t - q')^T = ((x - p) + d)((t - q) + e)^T with d = p - p' and e = q - q', so it lacks
    sum(x - p) e^T + d sum(t - q)^T + count d e^T. All pivots are near the mean, so the terms are no larger than the
    sum that they are added to, and float32 is enough.

    Args:
        product: [features, outputs], float32.
        count: Tokens summed over.
        x: (sum of x, p, p'), each [features], float64.
        t: (sum of t, q, q'), each [outputs], float64.
    """
    (rest_x, d), (rest_t, e) = (
        ((total - count * old).to(product), (old - new).to(product)) for total, old, new in (x, t)
    )
    product.addr_(rest_x, e).addr_(d, rest_t).addr_(d, e, alpha=count)


def reduce_statistics(statistics: TargetStatistics) -> None:
    """Sum one target's moments over all processes, in place; each may have its own pivot, or have seen no token.

    `taylor` is not summed: it holds absolute values, and gradients have to be summed before those are taken.

    Raises:
        ContextPruneError: Another process failed.
    """
    if num_processes() < 2:
        return
    pivot = _first_pivot(statistics.pivot, statistics.sum)
    if pivot is not None and statistics.pivot is not None and statistics.gram is not None:
        about = (statistics.sum, statistics.pivot, pivot)
        _move_pivots(statistics.gram, statistics.num_tokens, about, about)
    statistics.pivot = pivot
    (statistics.num_tokens,) = sum_counts(statistics.num_tokens)
    sums = [statistics.sum, statistics.sum_abs, statistics.sum_squares]
    all_reduce_(sums if statistics.gram is None else [*sums, statistics.gram])


def reduce_moments(moments: RegressionMoments) -> None:
    """Sum regression moments over all processes, in place; each may have its own pivots, or have seen no token.

    Raises:
        ContextPruneError: Another process failed.
    """
    if num_processes() < 2:
        return
    statistics, own = moments.statistics, moments.pivot_target
    pivot = _first_pivot(statistics.pivot, statistics.sum)
    target = _first_pivot(own, moments.sum_target)
    if pivot is not None and target is not None and statistics.pivot is not None and own is not None:
        x = (statistics.sum, statistics.pivot, pivot)
        t = (moments.sum_target, own.double(), target)
        _move_pivots(moments.cross, statistics.num_tokens, x, t)
    # float32, as `RegressionMoments.add` makes it: one process made these numbers, so nothing is lost.
    moments.pivot_target = None if target is None else target.float()
    all_reduce_([moments.cross, moments.sum_target])
    reduce_statistics(statistics)
