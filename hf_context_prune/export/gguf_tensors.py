"""The tensors of a model as llama.cpp has them: their names, the order of their features, and their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH
from numpy.typing import NDArray

from hf_context_prune.errors import ExportError
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.configuration_context_pruned import has_tied_head
from hf_context_prune.modeling.geometry import WITHOUT_ATTENTION, Geometry, kv_groups_of
from hf_context_prune.modeling.spec_parts import Projection
from hf_context_prune.modeling.specs import ArchSpec

from .gguf_experts import expert_values, part_axis
from .gguf_family import GgufFamily
from .gguf_recurrence import recurrent_values
from .gguf_rope import rope_tensors


def key_value_heads(config: Any, spec: ArchSpec) -> list[int]:  # noqa: ANN401
    """Return the key/value heads of every layer, also of those that can't be removed; 0 in layers without attention."""
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    return [
        0 if kind in WITHOUT_ATTENTION else kv_groups_of(config.per_layer_config[index], spec)
        for index, kind in enumerate(kinds)
    ]


def full_groups(geometry: Geometry) -> int:
    """Return the KV groups with which all query heads together have as many features as the residual stream.

    Raises:
        ExportError: No number of them has.
    """
    groups, rest = divmod(geometry.hidden_size, geometry.queries_per_group * geometry.head_dim)
    if rest:
        raise ExportError(
            f"llama.cpp's architecture of this family has as many features of query heads as the hidden size "
            f"({geometry.hidden_size}), which {geometry.queries_per_group} heads of {geometry.head_dim} per key/value "
            f"head can't make. Export to another format."
        )
    return groups


class Tensors:
    """The tensors of a file.

    Args:
        model: The model.
        geometry: Sizes of the file.
        arch: The architecture in llama.cpp.
        family: Its conventions.
    """

    def __init__(self, model: Any, geometry: Geometry, arch: MODEL_ARCH, family: GgufFamily) -> None:  # noqa: ANN401
        self._model, self._geometry, self._arch, self._family = model, geometry, arch, family
        self._spec = spec_of(model.config)
        self._names = gguf.get_tensor_name_map(arch, len(geometry.layers))
        self._neurons = dict(self._neuron_axes())
        self._heads = dict(self._projections())
        self._read = self._read_features()

    def sources(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield the name of each tensor in the model, and those of its parts in the file.

        Raises:
            ExportError: The architecture has no such tensor.
        """
        tied = has_tied_head(self._model) and not self._family.own_head
        for name in self._model.state_dict():
            if (tied and name == "lm_head.weight") or ".act_fn." in name:
                continue  # llama.cpp uses the embedding where the head is missing; xIELU's values are no tensors
            if not (new := self._new_names(name)):
                raise ExportError(
                    f"llama.cpp's architecture {gguf.MODEL_ARCH_NAMES[self._arch]} has no tensor for {name}. Export to "
                    f"another format."
                )
            yield name, new

    def __iter__(self) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
        """Yield the names of each tensor in the model and in the file, and its float32 values."""
        state = self._model.state_dict()
        for name, parts in self.sources():
            values = self._values(name, state[name].float())
            axis = part_axis(self._spec, self._path(name))
            for new, part in zip(parts, values.chunk(len(parts), axis), strict=True):
                yield name, new, part.contiguous().numpy()
        for new, factors in rope_tensors(self._model, self._geometry):
            yield "", new, factors.numpy()

    def _new_names(self, name: str) -> tuple[str, ...]:
        if (path := self._path(name)) in self._family.names:
            index = name.removeprefix(f"{self._spec.layers}.").partition(".")[0]
            return tuple(f"blk.{index}.{part}" for part in self._family.names[path])
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return () if found is None else (found,)

    def _path(self, name: str) -> str:
        """Return the name of a tensor in its layer; empty outside the layers."""
        prefix = f"{self._spec.layers}."
        return name.removeprefix(prefix).partition(".")[2] if name.startswith(prefix) else ""

    def _values(self, name: str, values: torch.Tensor) -> torch.Tensor:
        family = self._family
        if self._spec.transposed and values.ndim == 2 and name.startswith(self._spec.layers):
            values = values.T
        if name in self._heads:
            values = self._by_role(values, *self._heads[name])
        if name in self._read:
            values = _filled_up(values, 1, self._read[name], 1)
        if name.endswith("norm.weight") and not any(part in name for part in family.plain_norms):
            values = values + family.norm_offset
        values = recurrent_values(self._model.config, name, values)
        values = expert_values(self._spec, self._path(name), values)
        if name in self._neurons:
            values = _filled_up(values, *self._neurons[name])
        return values

    def _neuron_axes(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """Yield the name of each tensor that has neurons, with their axis, their number in the file, and its blocks."""
        spec = self._spec
        for index, layer in enumerate(self._geometry.layers):
            for path in spec.mlp_inputs:
                for part in ("weight", "bias"):
                    yield f"{spec.layers}.{index}.{path}.{part}", (0, layer.neurons, spec.mlp_blocks)
            yield f"{spec.layers}.{index}.{spec.mlp_output}.weight", (1, layer.neurons, 1)

    def _projections(self) -> Iterator[tuple[str, tuple[Projection, int]]]:
        """Yield the name of each tensor that makes query, key or value heads, with its layout and its KV groups."""
        for index, groups in enumerate(key_value_heads(self._model.config, self._spec)):
            for projection in self._spec.attention_inputs:
                for part in ("weight", "bias"):
                    yield f"{self._spec.layers}.{index}.{projection.path}.{part}", (projection, groups)

    def _read_features(self) -> dict[str, int]:
        """Return the input features of each projection that reads heads, where heads are filled up."""
        if not self._family.full_heads:
            return {}
        layers = range(len(self._geometry.layers))
        return {
            f"{self._spec.layers}.{i}.{self._spec.attention_output}.weight": self._geometry.hidden_size for i in layers
        }

    def _by_role(self, values: torch.Tensor, projection: Projection, groups: int) -> torch.Tensor:
        """Return the heads of the first role, then all of the second, with features in the order of llama.cpp."""
        geometry, head_dim = self._geometry, self._geometry.head_dim
        heads = [len(geometry.head_range(0, role)) for role in projection.roles]
        if projection.interleaved:
            by_group = values.unflatten(0, (groups, sum(heads), head_dim))
            parts = [part.flatten(0, 2) for part in by_group.split(heads, dim=1)]
        else:
            parts = list(values.split([groups * count * head_dim * projection.blocks for count in heads]))
        if self._family.full_heads:
            total = full_groups(geometry)
            parts = [
                _filled_up(part, 0, total * count * head_dim * projection.blocks, 1)
                for part, count in zip(parts, heads, strict=True)
            ]
        if self._family.reordered:
            parts = [
                part if role == "value" else _neighbours(part, head_dim)
                for part, role in zip(parts, projection.roles, strict=True)
            ]
        return torch.cat(parts)


def _neighbours(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the features of every head so that features rotated together, i and i + half, are neighbours."""
    halves = values.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(values.shape)


def _filled_up(values: torch.Tensor, axis: int, width: int, blocks: int) -> torch.Tensor:
    """Add neurons or heads that are zero, to each of the blocks of them along an axis."""
    split = values.unflatten(axis, (blocks, -1)).movedim(axis + 1, -1)
    return torch.nn.functional.pad(split, (0, width - split.shape[-1])).movedim(-1, axis + 1).flatten(axis, axis + 1)
