"""Variable-width model classes. Importing this package registers them with the auto classes of `transformers`.

The files of this folder, without this one, travel flat with every saved variable-width model, so that it also opens
without the package (``trust_remote_code=True``).
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from . import configuration_context_pruned, modeling_context_pruned
from .configuration_context_pruned import ContextPrunedConfigMixin, config_class_name
from .modeling_context_pruned import ContextPrunedModelMixin, model_class_name
from .specs import PREFIX, SPECS, ArchSpec
from .upload_check import refuse_upload


def config_class(spec: ArchSpec) -> type[PreTrainedConfig]:
    """The variable-width config class of an architecture."""
    return getattr(configuration_context_pruned, config_class_name(spec))


def model_class(spec: ArchSpec) -> type[Any]:
    """The variable-width model class of an architecture."""
    return getattr(modeling_context_pruned, model_class_name(spec))


def auto_map(spec: ArchSpec) -> dict[str, str]:
    """The ``auto_map`` entry of config.json: what remote code loads, by file and class."""
    return {
        "AutoConfig": f"configuration_context_pruned.{config_class_name(spec)}",
        "AutoModelForCausalLM": f"modeling_context_pruned.{model_class_name(spec)}",
    }


def register(spec: ArchSpec) -> None:
    """Make the auto classes of `transformers` know one variable-width architecture."""
    AutoConfig.register(PREFIX + spec.model_type, config_class(spec), exist_ok=True)
    AutoModelForCausalLM.register(config_class(spec), model_class(spec), exist_ok=True)


for _spec in SPECS.values():
    register(_spec)
modeling_context_pruned.UPLOAD_CHECKS.append(refuse_upload)

__all__ = [
    "PREFIX",
    "SPECS",
    "ArchSpec",
    "ContextPrunedConfigMixin",
    "ContextPrunedModelMixin",
    "auto_map",
    "config_class",
    "model_class",
    "register",
]
