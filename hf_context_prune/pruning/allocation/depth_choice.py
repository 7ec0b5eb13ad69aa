"""How many whole layers a budget removes: what they cost against what they leave the other units to do. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

PATIENCE = 2
"""Numbers of layers in a row that may be worse than the best one before no more are looked at."""


def choose_depth(price: Callable[[int], float], rest: Callable[[int], float], most: int) -> tuple[int, list[float]]:
    """Choose how many layers go, in an order that is given.

    Layers cost ever more, and what they leave to other units ever less. So the search ends where the price alone is as
    much as the best sum, where the other units have nothing left to do, or after `PATIENCE` sums in a row that are
    worse than the best: prices, which are measured, are asked for no longer than layers may win.

    Args:
        price: Loss without the first n layers, for n from 1 on, asked for in order.
        rest: Predicted loss of what the other units then have to give; inf where they can't, 0 where nothing is left.
        most: Most layers that may go.

    Returns:
        (the number of layers with the least sum, the sums from no layer on: inf where the budget is not met).
    """
    left = rest(0)
    sums, best, worse = [left], 0, 0
    for count in range(1, most + 1):
        if worse == PATIENCE or left == 0:
            break
        left = rest(count)
        paid = 0.0 if math.isinf(left) else price(count)  # no price matters where the budget is not met
        sums.append(paid + left)
        worse = 0 if sums[count] < sums[best] or math.isinf(sums[best]) else worse + 1
        best = count if sums[count] < sums[best] else best
        if paid >= sums[best] and best != count:
            break
    return best, sums
