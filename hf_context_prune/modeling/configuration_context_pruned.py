"""Configs of variable-width models: ``ContextPruned<Base>Config`` for every entry of the table.

Widths live in the library's own ``per_layer_config`` field (sparse: ``{layer: {attribute: value}}``); the global
attributes keep the dense parent's values. The classes are made on first access (PEP 562), so that pickle, ``auto_map``
and remote code all find them by name.
"""

from __future__ import annotations

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict

from .specs import PREFIX, SPECS, ArchSpec, classes_on_demand


def config_class_name(spec: ArchSpec) -> str:
    """Name of the variable-width config class of an architecture, such as ``ContextPrunedLlamaConfig``."""
    return f"ContextPruned{spec.config_class}"


def _check_width(layer: int, name: str, value: object, dense: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"per_layer_config[{layer}].{name} is {value!r} ({type(value).__name__}); it must be an integer "
            f"from 1 to {dense}, the width of the dense parent."
        )
    if not 1 <= value <= dense:
        raise ValueError(
            f"per_layer_config[{layer}].{name} is {value}; it must be from 1 to {dense}, the width of the dense parent."
        )


class ContextPrunedConfigMixin:
    """Checks per-layer widths, and lifts the parent's rule that the hidden size is a multiple of the head count."""

    spec: ArchSpec
    model_type: str

    def validate_architecture(self) -> None:
        """Refuse widths that no layer could have.

        Raises:
            ValueError: A width is not an integer, below 1, above the dense parent's, or query heads and KV groups do
                not stand in the dense parent's ratio.
        """
        spec, overrides = self.spec, self.width_overrides()
        dense = {name: self._dense_value(name) for name in (spec.width, spec.query_heads, spec.kv_heads) if name}
        for name, value in dense.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; the dense parent's width must be an integer of at least 1.")
        if spec.kv_heads and dense[spec.query_heads] % dense[spec.kv_heads]:
            raise ValueError(
                f"{spec.query_heads} is {dense[spec.query_heads]} and {spec.kv_heads} is {dense[spec.kv_heads]}; the "
                f"dense parent's query heads must be a multiple of its KV heads."
            )
        ratio = dense[spec.query_heads] // dense[spec.kv_heads] if spec.kv_heads else 1
        for layer, values in overrides.items():
            unknown = sorted(set(values) - set(dense))
            if unknown:
                raise ValueError(
                    f"per_layer_config[{layer}] sets {', '.join(unknown)}; a {self.model_type} model varies only "
                    f"{', '.join(dense)}."
                )
            for name, value in values.items():
                _check_width(layer, name, value, dense[name])
            heads = values.get(spec.query_heads, dense[spec.query_heads])
            groups = values.get(spec.kv_heads, dense[spec.kv_heads]) if spec.kv_heads else heads
            if heads != groups * ratio:
                raise ValueError(
                    f"per_layer_config[{layer}] has {heads} query heads and {groups} KV groups; each KV group must "
                    f"have {ratio} query heads, as in the dense parent."
                )

    def to_dict(self) -> dict[str, Any]:
        """As the parent's, with the number of layers by its general name: a Trainer resumes with a bare config."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if "per_layer_config" in values:
            values.setdefault("num_hidden_layers", self.num_hidden_layers)  # type: ignore[attr-defined]
        return values

    def width_overrides(self) -> dict[int, dict[str, Any]]:
        """The sparse per-layer overrides, as a copy: ``{layer: {attribute: value}}``."""
        overrides = self.to_dict().get("per_layer_config", {})  # type: ignore[attr-defined]
        return {int(layer): dict(values) for layer, values in overrides.items()}

    def _dense_value(self, name: str) -> int:
        value = self._getattr_without_heterogeneous_validation(name)  # type: ignore[attr-defined]
        return 4 * self.hidden_size if value is None else value  # type: ignore[attr-defined]


def _make(spec: ArchSpec) -> type:
    parent = getattr(transformers, spec.config_class)
    name = config_class_name(spec)
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"Config of a variable-width {spec.model_type} model: `{spec.config_class}` with per-layer widths.",
        "model_type": PREFIX + spec.model_type,
        "spec": spec,
        # Without @strict on the subclass itself the parent's validators would run, not ours.
    }
    return strict(type(name, (ContextPrunedConfigMixin, parent), namespace))


_SPEC_BY_NAME = {config_class_name(spec): spec for spec in SPECS.values()}
__getattr__ = classes_on_demand(__name__, _SPEC_BY_NAME, _make)


def __dir__() -> list[str]:
    return sorted([*globals(), *_SPEC_BY_NAME])
