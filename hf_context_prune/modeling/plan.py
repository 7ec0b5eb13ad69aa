"""The pruning plan: the kept units of every layer. A frozen value, and the auditable artefact of every run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_context_prune.errors import PlanError
from hf_context_prune.utils.files import write_file
from hf_context_prune.utils.reading import read_json, why

from .expert_neurons import ExpertNeurons
from .geometry import ALL_UNITS, Geometry, LayerWidths
from .plan_provenance import check_recorded
from .plan_vocabulary import Vocabulary
from .specs import base_model_type
from .token_rows import num_rows

FORMAT_VERSION = 5
"""Latest version of the JSON format. Version 1 had no vocabulary; version 3, which may lack whole layers, is written
only of a plan that removes some, version 4 only of a model with experts, and 5 of a plan that narrows them."""
_FINGERPRINT_VALUES = 512
_MAX_BYTES = 64 * 2**20  # the plan of 126 layers of 53,248 neurons has 40 MB


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's parameter names, shapes and a sample of values.

    Values are rounded to bfloat16 first, so that a checkpoint has the same hash in float32 and in bfloat16.

    Args:
        model: The base model.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _FINGERPRINT_VALUES)
        digest.update(flat[::step].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class LayerPlan:
    """Kept units of one layer, ascending.

    Attributes:
        neurons: Indices of the kept MLP neurons.
        kv_groups: Indices of the kept KV groups; none in a layer without heads that can be removed.
        experts: Indices of the kept experts; none in a layer with an MLP.
        gone: Whether the layer is removed as a whole; it then keeps no units.
    """

    neurons: tuple[int, ...]
    kv_groups: tuple[int, ...]
    experts: tuple[int, ...] = ()
    gone: bool = field(default=False, kw_only=True)

    @classmethod
    def whole(cls, widths: LayerWidths) -> LayerPlan:
        """Return the plan that keeps all units of a layer."""
        return cls(*(tuple(range(widths.of(target))) for target in ALL_UNITS))

    def kept(self, target: str) -> tuple[int, ...]:
        """Return the kept units of ``"mlp"`` (neurons), ``"attention"`` (KV groups) or ``"experts"``."""
        units: tuple[int, ...] = getattr(self, ALL_UNITS[target])
        return units


GONE_LAYER = LayerPlan((), (), gone=True)
"""The plan of a layer that is removed as a whole."""


@dataclass(frozen=True)
class PruningPlan:
    """Kept units of every layer and kept vocabulary entries, for one base model.

    Attributes:
        model_type: Native model type, such as ``"llama"``.
        dense: Widths of the base model, one per layer.
        layers: Kept units, one entry per layer.
        model_fingerprint: [`fingerprint`][] of the base model; empty for a plan made from shapes alone.
        provenance: How the plan was made: options, data, seed, versions (JSON values).
        vocabulary: The kept vocabulary entries; None if all stay, with their ids.
        expert_neurons: The kept neurons inside the experts that stay; None if all stay.
    """

    model_type: str
    dense: tuple[LayerWidths, ...]
    layers: tuple[LayerPlan, ...]
    model_fingerprint: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    expert_neurons: ExpertNeurons | None = None

    def __post_init__(self) -> None:
        """Refuse fields of a wrong type, and indices that are out of range, repeated or not ascending.

        Raises:
            PlanError: The message has the field, or the layer and the kind of unit, and the value.
        """
        for name, kind in (("model_type", str), ("model_fingerprint", str), ("provenance", Mapping)):
            if not isinstance(getattr(self, name), kind):
                what = "a string" if kind is str else "a mapping"
                raise PlanError(f"The plan's {name} is {getattr(self, name)!r}; it must be {what}.")
        if not self.layers:
            raise PlanError("The plan has no layers; it must have one entry for each layer of its model.")
        if len(self.layers) != len(self.dense):
            raise PlanError(f"The plan has {len(self.layers)} layers, its model has {len(self.dense)}.")
        if self.expert_neurons is not None:
            self.expert_neurons.check([len(layer.experts) for layer in self.layers])
        if all(layer.gone for layer in self.layers):
            raise PlanError(f"The plan removes all {len(self.layers)} layers; at least one must stay.")
        for index, (layer, widths) in enumerate(zip(self.layers, self.dense, strict=True)):
            if not (widths.neurons or widths.experts):
                raise PlanError(f"Layer {index} of the plan has no neurons and no experts in the base model.")
            for target, name in ALL_UNITS.items():
                kept, width = layer.kept(target), widths.of(target)
                if isinstance(width, bool) or not isinstance(width, int):
                    raise PlanError(f"Layer {index} of the plan: dense_{name} is {width!r}; it must be an integer.")
                if kept and layer.gone:
                    raise PlanError(f"Layer {index} of the plan is removed as a whole, but keeps {name}.")
                if not kept and width and not layer.gone:
                    raise PlanError(
                        f"Layer {index} of the plan keeps no {name}; at least one must stay, or the whole layer goes "
                        f"(LayerPlan((), (), gone=True); removed_layers in a file)."
                    )
                if any(isinstance(unit, bool) or not isinstance(unit, int) for unit in kept):
                    raise PlanError(f"Layer {index} of the plan has {name} that are not integers: {kept[:8]}.")
                if (kept and (kept[0] < 0 or kept[-1] >= width)) or any(a >= b for a, b in pairwise(kept)):
                    raise PlanError(
                        f"Layer {index} of the plan has {name} that are not ascending integers from 0 to {width - 1}."
                    )

    @classmethod
    def identity(cls, model_type: str, geometry: Geometry, model_fingerprint: str = "") -> PruningPlan:
        """Return the plan that keeps everything."""
        layers = tuple(map(LayerPlan.whole, geometry.layers))
        return cls(base_model_type(model_type), geometry.layers, layers, model_fingerprint)

    @property
    def widths(self) -> tuple[LayerWidths, ...]:
        """Widths after pruning, one per layer of the base model."""
        return tuple(LayerWidths(*(len(layer.kept(target)) for target in ALL_UNITS)) for layer in self.layers)

    @property
    def removed_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that are removed as a whole, ascending."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.gone)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Numbers that the layers of the pruned model have in the base model, ascending."""
        return tuple(index for index, layer in enumerate(self.layers) if not layer.gone)

    @property
    def kept_widths(self) -> tuple[LayerWidths, ...]:
        """Widths of the pruned model, one per layer that it has."""
        return tuple(widths for widths in self.widths if not widths.gone)

    @property
    def domain(self) -> str | None:
        """Name of the domain that the plan was made for, if it was given."""
        return self._named("config", "domain") or None

    @property
    def data_name(self) -> str:
        """Name of the text that was calibrated on; empty where the plan names none."""
        return self._named("data", "name")

    def _named(self, entry: str, key: str) -> str:
        values = self.provenance.get(entry)
        value = values.get(key) if isinstance(values, Mapping) else None
        return value.strip() if isinstance(value, str) else ""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is removed."""
        return self.widths == self.dense and self.vocabulary is None and self.expert_neurons is None

    @property
    def sha256(self) -> str:
        """Hash of the kept units and entries and of the base model's facts, without the provenance."""
        content = {key: value for key, value in self.to_dict().items() if key != "provenance"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def check_fits(self, model: nn.Module, model_type: str, geometry: Geometry) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            PlanError: The model has another architecture, other widths or other weights.
        """
        if self.model_type != base_model_type(model_type):
            raise PlanError(
                f"The plan was made for a {self.model_type} model, this one is {base_model_type(model_type)}. Make a "
                f"plan with this model."
            )
        if self.dense != geometry.layers:
            raise PlanError(
                f"The plan was made for {_describe(self.dense)}, this model has {_describe(geometry.layers)}. Make a "
                f"plan with this model."
            )
        if self.vocabulary is not None and self.vocabulary.dense != (rows := num_rows(model)):
            raise PlanError(
                f"The plan's vocabulary is for {self.vocabulary.dense:,} embedding rows, this model has {rows:,}. Make "
                f"a plan with this model."
            )
        if self.model_fingerprint and self.model_fingerprint != fingerprint(model):
            raise PlanError(
                "The plan was made for a model with other weights (the fingerprints differ), so its indices mean "
                "nothing here. Make a plan with this model."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, which [`from_dict`][] reads."""
        removed, experts = list(self.removed_layers), any(widths.experts for widths in self.dense)
        inside = {} if self.expert_neurons is None else {"expert_neurons": self.expert_neurons.to_dict()}
        return {
            "format_version": FORMAT_VERSION if inside else 4 if experts else 3 if removed else 2,
            "model_type": self.model_type,
            "model_fingerprint": self.model_fingerprint,
            **({"removed_layers": removed} if removed or experts else {}),
            "layers": [
                {f"dense_{name}": getattr(widths, name) for name in _names(experts)}
                | {name: list(getattr(layer, name)) for name in _names(experts)}
                for layer, widths in zip(self.layers, self.dense, strict=True)
            ],
            "vocabulary": None
            if self.vocabulary is None
            else {"dense": self.vocabulary.dense, "kept": list(self.vocabulary.kept)},
            **inside,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """Build a plan from JSON values.

        Raises:
            PlanError: A field is missing, the format version is unknown, or indices are wrong.
        """
        try:
            if data["format_version"] not in range(1, FORMAT_VERSION + 1):
                raise PlanError(
                    f"The plan has format version {data['format_version']}; this package reads 1 to {FORMAT_VERSION}. "
                    f"Update hf-context-prune."
                )
            vocabulary = data["vocabulary"] if data["format_version"] > 1 else None
            inside = data["expert_neurons"] if data["format_version"] > 4 else None
            units = _names(data["format_version"] > 3)
            removed = data["removed_layers"] if data["format_version"] > 2 else []
            _check_removed_layers(removed, len(data["layers"]))
            return cls(
                model_type=data["model_type"],
                dense=tuple(LayerWidths(*(x[f"dense_{name}"] for name in units)) for x in data["layers"]),
                layers=tuple(
                    replace(LayerPlan(*(tuple(x[name]) for name in units)), gone=index in removed)
                    for index, x in enumerate(data["layers"])
                ),
                model_fingerprint=data["model_fingerprint"],
                provenance=data["provenance"],
                vocabulary=None if vocabulary is None else Vocabulary(vocabulary["dense"], tuple(vocabulary["kept"])),
                expert_neurons=None if inside is None else ExpertNeurons.from_dict(inside),
            )
        except (KeyError, TypeError) as error:
            raise PlanError(f"This is not a pruning plan: {type(error).__name__} {error}.") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, one layer per line; a file at `path` is replaced whole or stays as it was.

        Raises:
            SaveError: The file can't be written.
        """
        data = self.to_dict()
        layers = ",\n  ".join(json.dumps(layer, separators=(",", ":")) for layer in data.pop("layers"))
        vocabulary = json.dumps(data.pop("vocabulary"), separators=(",", ":"))
        head = json.dumps(data, indent=1, sort_keys=True, allow_nan=False)
        write_file(path, f'{head[:-2]},\n "vocabulary": {vocabulary},\n "layers": [\n  {layers}\n ]\n}}\n')

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan from a JSON file.

        Raises:
            PlanError: The file is missing, not JSON or not a plan.
        """
        try:
            data = read_json(path, max_bytes=_MAX_BYTES)
        except FileNotFoundError:
            raise PlanError(
                f"{path} does not exist, so its folder holds no pruned model. Make one by `prune` or by "
                f"callback.save_pretrained."
            ) from None
        except (OSError, ValueError) as error:
            raise PlanError(f"{path} can't be read as a pruning plan: {why(error)}.") from error
        if not isinstance(data, dict):
            raise PlanError(f"{path} is not a pruning plan: its top level is a {type(data).__name__}, not an object.")
        plan = cls.from_dict(data)
        check_recorded(plan.provenance)
        return plan


def _names(experts: bool) -> tuple[str, ...]:
    """Return the names of units that a file has: those of experts where the model has any."""
    return tuple(name for name in ALL_UNITS.values() if experts or name != "experts")


def _check_removed_layers(listed: object, count: int) -> None:
    """Refuse a file whose list of removed layers is none, or names a layer that is not there."""
    if not isinstance(listed, list) or any(type(index) is not int for index in listed):
        raise PlanError(f"The plan's removed_layers is {listed!r:.80}; it must be a list of integers.")
    if missing := [index for index in listed if not 0 <= index < count]:
        raise PlanError(
            f"The plan removes layer {', '.join(map(str, missing))}, but its model has {count} layers, numbered from 0 "
            f"to {count - 1}."
        )
    if any(first >= second for first, second in pairwise(listed)):
        raise PlanError(f"The plan's removed_layers is {listed!r:.80}; its numbers must ascend.")


def _describe(widths: tuple[LayerWidths, ...]) -> str:
    neurons, groups, experts = ({w.of(target) for w in widths} - {0} or {0} for target in ALL_UNITS)
    more = f" and {_format_range(experts)} experts" if any(experts) else ""
    return f"{len(widths)} layers of {_format_range(neurons)} neurons and {_format_range(groups)} KV groups{more}"


def _format_range(values: set[int]) -> str:
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"
