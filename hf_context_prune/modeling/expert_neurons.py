"""Neurons inside experts: which stay, the config that holds as many, and the tensors without the others.

Every expert of a model has as many neurons, but each its own: neuron 3 of one expert has nothing to do with neuron 3 of
another. So a plan has the kept neurons of every expert that stays. A shared expert, through which every token runs
beside those of its routing, has a width of its own, or is as wide as a number of experts together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_context_prune.errors import PlanError

from .spec_parts import Experts

SHARED_INPUTS, SHARED_OUTPUT = ("gate_proj", "up_proj"), "down_proj"
"""The projections of a shared expert, relative to its module."""


@dataclass(frozen=True)
class ExpertNeurons:
    """The kept neurons inside the experts of every layer.

    Attributes:
        dense: Neurons of an expert of the base model.
        layers: For every layer of the base model the kept neurons of each expert that stays, ascending; empty for a
            layer without experts, or that is removed. () where all neurons of all experts stay.
        dense_shared: Neurons of the shared expert of a layer of the base model; 0 where there is none.
        shared: For every layer its kept neurons, ascending; empty for a layer without experts, or that is removed. ()
            where all stay.
    """

    dense: int
    layers: tuple[tuple[tuple[int, ...], ...], ...] = ()
    dense_shared: int = 0
    shared: tuple[tuple[int, ...], ...] = ()

    @property
    def width(self) -> int:
        """Neurons of an expert that stay."""
        return next((len(kept) for layer in self.layers for kept in layer), self.dense)

    @property
    def shared_width(self) -> int:
        """Neurons of a shared expert that stay."""
        return next((len(kept) for kept in self.shared if kept), self.dense_shared)

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Neurons of an expert that stay and how many there are, and the same of a shared expert."""
        return (self.width, self.dense), (self.shared_width, self.dense_shared)

    def without(self, removed: Sequence[int]) -> ExpertNeurons:
        """Return the same without the neurons of layers that are removed as a whole."""

        def keep(layers: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(() if index in removed else kept for index, kept in enumerate(layers))

        return ExpertNeurons(self.dense, keep(self.layers), self.dense_shared, keep(self.shared))

    def check(self, experts: Sequence[int]) -> None:
        """Refuse neurons that no model of a plan can have.

        Args:
            experts: Experts that the plan leaves every layer.

        Raises:
            PlanError: The message has the layer and what is wrong.
        """
        for name, value, least in (("dense", self.dense, 1), ("dense_shared", self.dense_shared, 0)):
            if type(value) is not int or value < least:
                raise PlanError(f"The plan's expert_neurons.{name} is {value!r}; it must be an integer from {least}.")
        shared = tuple((kept,) if kept else () for kept in self.shared)
        _check_half("layers", self.layers, self.dense, self.width, experts)
        _check_half("shared", shared, self.dense_shared, self.shared_width, [min(count, 1) for count in experts])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: the neurons of an expert as the bits of a hexadecimal number."""
        return {
            "dense": self.dense,
            "layers": [list(map(_to_mask, layer)) for layer in self.layers],
            "dense_shared": self.dense_shared,
            "shared": list(map(_to_mask, self.shared)),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExpertNeurons:
        """Build the value from what `to_dict` returns.

        Raises:
            PlanError: A mask is no hexadecimal number, or has more digits than the expert has neurons.
        """
        dense, shared = data["dense"], data["dense_shared"]
        return cls(
            dense,
            tuple(tuple(_from_mask(mask, dense) for mask in layer) for layer in data["layers"]),
            shared,
            tuple(_from_mask(mask, shared) for mask in data["shared"]),
        )


def _check_half(
    name: str, layers: Sequence[Sequence[Sequence[int]]], dense: int, width: int, experts: Sequence[int]
) -> None:
    if layers and len(layers) != len(experts):
        raise PlanError(f"The plan's expert_neurons.{name} has {len(layers)} layers, not {len(experts)}.")
    for index, (kept, wanted) in enumerate(zip(layers, experts, strict=bool(layers))):
        where = f"Layer {index} of the plan: expert_neurons.{name}"
        if len(kept) != wanted:
            raise PlanError(f"{where} has the neurons of {len(kept)} experts; {wanted} stay there.")
        for neurons in kept:
            if not neurons or list(neurons) != sorted(set(neurons)) or not 0 <= neurons[0] <= neurons[-1] < dense:
                raise PlanError(f"{where} must hold ascending numbers from 0 to {dense - 1}, at least one an expert.")
            if len(neurons) != width:
                raise PlanError(
                    f"{where} keeps {len(neurons)} neurons of one expert and {width} of another; all keep as many."
                )


def _to_mask(neurons: Sequence[int]) -> str:
    return f"{sum(1 << neuron for neuron in neurons):x}"


def _from_mask(mask: object, dense: object) -> tuple[int, ...]:
    try:
        if type(dense) is not int or not isinstance(mask, str) or 4 * len(mask) > dense + 4:
            raise ValueError
        bits = f"{int(mask, 16):b}"[::-1]
    except ValueError:
        raise PlanError(
            f"The plan's expert_neurons have the mask {mask!r:.40} for {dense!r:.40} neurons; a mask is a hexadecimal "
            f"number with a bit for each."
        ) from None
    return tuple(index for index, bit in enumerate(bits) if bit == "1")


def inner_widths(config: Any, experts: Experts) -> tuple[int, int]:  # noqa: ANN401
    """Return the neurons of an expert, and those of a layer's shared expert: 0 where there is none."""
    width: int = getattr(config, experts.width)
    if experts.shared is None:
        return width, 0
    if experts.shared_width is not None:
        return width, getattr(config, experts.shared_width)
    return width, width * getattr(config, str(experts.shared_count))


def shared_expert(layer: nn.Module, experts: Experts) -> nn.Module | None:
    """Return the shared expert of a layer; None where it has none."""
    if experts.shared is None:
        return None
    found: nn.Module | None = getattr(layer.get_submodule(experts.block), experts.shared, None)
    return found


def check_neurons_fit(config: Any, experts: Experts | None, neurons: ExpertNeurons) -> None:  # noqa: ANN401
    """Refuse neurons that were planned for experts of another width.

    Raises:
        PlanError: The message has both widths; or the model has no experts, or can't hold the two widths together.
    """
    if experts is None:
        raise PlanError("The plan removes neurons inside experts, and this model has no experts.")
    found = inner_widths(config, experts)
    if found != (neurons.dense, neurons.dense_shared):
        raise PlanError(
            f"The plan was made for experts of {neurons.dense} neurons and shared ones of {neurons.dense_shared}, this "
            f"model has {found[0]} and {found[1]}. Make a plan with this model."
        )
    wanted = neurons.width, neurons.shared_width
    if inner_widths(narrow_config(config, experts, wanted), experts) != wanted:
        raise PlanError(
            f"The plan keeps {neurons.width} neurons of every expert and {neurons.shared_width} of the shared one, but "
            f"this model's config has one width for both ({experts.width}; {experts.shared_count} of it are shared)."
        )


def narrow_config(config: Any, experts: Experts, widths: tuple[int, int]) -> Any:  # noqa: ANN401
    """Return a copy of a config in which experts, and shared ones, have so many neurons."""
    narrowed = copy.deepcopy(config)
    setattr(narrowed, experts.width, widths[0])
    if experts.shared_width is not None and widths[1]:
        setattr(narrowed, experts.shared_width, widths[1])
    return narrowed


def neurons_cost(layer: nn.Module, experts: Experts) -> tuple[int, int]:
    """Return the parameters of one neuron in all experts of a layer together, and of one in its shared expert."""
    module = layer.get_submodule(experts.prefix)
    outputs, transposed = module.get_parameter("down_proj"), experts.transposed
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj")
    routed = sum(tensor.numel() for name, tensor in module.named_parameters() if name in names)
    shared = 0
    if (own := shared_expert(layer, experts)) is not None:
        narrow = own.get_submodule(SHARED_OUTPUT)
        inside = sum(one.numel() for name in SHARED_INPUTS for one in own.get_submodule(name).parameters())
        shared = (inside + narrow.weight.numel()) // narrow.weight.shape[1]
    return routed // outputs.shape[1 if transposed else 2], shared


def narrow_experts(
    state: dict[str, torch.Tensor], prefix: str, experts: Experts, neurons: ExpertNeurons, index: int
) -> None:
    """Cut the neurons of the experts that stay in one layer, in a state that holds no other experts.

    Args:
        state: Tensors of the model by name; changed in place.
        prefix: The layer's name.
        experts: What the family's entry says of experts.
        neurons: The neurons that stay.
        index: The layer's number in the plan.
    """
    own = f"{prefix}.{experts.prefix}"
    if neurons.layers and neurons.layers[index]:
        units = torch.tensor(neurons.layers[index])
        pairs = _in_turns(units) if experts.transposed else torch.cat([units, units + neurons.dense], dim=1)
        inputs, outputs = (2, 1) if experts.transposed else (1, 2)
        for name, places, dimension in (
            ("gate_up_proj", pairs, inputs),
            ("gate_up_proj_bias", pairs, 1),
            ("down_proj", units, outputs),
        ):
            _replace(state, f"{own}.{name}", partial(_take, dimension, places))
    if neurons.shared and neurons.shared[index]:
        kept = torch.tensor(neurons.shared[index])
        shared = f"{prefix}.{experts.block}.{experts.shared}"
        for name in SHARED_INPUTS:
            for kind in ("weight", "bias"):
                _replace(state, f"{shared}.{name}.{kind}", lambda tensor: tensor[kept.to(tensor.device)])
        _replace(state, f"{shared}.{SHARED_OUTPUT}.weight", lambda tensor: tensor[:, kept.to(tensor.device)])


def _in_turns(units: torch.Tensor) -> torch.Tensor:
    """Return the places of gate and up of some neurons where they are stored in turns, [experts, 2 neurons]."""
    return torch.stack([2 * units, 2 * units + 1], dim=2).flatten(1)


def _replace(state: dict[str, torch.Tensor], name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    if name in state:
        state[name] = function(state[name])


def _take(dimension: int, places: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return the entries along a dimension that each expert keeps: places are [experts, kept]."""
    shape = [1] * tensor.ndim
    shape[0], shape[dimension] = places.shape
    return torch.take_along_dim(tensor, places.to(tensor.device).view(shape), dimension)
