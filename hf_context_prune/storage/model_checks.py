"""Checks of a model before and after its weights are read: the sizes in its config, the tensors in its files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_context_prune.errors import LoadError, LoadWarning
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.modeling_context_pruned import check_header
from hf_context_prune.modeling.specs import ArchSpec, neurons_of, read_geometry

RESTORE = "Restore the config.json that was saved with the weights, or download the model again."
_SHOWN = 3


def list_size_fields(spec: ArchSpec) -> list[str]:
    """Return the names of the config fields that hold a size."""
    fields = ("hidden_size", "num_hidden_layers", "vocab_size", "head_dim", spec.width, spec.query_heads, spec.kv_heads)
    return [field for field in fields if field]


def check_size(field: str, value: object) -> None:
    """Refuse a size that is not an integer of at least 1.

    Raises:
        LoadError: The value is something else; the message has the field and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LoadError(f"The model config gives {field} = {value!r}; it must be an integer of at least 1. {RESTORE}")


def check_sizes(config: PreTrainedConfig, spec: ArchSpec) -> None:
    """Refuse sizes that no model can have, before a model is built.

    Args:
        config: A native or variable-width config.
        spec: Its architecture.

    Raises:
        LoadError: A size is not an integer or below 1, or head counts don't fit together.
    """
    for field in ("hidden_size", "num_hidden_layers", "vocab_size"):
        check_size(field, getattr(config, field, None))
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        check_size("head_dim", head_dim)
    for index in range(config.num_hidden_layers):
        layer = config.per_layer_config[index]
        check_size(f"{spec.width} of layer {index}", neurons_of(layer, spec))
        heads = getattr(layer, spec.query_heads)
        check_size(f"{spec.query_heads} of layer {index}", heads)
        if head_dim is None and config.hidden_size % heads:
            raise LoadError(
                f"The model config gives {spec.query_heads} = {heads} in layer {index} with hidden_size = "
                f"{config.hidden_size}; without head_dim, the hidden size must be a multiple of the heads. {RESTORE}"
            )
        if spec.kv_heads:
            groups = getattr(layer, spec.kv_heads)
            check_size(f"{spec.kv_heads} of layer {index}", groups)
            if heads % groups:
                raise LoadError(
                    f"The model config gives {spec.query_heads} = {heads} and {spec.kv_heads} = {groups} in layer "
                    f"{index}; the query heads must be a multiple of the key/value heads. {RESTORE}"
                )


def check_weights(folder: Path, config: PreTrainedConfig, *, sharded: bool) -> None:
    """Compare the layers' widths with the safetensors headers, before transformers allocates wrong sizes.

    Args:
        folder: Folder of the config and the weights.
        config: The model's config.
        sharded: Whether the shards, if there are any, are in the folder.

    Raises:
        LoadError: A width does not fit the weights.
    """
    if hasattr(config, "quantization_config") or not (sharded or (folder / SAFE_WEIGHTS_NAME).is_file()):
        return  # packed shapes, or shards on the Hub that are not fetched yet
    spec = spec_of(config)
    try:
        check_header(str(folder), spec, read_geometry(config, spec))
    except ValueError as error:
        raise LoadError(f"{folder.name} can't be loaded: {error}") from error


def check_complete(source: str, config: PreTrainedConfig, info: dict[str, Any]) -> None:
    """Refuse a model that does not consist of the tensors in its files.

    Args:
        source: Path or Hub id of the model.
        config: The model's config.
        info: Returned by `from_pretrained` with ``output_loading_info``; tied tensors do not count as missing.

    Raises:
        LoadError: Tensors are missing, have another shape, or belong to layers that the model does not have.

    Warns:
        LoadWarning: The files hold other tensors that the model does not use.
    """
    remedy = (
        f"The weights and config.json of {source!r} don't belong together, or one of them is damaged: download or save "
        f"the model again."
    )
    if missing := info["missing_keys"]:
        raise LoadError(f"The weights lack {_format_names(missing)}, which the model needs. {remedy}")
    if mismatched := info["mismatched_keys"]:
        shapes = {f"{name} ({list(saved)}, the config asks for {list(asked)})" for name, saved, asked in mismatched}
        raise LoadError(f"The weights have other shapes than the model: {_format_names(shapes)}. {remedy}")
    layers = spec_of(config).layers
    pattern = re.compile(rf"(?:{re.escape(layers)}|{re.escape(layers.partition('.')[2])})\.(\d+)\.")
    unexpected = set(info["unexpected_keys"])
    beyond = {
        name for name in unexpected if (found := pattern.match(name)) and int(found[1]) >= config.num_hidden_layers
    }
    if beyond:
        raise LoadError(
            f"The weights hold {_format_names(beyond)}, of layers that the model does not have: num_hidden_layers is "
            f"{config.num_hidden_layers}. {remedy}"
        )
    if unexpected:
        warnings.warn(
            f"The weights of {source!r} hold {_format_names(unexpected)}, which a {config.model_type} model does not "
            f"use; a model saved from this one does not contain these tensors.",
            LoadWarning,
            stacklevel=2,
        )


def _format_names(names: Collection[str]) -> str:
    """Return the first few names, and the number of the rest."""
    first = ", ".join(sorted(names)[:_SHOWN])
    return first if len(names) <= _SHOWN else f"{first} and {len(names) - _SHOWN} more ({len(names)} tensors)"
