"""Statistics -> plan: score the units, set the widths for the budget, select, and reconstruct what is left.

Two ways lead to a plan. From statistics of one pass ([`make_plan`][], with [`reconstruct_with`][]), or from samples
([`plan_and_reconstruct`][]), which every config allows: sequential reconstruction chooses and refits in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.geometry import GONE, LayerWidths
from hf_context_prune.modeling.plan import GONE_LAYER, PruningPlan, fingerprint
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.budget import Curve
from hf_context_prune.pruning.allocation.probing import search_curves
from hf_context_prune.pruning.allocation.sensitivity import withhold_probe
from hf_context_prune.pruning.allocation.widths import plan_widths
from hf_context_prune.pruning.calibration.chunked import calibrate_in_turns
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.calibration.statistics import CalibrationStats, Key
from hf_context_prune.pruning.sequential.prune import SequentialResult, check_sequential, prune_sequentially
from hf_context_prune.pruning.surgery import ReconstructFn

from .depth import Depth
from .measurements import LayerMeasurements, build_plan, reconstruct_one_shot
from .scoring import Requirements, score_with


def check_reconstruction(model: PreTrainedModel, config: PrunerConfig) -> None:
    """Refuse, from shapes alone, a reconstruction that the architecture can't have or save.

    Args:
        model: The base model; its weights may be on the meta device.
        config: What is asked for.

    Raises:
        ConfigError: The layers can't be pruned sequentially, or `bias` adds biases that the architecture has no field
            for.
    """
    needs = Requirements.of(config)
    if config.reconstruction == "sequential" and (config.prunes_layers or config.removes_layers):
        check_sequential(model, needs.criterion)
    if config.reconstruction != "bias":
        return
    view = ModelView.of_shapes(model)
    for place in view.places(needs.targets):
        if view.output_projection(*place).bias is None:
            raise ConfigError(
                f"reconstruction='bias' adds biases that a {view.spec.model_type} model has no field for, so the "
                f"result can't be saved. Use reconstruction='least_squares' (better at the same size) or 'none'; to "
                f"measure 'bias' in memory, call make_plan() and apply_plan()."
            )


def reconstruct_with(stats: CalibrationStats, config: PrunerConfig) -> ReconstructFn:
    """Return the reconstruction of a config from statistics of one pass, as [`apply_plan`][] calls it.

    Args:
        stats: Statistics of the targets that [`Requirements`][] names for the config.
        config: Its `reconstruction` is used.

    Returns:
        The function that refits the output projections, as `reconstruct` of [`apply_plan`][].

    Raises:
        ConfigError: `reconstruction="sequential"`, which is no function of these statistics.
    """
    _refuse_sequential(config)
    return reconstruct_one_shot(stats, config)


def _refuse_sequential(config: PrunerConfig) -> None:
    if config.reconstruction == "sequential":
        raise ConfigError(
            "reconstruction='sequential' chooses and refits layer by layer, not from the statistics of one pass: use "
            "plan_and_reconstruct(model, samples, config), or reconstruction='least_squares'."
        )


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
        model: The base model.
        stats: Statistics of the targets that [`Requirements`][] names for the config.
        config: Budget, criterion, allocation.
        samples: Samples for adaptive allocation to measure on, [samples, length], int64: the second part of
            [`withhold_probe`][], with the statistics from the first.
        provenance: Goes into the plan, beside the config and versions.

    Returns:
        The units that every layer keeps, for [`apply_plan`][].

    Raises:
        BudgetError: The budget can't be reached.
        ConfigError: Adaptive allocation without samples, `max_loss_increase`, or what statistics alone can't give:
            sequential reconstruction, pruning of the vocabulary, and the refit of the LM head.
    """
    if (
        config.fixes_tokens
        or config.units == "tokens"
        or config.refit_lm_head
        or config.removes_layers
        or config.prunes_experts
    ):
        raise ConfigError(
            "make_plan plans neurons and KV groups alone. To prune the vocabulary, use prune(), or call "
            "prune_vocabulary() first and leave the vocab_* options out here; for refit_lm_head=True, num_layers, "
            "layer_ratio, layers in units, and what removes experts or their neurons, use prune()."
        )
    _refuse_sequential(config)
    view, targets = ModelView.of(model), Requirements.of(config).targets
    wanted = set(view.places(targets))
    if not wanted <= set(stats.targets):
        layer, target = min(wanted - set(stats.targets))
        raise ConfigError(
            f"The statistics lack layer {layer} ({target}), which this config may prune. Calibrate with "
            f"targets=Requirements.of(config).targets."
        )
    if config.allocation == "uniform" or config.max_loss_increase is not None:
        plan_widths(model, config)  # before scoring: it may refuse
    measured = LayerMeasurements.of(model, stats, config, samples)
    return measured.plan(model, config, measured.widths(model, config), provenance)


class Planner:
    """A model with its samples, measured once where that is needed, to be planned at any size.

    Where layers are removed as a whole, widths are those of the model without them, and plans are for the whole model.

    Args:
        model: The base model.
        samples: [samples, length], int64.
        config: All choices but the size, which every call names again.
        provenance: Goes into the plans, beside the config and versions.
        resume_dir: Folder where finished layers and measured widths are kept, to resume from; None keeps nothing.
        measured: Measurements of the same units by another planner (before the vocabulary was pruned).
        depth: The layers that are removed as a whole; None: none are.
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
        depth: Depth | None = None,
    ) -> None:
        self.depth, self.shorter = depth, model if depth is None else depth.shorten(model)
        self.model, self.samples, self.provenance, self.resume_dir = model, samples, provenance, resume_dir
        self.needs, self.measured = Requirements.of(config), measured
        self.stats: CalibrationStats | None = None
        sequential = config.reconstruction == "sequential"
        if sequential and (measured is not None or config.allocation == "uniform" or not self.needs.targets):
            return  # sequential reconstruction measures all that it needs
        if sequential:  # only widths are searched
            self.measured = LayerMeasurements({}, self._search(config), 0, 0)
            return
        if not self.needs.targets:  # whole layers alone, which nothing reconstructs
            self.stats, self.measured = CalibrationStats({}), LayerMeasurements({}, None, len(samples), samples.numel())
            return
        fit, probe = withhold_probe(samples) if config.allocation == "adaptive" else (samples, None)
        self.stats = calibrate_in_turns(
            self.shorter, batches_of(fit), targets=self.needs.targets, statistics=self.needs.statistics
        )
        self.measured = measured or LayerMeasurements.of(self.shorter, self.stats, config, probe)

    def _search(self, config: PrunerConfig) -> dict[Key, Curve]:
        generator = torch.Generator().manual_seed(config.pruning_seed)  # one for all layers, however they are grouped
        return search_curves(
            self.shorter,
            self.samples,
            targets=self.needs.targets,
            statistics=self.needs.statistics,
            prepare=lambda stats: (
                score_with(self.shorter, stats, config.criterion, generator),
                reconstruct_one_shot(stats, config),
            ),
            identity=f"{config.criterion} {config.ridge!r} {config.pruning_seed}",
            state_dir=self.resume_dir,
        )

    def widths(self, config: PrunerConfig) -> tuple[LayerWidths, ...]:
        """Return the widths of the size that a config names."""
        return self.measured.widths(self.shorter, config) if self.measured else plan_widths(self.shorter, config)

    def one_shot(self, config: PrunerConfig, widths: tuple[LayerWidths, ...]) -> tuple[PruningPlan, ReconstructFn]:
        """Plan and reconstruct from the statistics of one pass; for `sequential`, by its `least_squares` fallback."""
        assert self.measured is not None
        assert self.stats is not None
        plan = self.measured.plan(self.shorter, config, widths, self.provenance)
        reconstruct = reconstruct_one_shot(self.stats, config)
        if self.depth is None:
            return plan, reconstruct
        layers = self.depth.expand(plan.layers, GONE_LAYER)
        base = replace(self.depth.plan(self.model), layers=layers, provenance=plan.provenance)
        return replace(base, model_fingerprint=fingerprint(self.model)), self.depth.reconstruct_in_base(reconstruct)

    def sequential(self, config: PrunerConfig, widths: tuple[LayerWidths, ...]) -> tuple[PruningPlan, SequentialResult]:
        """Plan and reconstruct sequentially on all samples; this chooses the units again, layer by layer."""
        self.stats = None  # no longer needed: sequential reconstruction has statistics of its own
        found = prune_sequentially(
            self.model,
            batches_of(self.samples),
            widths if self.depth is None else self.depth.expand(widths, GONE),
            self.needs.criterion,
            ridge=config.ridge,
            seed=config.pruning_seed,
            state_dir=self.resume_dir,
        )
        facts = {**(self.provenance or {}), **(self.measured.prediction(widths) if self.measured else {})}
        plan = build_plan(self.model, found.layers, config, found.num_samples, found.num_tokens, facts)
        return plan, found

    def plan(
        self, config: PrunerConfig, widths: tuple[LayerWidths, ...] | None = None
    ) -> tuple[PruningPlan, ReconstructFn, torch.Tensor | None]:
        """Plan and reconstruct as the config says.

        Args:
            config: All choices.
            widths: Widths after pruning, one per layer that stays; None: those of the size that the config names.

        Returns:
            (plan, reconstruction, hidden states of the pruned model on the samples: see `SequentialResult`).
        """
        widths = self.widths(config) if widths is None else widths
        if config.reconstruction == "sequential":
            plan, found = self.sequential(config, widths)
            return plan, found.reconstruct, found.final_states
        return *self.one_shot(config, widths), None


def plan_and_reconstruct(
    model: PreTrainedModel,
    samples: torch.Tensor,
    config: PrunerConfig,
    *,
    provenance: Mapping[str, Any] | None = None,
    resume_dir: Path | None = None,
) -> tuple[PruningPlan, ReconstructFn]:
    """Return the plan for some samples and the reconstruction that belongs to it: what [`apply_plan`][] takes.

    Args:
        model: The base model.
        samples: [samples, length], int64, of [`tokenize_samples`][].
        config: All choices, for neurons and KV groups.
        provenance: Goes into the plan, beside the config and versions.
        resume_dir: As for `Planner`.

    Returns:
        The plan, and the function that refits what it keeps; both for [`apply_plan`][].

    Raises:
        ConfigError: `max_loss_increase`, which needs measuring: call [`prune`][].
        ContextPruneError: See `hf_context_prune.errors`.
    """
    if config.max_loss_increase is not None:
        raise ConfigError("max_loss_increase is found by measuring the loss of models: call prune(), or give a size.")
    if config.removes_layers:
        raise ConfigError(
            "Which layers go as a whole is found by measuring: call prune() for num_layers, layer_ratio and layers in "
            "units."
        )
    if config.prunes_experts:
        raise ConfigError(
            "Which experts go, and which of their neurons, is found by measuring: call prune() for num_experts, "
            "experts_ratio, expert_neurons_ratio and shared_expert_ratio."
        )
    return Planner(model, samples, config, provenance, resume_dir).plan(config)[:2]
