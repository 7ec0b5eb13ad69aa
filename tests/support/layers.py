"""Plans that remove whole layers."""

from __future__ import annotations

from dataclasses import replace

from hf_context_prune.modeling.plan import GONE_LAYER, PruningPlan
from hf_context_prune.modeling.view import ModelView


def without_layers(plan: PruningPlan, *gone: int) -> PruningPlan:
    """A plan that removes these layers too."""
    layers = tuple(GONE_LAYER if index in gone else layer for index, layer in enumerate(plan.layers))
    return replace(plan, layers=layers)


def depth_plan(model, *gone: int) -> PruningPlan:
    """A plan that removes these layers of a model, and nothing else."""
    return without_layers(PruningPlan.identity(model.config.model_type, ModelView.of(model).geometry), *gone)
