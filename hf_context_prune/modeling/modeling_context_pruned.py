"""Variable-width causal LMs: ``ContextPruned<Base>ForCausalLM`` for every entry of the table.

``ContextPruned<Base>Model`` is the same without an LM head: servers such as vLLM, which have their own, build it by
`AutoModel`.

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
from torch import nn

from . import configuration_context_pruned
from .configuration_context_pruned import (
    classes_on_demand,
    config_class_name,
    config_of_memory,
    dense_widths,
    native_class,
    refuse_other_code,
    write_entry,
)
from .geometry import Geometry, LayerWidths, read_geometry
from .specs import PREFIX, SPECS, ArchSpec, bare_name
from .weights_header import check_header
from .wrapper_specs import TEXT_SPECS, WRAPPERS, WrapperSpec

REGISTERED_FILE = "registered.py"
"""The modeling file that holds the entry of a registered architecture."""
MODELING_FILES = (
    *("configuration_context_pruned.py", "geometry.py", "modeling_context_pruned.py", "moe_specs.py", REGISTERED_FILE),
    *("spec_parts.py", "specs.py", "weights_header.py", "wrapper_specs.py"),
)
"""Files that are copied, without subfolders, beside every saved variable-width model."""
MOST_MANIFEST_BYTES = 16 * 2**20
"""Most bytes of a manifest that are read."""
UPLOAD_CHECKS: list[Callable[[Any, str | None], None]] = []
"""Functions that `push_to_hub` calls with the saved folder and the token before it uploads. Importing the package fills
this list; where these files are used without the package, the list stays empty."""


def model_class_name(spec: ArchSpec | WrapperSpec) -> str:
    """Return the name of the variable-width class of an entry, such as ``ContextPrunedLlamaForCausalLM``."""
    return f"ContextPruned{bare_name(spec.model_class)}"


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


class LayerConfig:
    """A model's config, but with the head counts of one layer: for attention modules that read them in every call.

    Everything else is read from the model's own config, so that a change of it (such as that of the attention
    implementation) reaches all layers.

    Args:
        config: The model's config.
        widths: Values of this layer, by attribute.
    """

    def __init__(self, config: Any, widths: dict[str, int]) -> None:  # noqa: ANN401
        self.__dict__.update(widths, base=config)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Return a value of the model's config."""
        if name == "base" or name.startswith("__"):  # while a copy is made, there is no config yet
            raise AttributeError(name)
        return getattr(self.base, name)


def set_attention_sizes(layer: nn.Module, spec: ArchSpec, geometry: Geometry, kv_groups: int, config: Any) -> None:  # noqa: ANN401
    """Set the sizes that the attention module keeps beside its projections (OPT, GPT-2, Phi-3)."""
    heads = kv_groups * geometry.queries_per_group
    counts = {spec.query_heads: heads} | ({spec.kv_heads: kv_groups} if spec.kv_heads else {})
    values = {
        "heads": heads,
        "groups": kv_groups,
        "features": heads * geometry.head_dim,
        "config": LayerConfig(config, counts),
    }
    for attribute, value in spec.attention_attributes:
        path, _, name = f"{spec.attention}.{attribute}".rpartition(".")
        setattr(layer.get_submodule(path), name, values[value])


def keep_experts(layer: nn.Module, spec: ArchSpec, count: int) -> None:
    """Cut a layer's router and experts down to the first experts, in place.

    Args:
        layer: One decoder layer with experts.
        spec: Its architecture.
        count: Experts that stay.
    """
    assert spec.experts is not None
    block = layer.get_submodule(spec.experts.block)
    for path, dimension in spec.experts.tensors:
        owner_path, _, name = path.rpartition(".")
        owner = block.get_submodule(owner_path)
        whole = getattr(owner, name, None)
        if whole is None:
            continue
        part = whole.data.narrow(dimension, 0, count).clone()
        kept = nn.Parameter(part, requires_grad=whole.requires_grad) if isinstance(whole, nn.Parameter) else part
        setattr(owner, name, kept)
    set_expert_count(block, count)


def set_expert_count(block: nn.Module, count: int) -> None:
    """Set the number of experts that modules of a mixture of experts keep beside their tensors."""
    for module in block.modules():
        if hasattr(module, "num_experts"):
            module.num_experts = count


def narrow_layer(
    layer: nn.Module,
    spec: ArchSpec,
    geometry: Geometry,
    dense: LayerWidths,
    target: LayerWidths,
    config: Any,  # noqa: ANN401
) -> None:
    """Narrow one decoder layer from the dense to the target widths, in place.

    Args:
        layer: The layer.
        spec: Its architecture.
        geometry: Sizes of the model.
        dense: Widths that the layer has.
        target: Widths that it gets.
        config: The model's config.
    """
    if target.neurons != dense.neurons:
        for path in spec.mlp_inputs:
            narrow_projection(layer.get_submodule(path), out_features=spec.mlp_blocks * target.neurons)
        narrow_projection(layer.get_submodule(spec.mlp_output), in_features=target.neurons)
    if target.experts != dense.experts:
        keep_experts(layer, spec, target.experts)
    if target.kv_groups != dense.kv_groups:
        query_features = target.kv_groups * geometry.queries_per_group * geometry.head_dim
        for projection in spec.attention_inputs:
            features = target.kv_groups * geometry.features_per_group(projection)
            narrow_projection(layer.get_submodule(projection.path), out_features=features)
        narrow_projection(layer.get_submodule(spec.attention_output), in_features=query_features)
        for path in spec.head_parameters:
            owner, _, name = path.rpartition(".")
            whole = layer.get_parameter(path)
            part = whole.data[: target.kv_groups * geometry.queries_per_group].clone()
            setattr(layer.get_submodule(owner), name, nn.Parameter(part, requires_grad=whole.requires_grad))
    if target.kv_groups:  # of a whole layer too: it can't read its sizes from a config in which they vary
        set_attention_sizes(layer, spec, geometry, target.kv_groups, config)


def add_companions(source: str, target: str) -> None:
    """Copy card, plan, report and tokenizer from the folder that a model came from, if the weights are unchanged.

    These files describe exactly the weights beside them, so a model that was changed since gets none of them.

    Args:
        source: Where the model was loaded from or saved to; ignored unless it is a folder with a manifest of
            this package.
        target: A folder into which the model was just saved.

    Raises:
        ValueError: The manifest is damaged.
    """
    manifest_file = os.path.join(source, "manifest.json")
    if not _lies_inside(source, "manifest.json"):
        return
    with open(manifest_file, "rb") as file:
        content = file.read(MOST_MANIFEST_BYTES)
    if b'"hf_context_prune"' not in content:
        return  # the manifest of another program
    try:
        files = {name: entry["sha256"] for name, entry in json.loads(content)["files"].items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{manifest_file} is damaged ({type(error).__name__}: {error}), so what belongs to the model is unknown. "
            f"Save or download that folder again."
        ) from error
    sums = {name: total for name, total in files.items() if _is_as_saved(source, name, total)}
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
    if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or not _lies_inside(folder, name):
        return False
    return (name == "README.md" and not os.path.islink(path)) or _sha256(path) == sha256


def _lies_inside(folder: str, name: str) -> bool:
    """Return whether a regular file lies in a folder, and not where a link leads.

    A snapshot of the Hub's cache may link to the ``blobs`` of its own repository. The package has the same check for
    other files (``utils/links.py``), but this file can't import it.
    """
    root = os.path.realpath(folder)
    places, snapshots = [root], os.path.dirname(root)
    repository = os.path.dirname(snapshots)
    if os.path.basename(snapshots) == "snapshots" and os.path.basename(repository).startswith("models--"):
        places.append(os.path.join(repository, "blobs"))
    real = os.path.realpath(os.path.join(root, name))
    return os.path.isfile(real) and any(real.startswith(os.path.join(place, "")) for place in places)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SavedWithCodeMixin:
    """Check the weights before they are loaded, and save the modeling files beside them."""

    spec: ArchSpec | WrapperSpec
    config_class: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Load like `PreTrainedModel.from_pretrained`, after comparing a local folder's widths with its weights."""
        folder = str(pretrained_model_name_or_path)
        if os.path.isdir(folder):
            config = kwargs.get("config")
            if config is None:
                config = cls.config_class.from_pretrained(folder)
            check_header(folder, cls.spec, config, cls)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Save like `PreTrainedModel.save_pretrained`, and copy the modeling files that ``auto_map`` names."""
        here = os.path.dirname(os.path.abspath(__file__))
        copied = [] if os.path.abspath(save_directory) == here else MODELING_FILES
        refuse_other_code([os.path.join(save_directory, name) for name in copied])
        with config_of_memory(self):
            result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        for name in copied:
            shutil.copyfile(os.path.join(here, name), os.path.join(save_directory, name))
        if copied and isinstance(self.spec, ArchSpec):
            write_entry(os.path.join(save_directory, REGISTERED_FILE), self.spec)
        return result

    def _get_name(self) -> str:
        """Return the native class's name, by which `Trainer` decides to shift labels before it smooths them."""
        return bare_name(self.spec.model_class)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Upload the saved model for `push_to_hub`, with the companion files of the folder that the model came from.

        Where the package is installed, the checks in `UPLOAD_CHECKS` inspect the files first.
        """
        add_companions(str(self.name_or_path), str(working_dir))  # type: ignore[attr-defined]
        for check in UPLOAD_CHECKS:
            check(working_dir, kwargs.get("token"))
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


class ContextPrunedModelMixin(SavedWithCodeMixin):
    """Build the native model with dense widths, then narrow every layer to its own widths."""

    spec: ArchSpec

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        target = read_geometry(config, self.spec)
        with dense_widths(config, self.spec):
            dense = read_geometry(config, self.spec)
            dense_config = copy.deepcopy(config)
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        layers = self.get_submodule(self.spec.layers)  # type: ignore[attr-defined]
        for layer, whole, widths in zip(layers, dense.layers, target.layers, strict=True):
            narrow_layer(layer, self.spec, dense, whole, widths, config)
        for module in self.modules():  # type: ignore[attr-defined]
            # Rotary tables need only head_dim, but derive it from head counts, which are ambiguous once they vary.
            if "RotaryEmbedding" in type(module).__name__ and hasattr(module, "config"):
                module.config = dense_config


class ContextPrunedWrapperMixin(SavedWithCodeMixin):
    """Build the native model of images and text with a variable-width text part."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        # The native class builds its text part by AutoModel. Remote code may have two copies of the config's class.
        kind = type(config.text_config)
        if str(config.text_config.model_type).startswith(PREFIX):
            part = kind.spec.headless()
            transformers.AutoModel.register(kind, __getattr__(model_class_name(part)), exist_ok=True)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]


def _make(spec: ArchSpec | WrapperSpec) -> type:
    mixin = ContextPrunedWrapperMixin if isinstance(spec, WrapperSpec) else ContextPrunedModelMixin
    parent = native_class(spec.model_class)
    config_class = getattr(configuration_context_pruned, config_class_name(spec))
    name = model_class_name(spec)
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"Variable-width {spec.model_type} model: `{spec.model_class}` with per-layer widths.",
        "spec": spec,
        "config_class": config_class,
        "__annotations__": {"config": config_class},
    }
    return type(name, (mixin, parent), namespace)


def _specs_by_name() -> dict[str, ArchSpec | WrapperSpec]:
    return {
        **{model_class_name(form): form for spec in SPECS.values() for form in (spec, spec.headless())},
        **{model_class_name(spec.headless()): spec.headless() for spec in TEXT_SPECS.values()},
        **{model_class_name(spec): spec for spec in WRAPPERS.values()},
    }


__getattr__ = classes_on_demand(__name__, _specs_by_name, _make)


def __dir__() -> list[str]:
    return sorted([*globals(), *_specs_by_name()])
