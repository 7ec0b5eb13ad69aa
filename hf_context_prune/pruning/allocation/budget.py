"""Budgets: how many parameters to remove, and how many go with a unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import BudgetError
from hf_context_prune.modeling.geometry import LayerWidths

Curve = tuple[tuple[int, float], ...]
"""((kept units, loss increase in nats per token), ...), widest first; the first is (all units, 0.0)."""


Costs = Mapping[str, int]
"""Parameters per unit, by target."""


@dataclass(frozen=True)
class ParameterBudget:
    """The budget of a config, in parameters.

    Attributes:
        total_params: Parameters of the model before pruning, tied ones counted once.
        remove_params: Parameters to remove at least; None where the unit ratios alone decide.
        asked_ratio: The requested share; None where none was requested.
    """

    total_params: int
    remove_params: int | None
    asked_ratio: float | None

    @classmethod
    def of(cls, config: PrunerConfig, total_params: int) -> ParameterBudget:
        """Read the budget of a config for a model of this size.

        Raises:
            BudgetError: `target_params` is above the model's size.
        """
        if config.target_params is not None:
            if config.target_params > total_params:
                raise BudgetError(
                    f"target_params is {config.target_params:,}, but the model has only {total_params:,} parameters; "
                    f"ask for fewer."
                )
            remove = total_params - config.target_params
            return cls(total_params, remove, remove / total_params)
        if config.pruning_ratio is not None:
            # Rounded up, so that at least the asked share goes; the slack allows for 0.2 * 5 = 1.0000000000000002.
            remove = -int(-(config.pruning_ratio * total_params - max(1e-6, 4e-16 * total_params)) // 1)
            return cls(total_params, remove, config.pruning_ratio)
        return cls(total_params, None, None)


def removed_params(base: Sequence[LayerWidths], widths: Sequence[LayerWidths], costs: Costs) -> int:
    """Return how many parameters go when the layers shrink from `base` to `widths`."""
    return sum(
        cost * (a.of(target) - b.of(target))
        for a, b in zip(base, widths, strict=True)
        for target, cost in costs.items()
    )


def share_below(part: int, total: int) -> str:
    """Format a share with four digits, rounded down, so that asking for it works."""
    return f"{part * 10_000 // total / 10_000:.4f}"


def beyond_probes(remove_params: int, most: int, total: int | None = None) -> BudgetError:
    """Return the error for a budget that adaptive widths can't reach; with `total`, it names the share in reach."""
    share = "" if total is None else f" ({share_below(most, total)} of all)"
    return BudgetError(
        f"Asked to remove {remove_params:,} parameters; adaptive widths can remove at most {most:,}{share}, since no "
        f"layer is narrowed below its smallest probed width. Ask for less, let tokens go as well (--units), or set "
        f"both ratios (--mlp-ratio, --attention-ratio, --allocation uniform), which reach further."
    )


@contextmanager
def for_the_rest(given: str) -> Iterator[None]:
    """Re-raise a `BudgetError` on the rest of a budget with what goes in any case; with "", as it is.

    Args:
        given: What goes in any case, as a sentence without its full stop.
    """
    try:
        yield
    except BudgetError as error:
        if not given:
            raise
        raise BudgetError(f"{given}. For the rest: {error}") from error
