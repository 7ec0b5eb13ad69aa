"""Variable-width causal LMs: ``ContextPruned<Base>ForCausalLM`` for every entry of the table.

A model is built by the native class with the dense widths (free under `from_pretrained`, which builds on the meta
device), then every layer is narrowed to its own widths. The forward code is the native class's, unchanged.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import transformers
from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from torch import nn

from . import configuration_context_pruned
from .configuration_context_pruned import config_class_name
from .specs import SPECS, ArchSpec, Geometry, LayerWidths, classes_on_demand, read_geometry

MODELING_FILES = ("configuration_context_pruned.py", "modeling_context_pruned.py", "specs.py")
"""Files that are copied, without subfolders, beside every saved variable-width model."""
UPLOAD_CHECKS: list[Callable[[Any, str | None], None]] = []
"""Functions that `push_to_hub` calls with the saved folder and the token before it uploads. Importing the package fills
this list; where these files are used without the package, the list stays empty."""


def model_class_name(spec: ArchSpec) -> str:
    """Return the name of the variable-width model class, such as ``ContextPrunedLlamaForCausalLM``."""
    return f"ContextPruned{spec.model_class}"


def is_transposed(module: nn.Module) -> bool:
    """Return whether a projection stores its weight as [in_features, out_features] (`Conv1D` of GPT-2)."""
    return isinstance(module, transformers.pytorch_utils.Conv1D)


def narrow_projection(module: nn.Module, *, in_features: int | None = None, out_features: int | None = None) -> None:
    """Cut a projection down to its first features, in place; on the meta device this costs nothing.

    Args:
        module: An `nn.Linear` or `Conv1D`.
        in_features: New number of input features; None keeps them.
        out_features: New number of output features; None keeps them.
    """
    weight = module.weight.data
    rows, columns = (in_features, out_features) if is_transposed(module) else (out_features, in_features)
    module.weight = nn.Parameter(weight[:rows, :columns].clone(), requires_grad=module.weight.requires_grad)
    if out_features is not None and module.bias is not None:
        module.bias = nn.Parameter(module.bias.data[:out_features].clone(), requires_grad=module.bias.requires_grad)
    names = ("nx", "nf") if is_transposed(module) else ("in_features", "out_features")
    for name, value in zip(names, (in_features, out_features), strict=True):
        if value is not None:
            setattr(module, name, value)


def set_attention_sizes(layer: nn.Module, spec: ArchSpec, geometry: Geometry, kv_groups: int) -> None:
    """Set the size attributes that the attention module keeps beside its projections (OPT, GPT-2)."""
    heads = kv_groups * geometry.queries_per_group
    sizes = {"heads": heads, "features": heads * geometry.head_dim}
    for attribute, size in spec.attention_attributes:
        setattr(layer.get_submodule(spec.attention), attribute, sizes[size])


def narrow_layer(layer: nn.Module, spec: ArchSpec, geometry: Geometry, dense: LayerWidths, target: LayerWidths) -> None:
    """Narrow one decoder layer from the dense to the target widths, in place."""
    if target.neurons != dense.neurons:
        for path in spec.mlp_inputs:
            narrow_projection(layer.get_submodule(path), out_features=target.neurons)
        narrow_projection(layer.get_submodule(spec.mlp_output), in_features=target.neurons)
    if target.kv_groups != dense.kv_groups:
        query_features = target.kv_groups * geometry.queries_per_group * geometry.head_dim
        for projection in spec.attention_inputs:
            kept = geometry.projection_features(projection, range(target.kv_groups), dense.kv_groups)
            narrow_projection(layer.get_submodule(projection.path), out_features=len(kept))
        narrow_projection(layer.get_submodule(spec.attention_output), in_features=query_features)
        set_attention_sizes(layer, spec, geometry, target.kv_groups)


def check_header(folder: str, spec: ArchSpec, geometry: Geometry) -> None:
    """Compare the config's widths with the shapes in the safetensors headers, before any weight is read.

    Args:
        folder: A local model folder.
        spec: The architecture.
        geometry: Sizes from the config.

    Raises:
        ValueError: A layer of the config is wider or narrower than its weights or has no weights, or there are weights
            of layers that the config does not have.
    """
    try:
        metadata = get_local_safetensors_metadata(folder)
    except NotASafetensorsRepoError:
        return  # no safetensors here: from_pretrained reports that
    shapes = {name: info.shape for file in metadata.files_metadata.values() for name, info in file.tensors.items()}
    layers = spec.layers
    if not any(name.startswith(f"{layers}.") for name in shapes):
        layers = layers.partition(".")[2]  # saved without the head's prefix, as the first GPT-2 was
    present = {name.rpartition(".")[0] for name in shapes if not name.endswith(".bias")}  # .weight, or quantised parts
    files = os.path.basename(os.path.normpath(folder))
    remedy = (
        "the config does not belong to these weights, or one of them is damaged. Restore the config.json that was "
        "saved with them, or download or save the model again."
    )
    paths = (*spec.mlp_inputs, *(projection.path for projection in spec.attention_inputs))
    for index, widths in enumerate(geometry.layers):
        query_features = widths.kv_groups * geometry.queries_per_group * geometry.head_dim
        expected = {spec.mlp_output: widths.neurons, spec.attention_output: query_features}
        for path in (*paths, *expected):
            if f"{layers}.{index}.{path}" not in present:
                raise ValueError(
                    f"config.json gives {len(geometry.layers)} layers, but {layers}.{index}.{path}.weight is not among "
                    f"the {len(shapes)} weights in {files}: {remedy}"
                )
        for path, features in expected.items():
            name = f"{layers}.{index}.{path}.weight"
            if name in shapes and features != shapes[name][0 if spec.transposed else 1]:
                raise ValueError(
                    f"config.json gives layer {index} {features} input features for {path}, but the weights in "
                    f"{files} have shape {list(shapes[name])}: {remedy}"
                )
    numbers = {name[len(layers) + 1 :].partition(".")[0] for name in shapes if name.startswith(f"{layers}.")}
    beyond = sorted(int(number) for number in numbers if number.isdecimal() and int(number) >= len(geometry.layers))
    if beyond:
        raise ValueError(
            f"config.json gives {len(geometry.layers)} layers, but the weights in {files} also have layer "
            f"{', '.join(map(str, beyond[:3]))}{' and more' if len(beyond) > 3 else ''}: {remedy}"
        )


def add_companions(source: str, target: str) -> None:
    """Copy card, plan, report and tokenizer from the folder that a model came from, if the weights are unchanged.

    These files describe exactly the weights beside them, so a model that was changed since gets none of them.

    Args:
        source: Where the model was loaded from or saved to; ignored unless it is a folder with a manifest.
        target: A folder into which the model was just saved.
    """
    manifest_file = os.path.join(source, "manifest.json")
    if not os.path.isfile(manifest_file):
        return
    with open(manifest_file, encoding="utf-8") as file:
        files = json.load(file).get("files", {})
    sums = {name: files[name]["sha256"] for name in files if _is_as_saved(source, name, files[name]["sha256"])}
    saved = {name: _sha256(os.path.join(target, name)) for name in os.listdir(target) if name.endswith(".safetensors")}
    if saved != {name: total for name, total in sums.items() if name.endswith(".safetensors")}:
        return
    for name in sums:
        path = os.path.join(target, name)
        if name == "README.md" or not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            shutil.copyfile(os.path.join(source, name), path)
    if len(sums) < len(files):
        return
    if all(name == "README.md" or _sha256(os.path.join(target, name)) == total for name, total in sums.items()):
        shutil.copyfile(manifest_file, os.path.join(target, "manifest.json"))


def _is_as_saved(folder: str, name: str, sha256: str) -> bool:
    """Return whether a listed file may be copied: it lies in the folder and is unchanged (the card may be edited)."""
    path = os.path.join(folder, name)
    if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or not os.path.isfile(path):
        return False
    return (name == "README.md" and not os.path.islink(path)) or _sha256(path) == sha256


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ContextPrunedModelMixin:
    """Build the native model with dense widths, then narrow every layer to its own widths."""

    spec: ArchSpec
    config_class: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        target = read_geometry(config, self.spec)
        overrides = config.width_overrides()
        config.per_layer_config = None
        try:
            dense = read_geometry(config, self.spec)
            dense_config = copy.deepcopy(config)
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            config.per_layer_config = overrides
        layers = self.get_submodule(self.spec.layers)  # type: ignore[attr-defined]
        for layer, dense_widths, widths in zip(layers, dense.layers, target.layers, strict=True):
            narrow_layer(layer, self.spec, dense, dense_widths, widths)
        for module in self.modules():  # type: ignore[attr-defined]
            # Rotary tables need only head_dim, but derive it from head counts, which are ambiguous once they vary.
            if "RotaryEmbedding" in type(module).__name__ and hasattr(module, "config"):
                module.config = dense_config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Load like `PreTrainedModel.from_pretrained`, after comparing a local folder's widths with its weights."""
        folder = str(pretrained_model_name_or_path)
        if os.path.isdir(folder):
            config = kwargs.get("config")
            if config is None:
                config = cls.config_class.from_pretrained(folder)
            check_header(folder, cls.spec, read_geometry(config, cls.spec))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Save like `PreTrainedModel.save_pretrained`, and copy the modeling files that ``auto_map`` names."""
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        here = os.path.dirname(os.path.abspath(__file__))
        for name in MODELING_FILES:
            if os.path.abspath(save_directory) != here:
                shutil.copyfile(os.path.join(here, name), os.path.join(save_directory, name))
        return result

    def _get_name(self) -> str:
        """Return the native class's name, by which `Trainer` decides to shift labels before it smooths them."""
        return self.spec.model_class

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Upload the saved model for `push_to_hub`, with the companion files of the folder that the model came from.

        Where the package is installed, the checks in `UPLOAD_CHECKS` inspect the files first.
        """
        add_companions(str(self.name_or_path), str(working_dir))  # type: ignore[attr-defined]
        for check in UPLOAD_CHECKS:
            check(working_dir, kwargs.get("token"))
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


def _make(spec: ArchSpec) -> type:
    parent = getattr(transformers, spec.model_class)
    config_class = getattr(configuration_context_pruned, config_class_name(spec))
    name = model_class_name(spec)
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"Variable-width {spec.model_type} causal LM: `{spec.model_class}` with per-layer widths.",
        "spec": spec,
        "config_class": config_class,
        "__annotations__": {"config": config_class},
    }
    return type(name, (ContextPrunedModelMixin, parent), namespace)


_SPEC_BY_NAME = {model_class_name(spec): spec for spec in SPECS.values()}
__getattr__ = classes_on_demand(__name__, _SPEC_BY_NAME, _make)


def __dir__() -> list[str]:
    return sorted([*globals(), *_SPEC_BY_NAME])
