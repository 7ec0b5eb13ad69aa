"""What is measured of the layers once, and the plans of any size that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import ConfigError, error_context
from hf_context_prune.modeling.geometry import LayerWidths
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.adaptive import predicted_loss
from hf_context_prune.pruning.allocation.budget import Curve
from hf_context_prune.pruning.allocation.sensitivity import measure_sensitivity
from hf_context_prune.pruning.allocation.sizes import plain_curves
from hf_context_prune.pruning.allocation.widths import measured_widths, plan_widths
from hf_context_prune.pruning.calibration.statistics import CalibrationStats, Key
from hf_context_prune.pruning.surgery import ReconstructFn
from hf_context_prune.utils.distributed import on_main_process
from hf_context_prune.utils.version import versions

from .scoring import Requirements, score_units, select_units


def reconstruct_one_shot(stats: CalibrationStats, config: PrunerConfig) -> ReconstructFn:
    """Return the reconstruction of a config from statistics of one pass; for `sequential`, its fallback."""
    function = Requirements.of(config).reconstruction

    def reconstruct(
        layer: int, target: str, weight: torch.Tensor, bias: torch.Tensor | None, kept: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if len(kept) == weight.shape[1]:  # before removed layers: the statistics do not tell what those did
            return weight, bias
        with error_context(f"layer {layer} ({target})"):
            new_weight, new_bias = function(
                weight.cpu(), None if bias is None else bias.cpu(), kept, stats.targets[layer, target], config.ridge
            )
        return new_weight.to(weight.device), None if new_bias is None else new_bias.to(weight.device)

    return reconstruct


@dataclass
class LayerMeasurements:
    """What was measured of a model's layers, enough for a plan of any size.

    Attributes:
        importance: One value per unit, by (layer, target); empty where sequential reconstruction chooses the units.
        curves: Loss of each layer at each width; None for uniform widths.
        num_samples: Samples that were read.
        num_tokens: Unpadded tokens that were read.
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
            reconstruct, targets = reconstruct_one_shot(stats, config), Requirements.of(config).targets
            curves = on_main_process(
                lambda: measure_sensitivity(model, importance, reconstruct, probe, targets=targets)
            )
        return cls(importance, curves, stats.num_samples, stats.num_tokens)

    def widths(self, model: PreTrainedModel, config: PrunerConfig) -> tuple[LayerWidths, ...]:
        """Return the widths of the size that a config names."""
        return plan_widths(model, config) if self.curves is None else measured_widths(model, config, self.curves)

    def plan(
        self,
        model: PreTrainedModel,
        config: PrunerConfig,
        widths: tuple[LayerWidths, ...],
        provenance: Mapping[str, Any] | None,
    ) -> PruningPlan:
        """Return the plan with these widths: the most important units."""
        layers = select_units(self.importance, ModelView.of_shapes(model).geometry, widths)
        facts = {**(provenance or {}), **self.prediction(widths)}
        return build_plan(model, layers, config, self.num_samples, self.num_tokens, facts)

    def prediction(self, widths: Sequence[LayerWidths]) -> dict[str, Any]:
        """Return the curves and the loss that they predict, for the provenance; see [`plain_curves`][]."""
        if self.curves is None:
            return {}
        loss = predicted_loss(self.curves, widths)
        return {"predicted_loss_increase": loss, "sensitivity": plain_curves(self.curves)}


def build_plan(
    model: PreTrainedModel,
    layers: tuple[LayerPlan, ...],
    config: PrunerConfig,
    num_samples: int,
    num_tokens: int,
    provenance: Mapping[str, Any] | None,
) -> PruningPlan:
    """Return the plan with everything that its provenance needs to say of a calibration."""
    view = ModelView.of_shapes(model)
    return PruningPlan(
        model_type=view.spec.model_type,
        dense=view.widths,
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
