"""Plans that remove experts, and the dense models that they must equal."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from hf_context_prune.modeling.expert_neurons import ExpertNeurons, inner_widths, shared_expert
from hf_context_prune.modeling.experts import num_groups
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pipelines.architecture.contract import random_plan


def expert_plan(model, counts=(6, 4, 4), *, seed=0, units=False, variable=False) -> PruningPlan:
    """A plan that keeps random experts, as many in every group; other units too if asked."""
    view = ModelView.of(model)
    generator = torch.Generator().manual_seed(seed)
    plan = random_plan(model, variable=variable) if units else PruningPlan.identity(view.spec.model_type, view.geometry)
    groups = num_groups(model.config, view.spec.experts)

    def choose(total, count):
        size = total // groups
        return tuple(
            group * size + index
            for group in range(groups)
            for index in sorted(torch.randperm(size, generator=generator)[: count // groups].tolist())
        )

    layers = tuple(
        replace(layer, experts=choose(widths.experts, count)) if widths.experts else layer
        for layer, widths, count in zip(plan.layers, view.widths, counts, strict=True)
    )
    return replace(plan, layers=layers)


def neuron_plan(plan: PruningPlan, model, *, seed=0) -> PruningPlan:
    """A plan that also keeps half of the neurons of every expert it keeps, and of shared experts, drawn at random."""
    view = ModelView.of(model)
    dense, shared = inner_widths(model.config, view.spec.experts)
    generator = torch.Generator().manual_seed(seed)

    def choose(total):
        return tuple(sorted(torch.randperm(total, generator=generator)[: total // 2].tolist()))

    inside = tuple(tuple(choose(dense) for _ in layer.experts) for layer in plan.layers)
    in_shared = tuple(choose(shared) if layer.experts else () for layer in plan.layers) if shared else ()
    return replace(plan, expert_neurons=ExpertNeurons(dense, inside, shared, in_shared))


@torch.no_grad()
def without_neurons(model, plan: PruningPlan):
    """A copy of a model in which removed neurons inside experts have output columns of zero."""
    silenced = copy.deepcopy(model)
    view, neurons = ModelView.of(silenced), plan.expert_neurons
    experts = view.spec.experts
    for index, (layer, kept) in enumerate(zip(view.layers, plan.layers, strict=True)):
        if not kept.experts:
            continue
        weight = layer.get_submodule(experts.prefix).down_proj
        for expert, own in zip(kept.experts, neurons.layers[index], strict=True):
            gone = sorted(set(range(neurons.dense)) - set(own))
            (weight[expert].mT if experts.transposed else weight[expert])[:, gone] = 0
        if neurons.shared:
            gone = sorted(set(range(neurons.dense_shared)) - set(neurons.shared[index]))
            shared_expert(layer, experts).down_proj.weight[:, gone] = 0
    return silenced
