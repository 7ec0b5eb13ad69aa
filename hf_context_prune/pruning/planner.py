"""Statistics -> plan: scores units, sets widths for the budget, selects, and pairs the plan with its repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import ConfigError, error_context
from hf_context_prune.modeling.architectures import check_supported, layers_of, output_projection, spec_of
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.modeling.specs import LayerWidths, read_geometry
from hf_context_prune.pruning.allocation.adaptive import most_removable, predicted_loss
from hf_context_prune.pruning.allocation.budget import Curve, removed_params
from hf_context_prune.pruning.allocation.loss_search import Loss, smallest_within
from hf_context_prune.pruning.allocation.probing import search_curves
from hf_context_prune.pruning.allocation.sensitivity import measure_sensitivity, withhold_probe
from hf_context_prune.pruning.allocation.widths import measured_widths, plan_widths, shape_of
from hf_context_prune.pruning.calibration.chunked import calibrate_in_turns
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.calibration.statistics import CalibrationStats, Key
from hf_context_prune.pruning.sequential.prune import check_sequential, prune_sequentially
from hf_context_prune.utils.distributed import on_main_process
from hf_context_prune.utils.version import versions

from .criteria import get_criterion
from .reconstruction import get_reconstruction
from .scoring import needed_statistics, needed_targets, score_units, score_with, select_units
from .surgery import ReconstructFn


def reconstruct_with(stats: CalibrationStats, config: PrunerConfig) -> ReconstructFn:
    """The reconstruction of a config, as `apply_plan` calls it.

    Raises:
        ConfigError: `reconstruction="sequential"`, which is no function of these statistics.
    """
    _refuse_walk(config)
    return _one_shot_reconstruction(stats, config)


def check_reconstruction(model: PreTrainedModel, config: PrunerConfig, *, will_save: bool) -> None:
    """Refuse, from shapes alone, a repair that the architecture can't have.

    Args:
        model: The dense model; its weights may be on the meta device.
        config: What is asked for.
        will_save: Refuse too what works in memory alone.

    Raises:
        ConfigError: It can't walk the blocks, or adds biases that the architecture has no field for.
    """
    if config.reconstruction == "sequential" and config.prunes_units:
        check_sequential(model, get_criterion(config.criterion))
    if config.reconstruction != "bias" or not will_save:
        return
    spec = spec_of(model.config)
    for target in needed_targets(config):
        if output_projection(layers_of(model, spec)[0], spec, target).bias is None:
            raise ConfigError(
                f"reconstruction='bias' adds biases that a {spec.model_type} model has no field for, so the result "
                f"can't be saved. Use reconstruction='least_squares' (better at the same size) or 'none'; 'bias' is "
                f"for measuring in memory, through Python's prune()."
            )


def _refuse_walk(config: PrunerConfig) -> None:
    if config.reconstruction == "sequential":
        raise ConfigError(
            "reconstruction='sequential' chooses and refits on its own walk over the blocks, not from these "
            "statistics: use plan_and_reconstruct(model, samples, config), or reconstruction='least_squares'."
        )


def _one_shot_reconstruction(stats: CalibrationStats, config: PrunerConfig) -> ReconstructFn:
    # Where a walk is to come, its one-shot kin stands in.
    function = get_reconstruction("least_squares" if config.reconstruction == "sequential" else config.reconstruction)

    def reconstruct(
        layer: int, target: str, weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with error_context(f"layer {layer} ({target})"):
            new_weight, new_bias = function(
                weight.cpu(), None if bias is None else bias.cpu(), kept, stats.targets[layer, target], config.ridge
            )
        return new_weight.to(weight.device), None if new_bias is None else new_bias.to(weight.device)

    return reconstruct


@dataclass
class LayerMeasurements:
    """What was measured of a model, enough for a plan of any size.

    Attributes:
        importance: One value a unit, by (layer, target); empty where a walk chooses the units.
        curves: What each layer pays for each width; None for uniform widths.
        num_samples: Blocks of text behind it.
        num_tokens: Unpadded tokens behind it.
    """

    importance: Mapping[Key, torch.Tensor]
    curves: Mapping[Key, Curve] | None
    num_samples: int
    num_tokens: int

    @classmethod
    def of(
        cls, model: PreTrainedModel, stats: CalibrationStats, config: PrunerConfig, probe: torch.Tensor | None
    ) -> LayerMeasurements:
        """Score every unit, and for adaptive allocation measure every layer on `probe`."""
        importance = score_units(model, stats, config.criterion, seed=config.pruning_seed)
        curves = None
        if config.allocation == "adaptive":
            if probe is None:
                raise ConfigError(
                    "allocation='adaptive' measures layers on text that the statistics lack; calibrate on the first "
                    "part of withhold_probe(tokenize_samples(...)), and pass the second as samples."
                )
            reconstruct, targets = _one_shot_reconstruction(stats, config), needed_targets(config)
            curves = on_main_process(
                lambda: measure_sensitivity(model, importance, reconstruct, probe, targets=targets)
            )
        return cls(importance, curves, stats.num_samples, stats.num_tokens)

    def widths(self, model: PreTrainedModel, config: PrunerConfig) -> tuple[LayerWidths, ...]:
        """Widths of a size."""
        return plan_widths(model, config) if self.curves is None else measured_widths(model, config, self.curves)

    def plan(self, model: PreTrainedModel, config: PrunerConfig, provenance: Mapping[str, Any] | None) -> PruningPlan:
        """The plan of a size: the most important units."""
        widths = self.widths(model, config)
        layers = select_units(self.importance, read_geometry(model.config, spec_of(model.config)), widths)
        facts = {**(provenance or {}), **self.prediction(widths)}
        return _plan_of(model, layers, config, self.num_samples, self.num_tokens, facts)

    def prediction(self, widths: Sequence[LayerWidths]) -> dict[str, Any]:
        """For the provenance: the curves as {"layer.target": [[kept units, nats a token], ...]}, and their sum."""
        if self.curves is None:
            return {}
        curves = {
            f"{layer}.{target}": [[kept, float(f"{loss:.6g}")] for kept, loss in curve]
            for (layer, target), curve in self.curves.items()
        }
        return {"predicted_loss_increase": predicted_loss(self.curves, widths), "sensitivity": curves}


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
        samples: Token blocks for adaptive allocation to measure on, [blocks, length], int64: the second part of
            [`withhold_probe`][], with the statistics from the first.
        provenance: Goes into the plan, beside the config and versions.

    Raises:
        BudgetError: The budget can't be reached.
        ConfigError: Adaptive allocation without samples, `max_loss_increase`, or what is not planned here: a walk
            (`reconstruction="sequential"`), tokens, and the refit of their rows.
    """
    if config.prunes_vocabulary or config.refit_lm_head:
        raise ConfigError(
            "make_plan plans neurons and KV groups alone. For tokens, use prune(), or prune_vocabulary() before, "
            "without the vocab_* options here; for refit_lm_head=True, use prune()."
        )
    _refuse_walk(config)
    geometry = read_geometry(model.config, check_supported(model))
    wanted = {(layer, target) for layer in range(len(geometry.layers)) for target in needed_targets(config)}
    if not wanted <= set(stats.targets):
        layer, target = min(wanted - set(stats.targets))
        raise ConfigError(
            f"The statistics lack layer {layer} ({target}), which this config may prune. Calibrate with "
            f"targets=needed_targets(config)."
        )
    if config.allocation == "uniform" or config.max_loss_increase is not None:
        plan_widths(model, config)  # before scoring: it may refuse
    return LayerMeasurements.of(model, stats, config, samples).plan(model, config, provenance)


class Planner:
    """A model with its text, measured once where that is needed, to be planned at any size.

    Args:
        model: The dense model.
        samples: [blocks, length], int64.
        config: All choices but the size, which every call names anew.
        provenance: Goes into the plans, beside the config and versions.
        resume_dir: Where walks keep their finished blocks, to go on from; None keeps nothing.
        measured: Of the same units by another planner (of the model before its tokens went).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        samples: torch.Tensor,
        config: PrunerConfig,
        provenance: Mapping[str, Any] | None = None,
        resume_dir: Path | None = None,
        *,
        measured: LayerMeasurements | None = None,
    ) -> None:
        self.model, self.samples, self.provenance, self.resume_dir = model, samples, provenance, resume_dir
        self.measured = measured
        self.stats: CalibrationStats | None = None
        if measured is not None and config.reconstruction == "sequential":
            return
        if config.reconstruction == "sequential" and config.allocation == "uniform" and not config.max_loss_increase:
            return  # the walk sees all it needs
        if config.reconstruction == "sequential" and not config.max_loss_increase:  # no model is built of statistics
            self.measured = LayerMeasurements({}, self._search(config), 0, 0)
            return
        fit, probe = withhold_probe(samples) if config.allocation == "adaptive" else (samples, None)
        self.stats = calibrate_in_turns(
            model, batches_of(fit), targets=needed_targets(config), statistics=needed_statistics(config)
        )
        self.measured = measured or LayerMeasurements.of(model, self.stats, config, probe)

    def _search(self, config: PrunerConfig) -> dict[Key, Curve]:
        generator = torch.Generator().manual_seed(config.pruning_seed)  # one for all layers, whatever the turns
        return search_curves(
            self.model,
            self.samples,
            targets=needed_targets(config),
            statistics=needed_statistics(config),
            prepare=lambda stats: (
                score_with(self.model, stats, config.criterion, generator),
                _one_shot_reconstruction(stats, config),
            ),
            identity=f"{config.criterion} {config.ridge!r} {config.pruning_seed}",
            state_dir=self.resume_dir,
        )

    def most_removable(self, config: PrunerConfig) -> int:
        """Parameters that can go at most, where no ratio fixes a width."""
        _, geometry, costs = shape_of(self.model)
        if self.measured is not None and self.measured.curves is not None:
            return most_removable(self.measured.curves, costs, round_to=config.round_to)
        narrowest = [LayerWidths(min(config.round_to, w.neurons), w.kv_groups) for w in geometry.layers]
        return removed_params(geometry.layers, narrowest, costs)

    def widths(self, config: PrunerConfig) -> tuple[LayerWidths, ...]:
        """Widths of a size."""
        return self.measured.widths(self.model, config) if self.measured else plan_widths(self.model, config)

    def one_shot(self, config: PrunerConfig) -> tuple[PruningPlan, ReconstructFn]:
        """Plan and repair from the statistics; for the sequential repair, those of its one-shot kin."""
        assert self.measured is not None
        assert self.stats is not None
        return self.measured.plan(self.model, config, self.provenance), _one_shot_reconstruction(self.stats, config)

    def walk(self, config: PrunerConfig) -> tuple[PruningPlan, ReconstructFn]:
        """Plan and repair from a sequential walk, which chooses the units anew, on all of the text."""
        self.stats = None  # a walk has statistics of its own
        widths = self.widths(config)
        walk = prune_sequentially(
            self.model,
            batches_of(self.samples),
            widths,
            get_criterion(config.criterion),
            ridge=config.ridge,
            seed=config.pruning_seed,
            state_dir=self.resume_dir,
        )
        facts = {**(self.provenance or {}), **(self.measured.prediction(widths) if self.measured else {})}
        return _plan_of(self.model, walk.layers, config, walk.num_samples, walk.num_tokens, facts), walk.reconstruct


def plan_and_reconstruct(
    model: PreTrainedModel,
    samples: torch.Tensor,
    config: PrunerConfig,
    *,
    loss: Loss | None = None,
    base_loss: float | None = None,
    provenance: Mapping[str, Any] | None = None,
    resume_dir: Path | None = None,
    measured: LayerMeasurements | None = None,
) -> tuple[PruningPlan, ReconstructFn]:
    """Token blocks -> the plan, and the repair that goes with it: what [`apply_plan`][] takes.

    Args:
        model: The dense model.
        samples: [blocks, length], int64.
        config: All choices.
        loss: For `max_loss_increase`: the loss of a model, above 0, on text that is neither in `samples` nor reported.
        base_loss: What it is an increase over; None: the loss of `model`.
        provenance: Goes into the plan, beside the config and versions.
        resume_dir: As for [`Planner`][].
        measured: As for [`Planner`][].

    Raises:
        ContextPruneError: See `hf_context_prune.errors`.
    """
    if config.max_loss_increase is not None and loss is None:
        raise ConfigError("max_loss_increase is found by measuring; pass loss=, a function of a model.")
    planner = Planner(model, samples, config, provenance, resume_dir, measured=measured)
    if loss is None or config.max_loss_increase is None:
        return planner.walk(config) if config.reconstruction == "sequential" else planner.one_shot(config)
    return smallest_within(planner, config, loss, base_loss=base_loss)


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
            "versions": versions(),
        },
    )
