"""Mixtures of experts as pruning sees them: where a layer's router and experts lie, and how few of them may stay.

A router scores every expert by one row of its weight, so a layer without some experts is one whose router gives them
minus infinity. Everything that has one slice per expert is cut together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_context_prune.errors import PlanError, UnsupportedArchitectureError

from .expert_neurons import check_neurons_fit
from .geometry import Geometry
from .plan import PruningPlan
from .spec_parts import Experts
from .specs import ArchSpec


def experts_spec(spec: ArchSpec, what: str = "experts") -> Experts:
    """Return what an entry says of experts.

    Raises:
        UnsupportedArchitectureError: The family has none; the message begins with `what`.
    """
    if spec.experts is None:
        raise UnsupportedArchitectureError(
            f"{what}: a {spec.model_type} model has no experts, so none can be removed. Remove neurons, KV groups, "
            f"layers or tokens (pruning_ratio, num_layers)."
        )
    return spec.experts


def expert_slices(layer: nn.Module, experts: Experts) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield (name relative to the layer, tensor, dimension of the experts) of all that has a slice per expert."""
    block = layer.get_submodule(experts.block)
    for path, dimension in experts.tensors:
        owner, _, name = path.rpartition(".")
        tensor = getattr(block.get_submodule(owner), name, None)
        if tensor is not None:
            yield f"{experts.block}.{path}", tensor.detach(), dimension


def output_tensors(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the output projections of a layer's experts as their module stores them, and their biases or None."""
    weight: torch.Tensor = module.down_proj  # type: ignore[assignment]
    bias: torch.Tensor | None = getattr(module, "down_proj_bias", None)
    return weight.detach(), None if bias is None else bias.detach()


def gate_and_up(module: nn.Module, expert: int, hidden: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """Return what one expert's gate reads, and what it multiplies, as the module's own gate takes both.

    Args:
        module: Computes the experts of a layer.
        expert: Number of the expert.
        hidden: Inputs of the expert, [tokens, hidden].
        transposed: See [`Experts`][].
    """
    weight = module.gate_up_proj[expert].detach()  # type: ignore[index,union-attr]
    bias: torch.Tensor | None = getattr(module, "gate_up_proj_bias", None)
    return functional.linear(hidden, weight.T if transposed else weight, None if bias is None else bias[expert])


def expert_cost(model: nn.Module, spec: ArchSpec, geometry: Geometry) -> int:
    """Return the parameters that go with one expert, from the shapes of the first layer that has experts."""
    experts = experts_spec(spec)
    first = next((index for index, widths in enumerate(geometry.layers) if widths.experts), None)
    if first is None:
        return 0
    layer: nn.Module = model.get_submodule(spec.layers)[first]  # type: ignore[index,assignment]
    own = {name for name, _ in layer.named_parameters()}
    count = geometry.layers[first].experts
    return sum(tensor.numel() // count for name, tensor, _ in expert_slices(layer, experts) if name in own)


def check_experts_plain(layer: nn.Module, spec: ArchSpec, count: int, where: str) -> None:
    """Refuse a layer whose router or experts are not what the family's own code builds.

    Args:
        layer: A decoder layer with experts.
        spec: Its architecture.
        count: Experts that its config gives it.
        where: Name of the layer.

    Raises:
        UnsupportedArchitectureError: A module is missing or replaced, the router is no linear layer, or a tensor does
            not have one slice per expert.
    """
    experts = experts_spec(spec)
    modules = dict(layer.named_modules())
    for path in (f"{experts.block}.{experts.router}", experts.prefix):
        module = modules.get(path)
        kind = "no module" if module is None else f"{type(module).__module__}.{type(module).__qualname__}"
        if module is None or not kind.startswith("transformers.models."):
            raise UnsupportedArchitectureError(
                f"{where}.{path} is {kind}, not what transformers builds for {spec.model_type}: an adapter or a "
                f"quantiser has replaced it, or the layer is of another kind. Merge or unload it first, or load the "
                f"model as it was published."
            )
    router = f"{experts.block}.{experts.router}"
    slices = {name: (tensor, dimension) for name, tensor, dimension in expert_slices(layer, experts)}
    found = {f"{router}.{name}" for name, _ in modules[router].named_parameters()}
    weight = slices.get(f"{router}.weight", (None, 0))[0]
    if weight is None or weight.ndim != 2 or found - slices.keys():
        raise UnsupportedArchitectureError(
            f"{where}.{router} holds {', '.join(sorted(found)) or 'no weight'}: this router is no linear layer with a "
            f"row per expert, so taking experts away would change how it chooses between the others. Experts can only "
            f"be removed behind a linear router."
        )
    for name, (tensor, dimension) in slices.items():
        if tensor.shape[dimension] != count:
            raise UnsupportedArchitectureError(
                f"{where}.{name} has {tensor.shape[dimension]} slices and the config gives the layer {count} experts. "
                f"Load the model again with the config that was saved with it."
            )


def num_groups(config: Any, experts: Experts) -> int:  # noqa: ANN401
    """Return the number of groups that a router chooses from first; 1 where there are none."""
    return getattr(config, experts.groups[0]) if experts.groups else 1


def fewest_experts(config: Any, experts: Experts) -> int:  # noqa: ANN401
    """Return how few experts of a layer may stay: as many as a token is routed to, by way of its groups."""
    per_token: int = getattr(config, experts.per_token)
    if not experts.groups:
        return per_token
    groups, routed = (getattr(config, name) for name in experts.groups)
    return groups * max(2, -(-per_token // routed))  # the two best experts of a group speak for it


def why_not_kept(config: Any, experts: Experts, kept: Sequence[int], total: int) -> str | None:  # noqa: ANN401
    """Return why a router could not work with a choice of experts; None where it can.

    Args:
        config: The model's config.
        experts: What its entry says of experts.
        kept: Numbers of the experts that stay, ascending.
        total: Experts of the layer.
    """
    groups, per_token = num_groups(config, experts), getattr(config, experts.per_token)
    fewest = fewest_experts(config, experts)
    if len(kept) < fewest:
        in_groups = f", in {getattr(config, experts.groups[1])} of {groups} groups" if groups > 1 else ""
        return (
            f"{len(kept)} of {total} experts would stay, and at least {fewest} must: every token is routed to "
            f"{per_token} of them ({experts.per_token}{in_groups}). Keep {fewest} or more."
        )
    sizes = Counter(index * groups // total for index in kept)
    if groups > 1 and len({sizes[group] for group in range(groups)}) > 1:
        return (
            f"{', '.join(str(sizes[group]) for group in range(groups))} experts of the {groups} groups would stay "
            f"({experts.groups[0]}), and groups must keep equal numbers. Keep a multiple of {groups}."
        )
    return None


def check_experts_of_plan(config: Any, spec: ArchSpec, plan: PruningPlan) -> None:  # noqa: ANN401
    """Refuse a plan that leaves a layer experts with which its router could not work.

    Args:
        config: Config of the model that the plan is for.
        spec: Its architecture.
        plan: The plan.

    Raises:
        PlanError: Names the layer, how many experts would stay, and how many must; or their neurons do not fit.
    """
    if plan.expert_neurons is not None:
        check_neurons_fit(config, spec.experts, plan.expert_neurons)
    for index, (layer, widths) in enumerate(zip(plan.layers, plan.dense, strict=True)):
        if spec.experts is None or layer.gone or len(layer.experts) == widths.experts:
            continue
        if (why := why_not_kept(config, spec.experts, layer.experts, widths.experts)) is not None:
            raise PlanError(f"Layer {index} of the plan: {why}")
    counts = {len(layer.experts) for layer in plan.layers if layer.experts}
    if len(counts) > 1 and getattr(config, "output_router_logits", False):
        raise PlanError(
            f"The plan keeps {min(counts)} to {max(counts)} experts, and with output_router_logits=True the model "
            f"stacks the logits of all routers. Keep equal numbers, or set config.output_router_logits=False."
        )
