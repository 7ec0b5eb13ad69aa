"""Statistics -> plan: scores units, sets widths for the budget, selects, and pairs the plan with its repair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .allocation import Budget, adaptive_widths, removed_params, select_units, uniform_widths
from .architectures import (
    TARGETS,
    ArchSpec,
    Geometry,
    LayerWidths,
    Target,
    blocks,
    check_supported,
    read_geometry,
    spec_of,
    unit_costs,
)
from .calibration import batches_of, calibrate, weights_of_block
from .config import PrunerConfig
from .criteria import get_criterion
from .errors import BudgetError, ConfigError, naming
from .evaluation import count_parameters
from .loading import load_outline
from .plan import LayerPlan, PruningPlan, fingerprint
from .reconstruction import NEEDS_GRAM, get_reconstruction
from .sensitivity import measure_sensitivity
from .sequential import prune_sequentially
from .stats import CalibrationStats, Key, Repair
from .surgery import StockFit, stock_fit

SENSITIVITY_BLOCKS = 4
"""Blocks of calibration text on which adaptive allocation measures the loss."""


def needed_statistics(config: PrunerConfig) -> frozenset[str]:
    """Which optional statistics a config's criterion and reconstruction read."""
    needs = set(get_criterion(config.criterion).needs)
    if config.reconstruction in NEEDS_GRAM or config.reconstruction == "sequential":
        needs.add("gram")
    return frozenset(needs)


def needed_targets(config: PrunerConfig) -> tuple[Target, ...]:
    """Which units a config may remove."""
    total = config.pruning_ratio is not None or config.target_params is not None
    if config.allocation == "adaptive" and total and config.mlp_ratio is None and config.attention_ratio is None:
        return TARGETS
    wanted: dict[Target, bool] = {
        "mlp": bool(config.mlp_ratio) or (total and config.mlp_ratio is None),
        "attention": bool(config.attention_ratio) or (total and config.mlp_ratio is not None),
    }
    return tuple(target for target in TARGETS if wanted[target])


def score_units(
    model: PreTrainedModel, stats: CalibrationStats, criterion: str, *, seed: int = 0
) -> dict[Key, torch.Tensor]:
    """Importance of every unit that the statistics cover.

    Args:
        model: The dense model.
        stats: From [`calibrate`][], with what the criterion needs.
        criterion: A name of `CRITERIA`.
        seed: For the `random` criterion.

    Returns:
        [units] float64 on the CPU, by (layer, target); higher is kept.
    """
    spec = check_supported(model)
    geometry, layers = read_geometry(model.config, spec), blocks(model, spec)
    generator = torch.Generator().manual_seed(seed)
    function = get_criterion(criterion).function
    importance = {}
    for (layer, target), statistics in stats.targets.items():
        groups = geometry.layers[layer].kv_groups
        weights = weights_of_block(layers[layer], spec, geometry, target, groups)  # type: ignore[arg-type]
        with naming(f"layer {layer} ({target})"):
            importance[layer, target] = function(weights.cpu(), statistics, generator)
    return importance


def repair_with(stats: CalibrationStats, config: PrunerConfig) -> Repair:
    """The reconstruction of a config, as `apply_plan` calls it."""
    # Where widths are measured for a walk to come, its one-shot kin stands in.
    function = get_reconstruction("least_squares" if config.reconstruction == "sequential" else config.reconstruction)

    def repair(
        layer: int, target: str, weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with naming(f"layer {layer} ({target})"):
            new_weight, new_bias = function(
                weight.cpu(), None if bias is None else bias.cpu(), kept, stats.targets[layer, target], config.ridge
            )
        return new_weight.to(weight.device), None if new_bias is None else new_bias.to(weight.device)

    return repair


def plan_widths(model: PreTrainedModel, config: PrunerConfig) -> tuple[LayerWidths, ...]:
    """Uniform widths for a budget, from shapes alone (the weights may be on the meta device).

    Raises:
        BudgetError: It can't be reached, or `stock` rules every choice out.
    """
    spec = spec_of(model.config)
    geometry = read_geometry(model.config, spec)
    budget = Budget.of(config, count_parameters(model))
    costs = unit_costs(model, spec, geometry)
    stock_groups: list[int] = []
    if config.stock:
        stock_groups = _stock_groups(model, spec, geometry)
    widths = uniform_widths(geometry, costs, budget, config, stock_groups=stock_groups)
    if config.stock and not (fit := stock_fit(model.config, spec, widths)).fits:
        raise BudgetError(f"No such widths stay stock: {fit.reason}. Leave out --stock, or ask for another ratio.")
    return widths


def _stock_groups(model: PreTrainedModel, spec: ArchSpec, geometry: Geometry) -> list[int]:
    """KV groups a layer that the stock architecture accepts, all layers alike."""
    first = geometry.layers[0]
    return [
        groups
        for groups in range(1, first.kv_groups + 1)
        if stock_fit(model.config, spec, [LayerWidths(first.neurons, groups)] * len(geometry.layers)).fits
    ]


def _adaptive(
    model: PreTrainedModel,
    importance: Mapping[Key, torch.Tensor],
    stats: CalibrationStats,
    config: PrunerConfig,
    samples: torch.Tensor,
) -> tuple[LayerWidths, ...]:
    spec = spec_of(model.config)
    geometry, targets = read_geometry(model.config, spec), needed_targets(config)
    costs = unit_costs(model, spec, geometry)
    budget = Budget.of(config, count_parameters(model))
    curves = measure_sensitivity(
        model, importance, repair_with(stats, config), samples[:SENSITIVITY_BLOCKS], targets=targets
    )
    if budget.remove_params is not None and config.mlp_ratio is None and config.attention_ratio is None:
        return adaptive_widths(curves, geometry, costs, budget.remove_params, round_to=config.round_to)
    # Each unit has a budget of its own: what the same options would remove with uniform widths.
    uniform = uniform_widths(geometry, costs, budget, config)
    widths = geometry.layers
    for target in targets:
        own = {key: curve for key, curve in curves.items() if key[1] == target}
        remove = removed_params(geometry.layers, _only(target, uniform, geometry.layers), costs)
        part = adaptive_widths(own, geometry, costs, remove, round_to=config.round_to)
        widths = _only(target, part, widths)
    return widths


def _only(target: Target, widths: tuple[LayerWidths, ...], others: tuple[LayerWidths, ...]) -> tuple[LayerWidths, ...]:
    """One target's sizes of `widths`, all else of `others`."""
    size = "neurons" if target == "mlp" else "kv_groups"
    return tuple(replace(other, **{size: getattr(width, size)}) for width, other in zip(widths, others, strict=True))


def make_plan(
    model: PreTrainedModel,
    stats: CalibrationStats,
    config: PrunerConfig,
    *,
    samples: torch.Tensor | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Score, allocate and select: statistics -> plan.

    Args:
        model: The dense model.
        stats: With what [`needed_statistics`][] names, for [`needed_targets`][].
        config: Budget, criterion, allocation.
        samples: Token blocks for adaptive allocation, [blocks, length], int64.
        provenance: Goes into the plan, beside the config and versions.

    Raises:
        BudgetError: The budget can't be reached.
        ConfigError: Adaptive allocation without samples.
    """
    spec = check_supported(model)
    geometry = read_geometry(model.config, spec)
    wanted = {(layer, target) for layer in range(len(geometry.layers)) for target in needed_targets(config)}
    if not wanted <= set(stats.targets):
        layer, target = min(wanted - set(stats.targets))
        raise ConfigError(
            f"The statistics lack layer {layer} ({target}), which this config may prune. Calibrate with "
            f"targets=needed_targets(config)."
        )
    if config.allocation == "adaptive":
        if samples is None:
            raise ConfigError("allocation='adaptive' measures losses; pass samples=token_blocks(...).")
    else:
        widths = plan_widths(model, config)  # before scoring: it may refuse
    importance = score_units(model, stats, config.criterion, seed=config.pruning_seed)
    if samples is not None and config.allocation == "adaptive":
        widths = _adaptive(model, importance, stats, config, samples)
    layers = select_units(importance, geometry, widths)
    return _plan_of(model, layers, config, stats.num_samples, stats.num_tokens, provenance)


def plan_and_repair(
    model: PreTrainedModel,
    samples: torch.Tensor,
    config: PrunerConfig,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> tuple[PruningPlan, Repair]:
    """Token blocks -> the plan, and the repair that goes with it: what [`apply_plan`][] takes.

    Args:
        model: The dense model.
        samples: [blocks, length], int64.
        config: All choices.
        provenance: Goes into the plan, beside the config and versions.

    Raises:
        ContextPruneError: See `hf_context_prune.errors`.
    """
    batches, targets = batches_of(samples), needed_targets(config)
    if config.reconstruction != "sequential" or config.allocation == "adaptive":
        stats = calibrate(model, batches, targets=targets, statistics=needed_statistics(config))
        plan = make_plan(model, stats, config, samples=samples, provenance=provenance)
        if config.reconstruction != "sequential":
            return plan, repair_with(stats, config)
        widths = plan.widths  # measured with one-shot repairs; the walk chooses the units anew
        del stats
    else:
        widths = plan_widths(model, config)
    walk = prune_sequentially(
        model, batches, widths, get_criterion(config.criterion), ridge=config.ridge, seed=config.pruning_seed
    )
    return _plan_of(model, walk.layers, config, walk.num_samples, walk.num_tokens, provenance), walk.repair


def _plan_of(
    model: PreTrainedModel,
    layers: tuple[LayerPlan, ...],
    config: PrunerConfig,
    num_samples: int,
    num_tokens: int,
    provenance: Mapping[str, Any] | None,
) -> PruningPlan:
    spec = spec_of(model.config)
    return PruningPlan(
        model_type=spec.model_type,
        dense=read_geometry(model.config, spec).layers,
        layers=layers,
        model_fingerprint=fingerprint(model),
        provenance={
            **(provenance or {}),
            "config": config.to_dict(),
            "num_calibration_samples": num_samples,
            "num_calibration_tokens": num_tokens,
            "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        },
    )


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
