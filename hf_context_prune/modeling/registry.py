"""Registration of the variable-width classes with the auto classes of `transformers`."""

from __future__ import annotations

import sys
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from hf_context_prune.utils.upload_check import refuse_upload

from . import configuration_context_pruned, modeling_context_pruned
from .configuration_context_pruned import config_class_name
from .modeling_context_pruned import model_class_name
from .specs import PREFIX, SPECS, TEXT_SPECS, WRAPPERS, ArchSpec, WrapperSpec


def get_config_class(spec: ArchSpec | WrapperSpec) -> type[PreTrainedConfig]:
    """Return the variable-width config class of an architecture."""
    return getattr(configuration_context_pruned, config_class_name(spec))


def get_model_class(spec: ArchSpec | WrapperSpec) -> type[Any]:
    """Return the variable-width model class of an architecture, of its `headless` entry, or of a wrapper."""
    return getattr(modeling_context_pruned, model_class_name(spec))


def build_auto_map(spec: ArchSpec | WrapperSpec) -> dict[str, str]:
    """Return the ``auto_map`` entry of config.json: the file and class that remote code loads."""
    if isinstance(spec, WrapperSpec):
        return {
            "AutoConfig": f"configuration_context_pruned.{config_class_name(spec)}",
            "AutoModelForImageTextToText": f"modeling_context_pruned.{model_class_name(spec)}",
        }
    return {
        "AutoConfig": f"configuration_context_pruned.{config_class_name(spec)}",
        "AutoModel": f"modeling_context_pruned.{model_class_name(spec.headless())}",
        "AutoModelForCausalLM": f"modeling_context_pruned.{model_class_name(spec)}",
    }


def register_classes() -> None:
    """Register every variable-width architecture, and the check of files before a model's own ``push_to_hub``.

    Importing the package `hf_context_prune.modeling` does so.
    """
    for spec in SPECS.values():
        AutoConfig.register(PREFIX + spec.model_type, get_config_class(spec), exist_ok=True)
        AutoModel.register(get_config_class(spec), get_model_class(spec.headless()), exist_ok=True)
        AutoModelForCausalLM.register(get_config_class(spec), get_model_class(spec), exist_ok=True)
    for spec in TEXT_SPECS.values():
        AutoConfig.register(PREFIX + spec.model_type, get_config_class(spec), exist_ok=True)
        AutoModel.register(get_config_class(spec), get_model_class(spec.headless()), exist_ok=True)
    for wrapper in WRAPPERS.values():
        AutoConfig.register(PREFIX + wrapper.model_type, get_config_class(wrapper), exist_ok=True)
        AutoModelForImageTextToText.register(get_config_class(wrapper), get_model_class(wrapper), exist_ok=True)
    if refuse_upload not in modeling_context_pruned.UPLOAD_CHECKS:
        modeling_context_pruned.UPLOAD_CHECKS.append(refuse_upload)


def expose_classes() -> None:
    """Let programs find the model classes that look for them in `transformers`: its own server, and vLLM.

    vLLM calls this in each of its processes (``vllm.general_plugins``).
    """
    # While `transformers` is first imported, its name stands for a module that another one replaces at the end.
    library = sys.modules["transformers"]
    for spec in SPECS.values():
        setattr(library, model_class_name(spec), get_model_class(spec))
    for wrapper in WRAPPERS.values():
        setattr(library, model_class_name(wrapper), get_model_class(wrapper))
