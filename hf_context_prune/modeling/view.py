"""`ModelView`: a model as pruning sees it: its table entry, its sizes, its layers and what each unit costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from .architectures import (
    TARGETS,
    Target,
    UnitCosts,
    check_supported,
    layers_of,
    output_projection,
    refuse_switches,
    spec_of,
    unit_costs,
)
from .geometry import Geometry, LayerWidths, read_geometry
from .specs import ArchSpec


@dataclass(frozen=True)
class ModelView:
    """A supported model with everything that is read from its config and shapes, each once.

    Attributes:
        model: The model itself.
        spec: Its entry in the table of architectures.
        geometry: Its sizes, layer by layer.
    """

    model: PreTrainedModel
    spec: ArchSpec
    geometry: Geometry

    @classmethod
    def of(cls, model: nn.Module) -> ModelView:
        """View a model that is to be calibrated or pruned.

        Raises:
            UnsupportedArchitectureError: See [`check_supported`][].
        """
        spec = check_supported(model)
        return cls(model, spec, read_geometry(model.config, spec))  # type: ignore[arg-type]

    @classmethod
    def of_shapes(cls, model: PreTrainedModel) -> ModelView:
        """View a model of which only shapes are read: its weights may be on the meta device or quantised.

        Raises:
            UnsupportedArchitectureError: The table has no entry for its model type.
        """
        spec = spec_of(model.config)
        refuse_switches(model.config, spec)
        return cls(model, spec, read_geometry(model.config, spec))

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return layers_of(self.model, self.spec)

    @property
    def widths(self) -> tuple[LayerWidths, ...]:
        """Neurons and KV groups of every layer."""
        return self.geometry.layers

    @cached_property
    def costs(self) -> UnitCosts:
        """Parameters that go with one neuron and with one KV group."""
        return unit_costs(self.model, self.spec, self.geometry)

    @cached_property
    def num_parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        return self.model.num_parameters()

    def output_projection(self, layer: int, target: Target) -> nn.Module:
        """Return the projection of a layer whose input features belong to the units of a target."""
        return output_projection(self.layers[layer], self.spec, target)

    def targets(self, layer: int) -> tuple[Target, ...]:
        """Return the targets that have units in a layer: where no head can be removed, neurons alone."""
        return self.widths[layer].targets  # type: ignore[return-value]

    def places(self, targets: Iterable[Target] = TARGETS) -> list[tuple[int, Target]]:
        """Return every (layer, target) with units, in order."""
        wanted = set(targets)
        return [
            (layer, target) for layer in range(len(self.widths)) for target in self.targets(layer) if target in wanted
        ]

    def num_units(self, layer: int, target: Target) -> int:
        """Return how many units of a target a layer has."""
        return self.widths[layer].of(target)
