"""The tensors that the safetensors headers of a folder list, compared with those that its config asks for.

This file travels with every saved variable-width model, so it imports nothing of the package but such files.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from huggingface_hub import get_local_safetensors_metadata

from .specs import ArchSpec
from .wrapper_specs import WrapperSpec

MAX_HEADER_BYTES = 8_000_000
"""Most bytes of all safetensors headers of a model together; a thousand layers need about two million."""
_IN_LAYER = re.compile(r"(\D*\.\d+)\.")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types in which a safetensors file holds weights that are not quantised."""


def list_shards(index: str) -> list[str]:
    """Return the names of the shards in a ``model.safetensors.index.json``.

    Raises:
        ValueError: The file is too large or no index, or a name leads out of its folder.
    """
    if (size := os.path.getsize(index)) > MAX_HEADER_BYTES:
        raise ValueError(f"{index} has {size:,} bytes; an index of shards has at most {MAX_HEADER_BYTES:,}.")
    try:
        with open(index, encoding="utf-8") as file:
            names = set(json.load(file)["weight_map"].values())
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{index} is not an index of shards ({type(error).__name__}). Download or save the model again."
        ) from error
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the shard {str(name)[:200]!r}; a shard must be a .safetensors file in the same folder."
            )
    return sorted(names)


def read_header(folder: str, weights: str | None = None) -> dict[str, Any]:
    """Return the shape and dtype of every tensor in a folder's safetensors headers, by name.

    Args:
        folder: A local model folder.
        weights: The file, or the index of shards, that the config names (``transformers_weights``); None: the usual.

    Returns:
        `TensorInfo` by name; empty where the folder has no safetensors file that `from_pretrained` would open.

    Raises:
        ValueError: A shard is missing or a file is damaged, or a header is longer than that of any model.
    """
    choices = (weights,) if weights else ("model.safetensors", "model.safetensors.index.json")
    name = next((name for name in choices if os.path.isfile(os.path.join(folder, name))), None)
    if name is None:
        return {}
    if os.path.basename(name) != name:
        raise ValueError(f"transformers_weights is {name!r}; it must name a file in the model folder.")
    names = list_shards(os.path.join(folder, name)) if name.endswith(".index.json") else [name]
    total, tensors = 0, {}
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise ValueError(f"the shard {name}, which the index names, is missing. Download or save the model again.")
        with open(path, "rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        total += header
        if total > MAX_HEADER_BYTES:
            raise ValueError(
                f"the header of {name} is longer than {MAX_HEADER_BYTES:,} bytes, so {name} is no safetensors file of "
                f"a model. Download or save the model again."
            )
        try:
            found = get_local_safetensors_metadata(path).files_metadata[name].tensors
            end = header + max((tensor.data_offsets[1] for tensor in found.values()), default=0)
        except Exception as error:  # what a damaged header raises depends on where it is damaged
            raise ValueError(
                f"the header of {name} is damaged ({type(error).__name__}). Download or save the model again."
            ) from error
        if (size := os.path.getsize(path)) < end:
            raise ValueError(
                f"{name} has {size:,} bytes, but its header lists tensors up to byte {end:,}: the file was cut. "
                f"Download or save the model again."
            )
        tensors.update(found)
    return tensors


def format_names(names: Collection[str]) -> str:
    """Return the first few names, and the number of the rest."""
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more ({len(names)} tensors)"


def check_header(
    folder: str,
    spec: ArchSpec | WrapperSpec,
    config: Any,  # noqa: ANN401
    model_class: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Compare the tensors that a config asks for with the safetensors headers, before any weight is read.

    The model is built on the meta device for that, which needs no memory for weights.

    Args:
        folder: A local model folder; nothing is compared where it holds no safetensors file.
        spec: The architecture.
        config: The model's config.
        model_class: The class that the model is loaded with.

    Returns:
        The tensors of the headers, as from [`read_header`][].

    Raises:
        ValueError: Config and weights differ in the number of layers, or a tensor is missing or of another shape.
    """
    tensors = read_header(folder, getattr(config, "transformers_weights", None))
    if not tensors:
        return tensors  # from_pretrained reports that
    files = os.path.basename(os.path.normpath(folder))
    remedy = (
        "the config does not belong to these weights, or one of them is damaged. Restore the config.json that was "
        "saved with them, or download or save the model again."
    )
    places = (*spec.saved_layers, f"{model_class.base_model_prefix}.{spec.layers}")  # or read by a class without a head
    layers = next((one for one in places if one and any(name.startswith(f"{one}.") for name in tensors)), spec.layers)
    passed_over = [re.compile(one) for one in model_class._keys_to_ignore_on_load_unexpected or ()]  # extra heads
    inside = [name for name in tensors if name.startswith(f"{layers}.")]
    inside = [name for name in inside if not any(pattern.search(name) for pattern in passed_over)]
    numbers = {name[len(layers) + 1 :].partition(".")[0] for name in inside}
    present = {int(number) for number in numbers if number.isdecimal()}
    count = config.get_text_config().num_hidden_layers
    if beyond := sorted(number for number in present if number >= count):
        raise ValueError(
            f"config.json gives {count} layers, but the weights in {files} also have layer "
            f"{', '.join(map(str, beyond[:3]))}{' and more' if len(beyond) > 3 else ''}: {remedy}"
        )
    if len(present) < count:
        raise ValueError(
            f"config.json gives {count} layers, but the weights in {files} have {len(present)} of them: {remedy}"
        )
    try:
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config))
    except Exception as error:  # of a wrong value: by its type and place, any
        said = str(error).partition("\n")[0][:300]
        raise ValueError(
            f"no model can be built from config.json ({type(error).__name__}: {said}): {remedy}"
        ) from error
    missing, other = _compare(model, tensors, packed=getattr(config, "quantization_config", None) is not None)
    if missing:
        raise ValueError(f"config.json asks for {format_names(missing)}, which the weights in {files} lack: {remedy}")
    if other:
        raise ValueError(f"the weights in {files} hold {format_names(other)}: {remedy}")
    if (tables := sum(buffer.numel() for buffer in model.buffers())) > model.num_parameters():
        raise ValueError(f"config.json asks for tables of {tables:,} numbers, more than there are weights: {remedy}")
    return tensors


def _compare(model: Any, tensors: dict[str, Any], *, packed: bool) -> tuple[list[str], list[str]]:  # noqa: ANN401
    """Return the tensors of a model that the files lack, and those that have another shape there, with both shapes.

    `from_pretrained` renames some tensors and joins others (experts that were saved one by one). So one may be absent
    if the files hold another that the model does not know, of the same shape; and several of a layer, if those of the
    layer that the model does not know hold as many numbers. Quantised (`packed`) tensors have other names and shapes,
    and are not compared.
    """
    prefix, expected = f"{model.base_model_prefix}.", model.state_dict()
    names = {
        name: next((one for one in (name, prefix + name) if one in tensors), name.removeprefix(prefix))
        for name in expected
    }
    for target, source in model.all_tied_weights_keys.items():  # one of the two is enough
        names[source] = names[source] if names[source] in tensors else names[target]
        if names[target] not in tensors:
            del names[target]
    unknown = {name: list(tensors[name].shape) for name in tensors.keys() - set(names.values())}
    missing, other = [], []
    for name, saved in names.items():
        info, shape = tensors.get(saved), list(expected[name].shape)
        renamed = next((one for one, there in unknown.items() if there == shape), None) if info is None else None
        if renamed is not None:
            del unknown[renamed]
        elif info is None and not packed:
            missing.append(name)
        elif info is not None and list(info.shape) != shape and not (packed and info.dtype not in FLOATS):
            other.append(f"{name} ({list(info.shape)}, the config asks for {shape})")
    wanted: dict[str | None, int] = Counter()
    for name in missing:
        wanted[_layer_of(name, prefix)] += expected[name].numel()
    there: dict[str | None, int] = Counter()
    for name, shape in unknown.items():
        there[_layer_of(name, prefix)] += math.prod(shape)
    joined = {layer for layer, count in wanted.items() if layer is not None and count == there[layer]}
    return [name for name in missing if _layer_of(name, prefix) not in joined], other


def _layer_of(name: str, prefix: str) -> str | None:
    """Return the path of the layer that a tensor belongs to, without the head's prefix; None where it is in none."""
    found = _IN_LAYER.match(name.removeprefix(prefix))
    return found and found.group(1)
