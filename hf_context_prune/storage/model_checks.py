"""Checks of a model before and after its weights are read: the sizes in its config, the tensors in its files."""

from __future__ import annotations

import copy
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from hf_context_prune.errors import LoadError, LoadWarning
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.configuration_context_pruned import MAX_LAYERS
from hf_context_prune.modeling.experts import num_groups
from hf_context_prune.modeling.geometry import experts_of, has_experts, neurons_of, read_head_dim
from hf_context_prune.modeling.registry import class_of
from hf_context_prune.modeling.spec_parts import Experts
from hf_context_prune.modeling.specs import ArchSpec
from hf_context_prune.modeling.weights_header import FLOATS, check_header, format_names, read_header
from hf_context_prune.modeling.wrapper_specs import WrapperSpec
from hf_context_prune.modeling.wrappers import wrapper_spec
from hf_context_prune.utils.files import open_regular
from hf_context_prune.utils.links import resolve_inside
from hf_context_prune.utils.reading import MAX_JSON_BYTES
from hf_context_prune.utils.upload_check import is_allowed

RESTORE = "Restore the config.json that was saved with the weights, or download the model again."
MAX_SIZE = 2**24
"""Largest width, vocabulary or number of positions that a config may give; those of published models are smaller."""
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
_MAX_TOKENIZER_BYTES = 256 * 2**20
_COPIED, _NOT_COPIED = (".json", ".jinja", ".txt", ".model"), ("tokenizer.json", ".index.json")


def check_links(folder: Path) -> None:
    """Refuse configs and chat templates that lead out of a folder: saving the model would copy what they say.

    Weights and ``tokenizer.json``, which people link to save space, hold nothing else that could be read as such.

    Raises:
        LoadError: See [`resolve_inside`][].
    """
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        name = path.relative_to(folder).as_posix()
        copied = is_allowed(name, "model") and path.suffix in _COPIED and not name.endswith(_NOT_COPIED)
        if copied and not path.is_dir():
            resolve_inside(folder, name)


def check_files(folder: Path) -> None:
    """Refuse pipes, devices and huge files where `transformers` expects small ones, which it would read whole.

    Raises:
        LoadError: With the file, and how large it may be.
    """
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if path.suffix not in _COPIED or path.is_dir():
            continue
        most = _MAX_TOKENIZER_BYTES if path.name in _TOKENIZERS or path.suffix == ".model" else MAX_JSON_BYTES
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise LoadError(f"{path} can't be read: {error.strerror}. Restore the file, or remove it.") from error
        if size > most:
            raise LoadError(f"{path} has {size:,} bytes; at most {most:,} are read. Restore the file, or remove it.")


def list_size_fields(spec: ArchSpec) -> list[str]:
    """Return the names of the config fields that hold a size."""
    fields = ("hidden_size", "num_hidden_layers", "vocab_size", "head_dim", "max_position_embeddings")
    return [field for field in (*fields, spec.width, spec.query_heads, spec.kv_heads) if field]


def check_size(field: str, value: object, most: int = MAX_SIZE) -> None:
    """Refuse a size that is not an integer from 1 to `most`.

    Raises:
        LoadError: The value is something else; the message has the field and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        shown = repr(value)[:80]
        raise LoadError(
            f"The model config gives {field} = {shown}; it must be an integer from 1 to {most:,}. {RESTORE}"
        )


def check_sizes(config: PreTrainedConfig, spec: ArchSpec) -> None:
    """Refuse sizes that no model can have, before a model is built.

    Args:
        config: A native or variable-width config.
        spec: Its architecture.

    Raises:
        LoadError: A size is not an integer, below 1 or above `MAX_SIZE`, or head counts don't fit together.
    """
    check_size("num_hidden_layers", getattr(config, "num_hidden_layers", None), MAX_LAYERS)
    for field in ("hidden_size", "vocab_size"):
        check_size(field, getattr(config, field, None))
    head_dim = read_head_dim(config)
    for field, value in (("head_dim", head_dim), ("max_position_embeddings", config.max_position_embeddings)):
        if value is not None:
            check_size(field, value)
    if spec.experts is not None:
        _check_experts(config, spec.experts)
    for index in range(config.num_hidden_layers):
        layer = config.per_layer_config[index]
        if spec.experts is not None and has_experts(layer, spec, index):
            check_size(f"{spec.experts.count} of layer {index}", experts_of(layer, spec, index))
        else:
            check_size(f"{spec.width} of layer {index}", neurons_of(layer, spec, index))
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


def _check_experts(config: PreTrainedConfig, experts: Experts) -> None:
    """Refuse values that say nothing, or nothing possible, of a mixture of experts.

    Raises:
        LoadError: The message has the field and the value.
    """
    for field in (experts.per_token, *experts.groups, *filter(None, (experts.interval,))):
        check_size(field, getattr(config, field))
    per_layer = [getattr(config.per_layer_config[index], experts.count) for index in range(config.num_hidden_layers)]
    values = [(experts.count, value) for value in per_layer]
    values += [(field, getattr(config, field)) for field in (experts.first, experts.last) if field is not None]
    if experts.dense_layers is not None:
        listed = getattr(config, experts.dense_layers)
        values += [(experts.dense_layers, one) for one in (listed if isinstance(listed, list | tuple) else [listed])]
    for field, value in values:
        if type(value) is not int or not 0 <= value <= MAX_SIZE:
            raise LoadError(
                f"The model config gives {field} = {value!r:.80}; it must be an integer from 0 to {MAX_SIZE:,}. "
                f"{RESTORE}"
            )
    fewest, groups = min(per_layer), num_groups(config, experts)
    if fewest and (getattr(config, experts.per_token) > fewest or any(total % groups for total in per_layer)):
        raise LoadError(
            f"The model config gives {experts.count} = {fewest} with {experts.per_token} = "
            f"{getattr(config, experts.per_token)} in {groups} group{'s' if groups > 1 else ''}; there must be at "
            f"least as many experts, and as many in every group. {RESTORE}"
        )


def _entry_of(config: PreTrainedConfig) -> ArchSpec | WrapperSpec:
    return wrapper_spec(config) or spec_of(config)


def model_class_of(config: PreTrainedConfig) -> type[Any]:
    """Return the class that loads a model of this config, native or of variable width."""
    return class_of(config, _entry_of(config))


def check_weights(folder: Path, config: PreTrainedConfig) -> None:
    """Compare a config with the safetensors headers, before transformers allocates wrong sizes.

    Args:
        folder: Folder of the config and the weights.
        config: The model's config.

    Raises:
        LoadError: Config and weights don't belong together, or the weights are quantised without a word of it.
    """
    try:
        tensors = check_header(str(folder), _entry_of(config), config, model_class_of(config))
    except ValueError as error:
        raise LoadError(f"{folder.name} can't be loaded: {error}") from error
    packed = {name for name, info in tensors.items() if name.endswith(".weight") and info.dtype not in FLOATS}
    if packed:
        raise LoadError(
            f"{folder.name} can't be loaded: {format_names(packed)} are not floating-point weights "
            f"({tensors[min(packed)].dtype}), and the config does not say how they are quantised. Use the model that "
            f"they were quantised from."
        )


def has_own_head(folder: Path, config: PreTrainedConfig) -> bool:
    """Return whether the files hold an LM head whose values differ from the embedding's, whatever the config says.

    As in `from_pretrained`, such a head is not tied. It is the tensor of the embedding's shape that is no tensor of a
    tied model; only these two are read.

    Args:
        folder: A folder whose weights [`check_weights`][] has compared with the config.
        config: The model's config.
    """
    with torch.device("meta"):
        model = model_class_of(config)(copy.deepcopy(config))
    prefix, embedding = f"{model.base_model_prefix}.", model.get_input_embeddings().weight
    names = {name for name, parameter in model.named_parameters()}  # without the head, if it is tied
    (own,) = {name for name, parameter in model.named_parameters() if parameter is embedding}
    known = names | {name.removeprefix(prefix) for name in names}
    heads: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in (own, own.removeprefix(prefix)):
                    rows.append(file.get_tensor(name))
                elif name not in known and list(file.get_slice(name).get_shape()) == list(embedding.shape):
                    heads.append(file.get_tensor(name))
    return bool(rows) and any(not torch.equal(rows[0], head) for head in heads)


def warn_of_rounding(folder: Path, model: PreTrainedModel) -> None:
    """Say which tensors of a checkpoint with several dtypes were rounded on loading.

    A loaded model has one dtype, but for parameters to which its class gives another.

    Warns:
        LoadWarning: Names them.
    """
    tensors = read_header(str(folder), getattr(model.config, "transformers_weights", None))
    inside = {name: parameter.dtype for name, parameter in model.named_parameters()}
    rounded = {
        name
        for name, info in tensors.items()
        if info.dtype in FLOATS
        and torch.promote_types(FLOATS[info.dtype], kept := inside.get(name, model.dtype)) != kept
    }
    if rounded and len(rounded) < len(tensors):
        warnings.warn(
            f"{folder.name} holds {format_names(rounded)} in another precision than its other weights; all are loaded "
            f"as {str(model.dtype).removeprefix('torch.')}. To lose nothing, load with dtype='float32'.",
            LoadWarning,
            stacklevel=2,
        )


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
        raise LoadError(f"The weights lack {format_names(missing)}, which the model needs. {remedy}")
    if mismatched := info["mismatched_keys"]:
        shapes = {f"{name} ({list(saved)}, the config asks for {list(asked)})" for name, saved, asked in mismatched}
        raise LoadError(f"The weights have other shapes than the model: {format_names(shapes)}. {remedy}")
    places, count = _entry_of(config).saved_layers, config.get_text_config().num_hidden_layers
    pattern = re.compile(rf"(?:{'|'.join(map(re.escape, places))})\.(\d+)\.")
    unexpected = set(info["unexpected_keys"])
    beyond = {name for name in unexpected if (found := pattern.match(name)) and int(found[1]) >= count}
    if beyond:
        raise LoadError(
            f"The weights hold {format_names(beyond)}, of layers that the model does not have: num_hidden_layers is "
            f"{count}. {remedy}"
        )
    if unexpected:
        warnings.warn(
            f"The weights of {source!r} hold {format_names(unexpected)}, which a {config.model_type} model does not "
            f"use; a model saved from this one does not contain these tensors.",
            LoadWarning,
            stacklevel=2,
        )
