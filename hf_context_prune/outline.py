"""What a budget comes to, from shapes alone: no weight is read and nothing is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .allocation import Budget, removed_params
from .architectures import LayerWidths, read_geometry, spec_of, unit_costs
from .config import PrunerConfig
from .evaluation import count_parameters
from .loading import load_outline
from .planning import plan_widths
from .surgery import StockFit, stock_fit


@dataclass(frozen=True)
class Outline:
    """What a budget comes to, from shapes alone.

    Attributes:
        base_parameters: Parameters of the model as it is, tied ones once.
        pruned_parameters: Parameters after pruning.
        asked_ratio: Share of all parameters that was asked for, if one was.
        dense: Widths as they are, one a layer.
        widths: Widths after pruning, one a layer.
        stock: Whether the stock architecture holds them, and why or why not.
    """

    base_parameters: int
    pruned_parameters: int
    asked_ratio: float | None
    dense: tuple[LayerWidths, ...]
    widths: tuple[LayerWidths, ...]
    stock: StockFit

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def dry_run(model: str | Path, config: PrunerConfig, *, revision: str | None = None) -> Outline:
    """Work out the sizes of uniform widths without reading a weight.

    Args:
        model: A model folder, .gguf file or Hub id.
        config: The budget.
        revision: Branch, tag or commit of the Hub model.

    Raises:
        ContextPruneError: The model is unknown or the budget can't be reached.
    """
    empty = load_outline(model, revision=revision)
    spec = spec_of(empty.config)
    geometry = read_geometry(empty.config, spec)
    widths = plan_widths(empty, config)
    total = count_parameters(empty)
    removed = removed_params(geometry.layers, widths, unit_costs(empty, spec, geometry))
    return Outline(
        base_parameters=total,
        pruned_parameters=total - removed,
        asked_ratio=Budget.of(config, total).asked_ratio,
        dense=geometry.layers,
        widths=widths,
        stock=stock_fit(empty.config, spec, widths),
    )
