"""Tiny saved models to export: stock widths, and widths and KV heads that vary."""

from __future__ import annotations

from hf_context_prune.architectures import read_geometry, spec_of
from hf_context_prune.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.saving import save_pruned
from hf_context_prune.surgery import apply_plan
from tests.tiny import tiny_model, tiny_tokenizer

VARIABLE = (
    LayerPlan(tuple(range(32)), (0, 2)),
    LayerPlan(tuple(range(8, 40)), (1,)),
    LayerPlan((5, 6, 30), (0, 1, 2)),
)
UNIFORM = tuple(LayerPlan(tuple(range(index, index + 32)), (0, 1, 2)) for index in range(3))


def save(folder, *, variable=False, family="llama", tokenizer=None, **overrides):
    """A pruned tiny model with its plan and tokenizer."""
    model = tiny_model(family, **overrides)
    geometry = read_geometry(model.config, spec_of(model.config))
    plan = PruningPlan(family, geometry.layers, VARIABLE if variable else UNIFORM, fingerprint(model))
    return save_pruned(apply_plan(model, plan), folder, tokenizer=tokenizer or tiny_tokenizer(), plan=plan)
