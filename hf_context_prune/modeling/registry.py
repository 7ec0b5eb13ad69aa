"""Registration of architectures, and of their variable-width classes with the auto classes of `transformers`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_context_prune.errors import ConfigError
from hf_context_prune.utils.upload_check import refuse_upload

from . import configuration_context_pruned, modeling_context_pruned
from .configuration_context_pruned import config_class_name, native_class
from .geometry import UNIT_NAMES
from .modeling_context_pruned import model_class_name
from .paths import build_default, check_paths, did_you_mean
from .spec_parts import Projection
from .specs import BUILT_IN, PREFIX, SPECS, ArchSpec
from .wrapper_specs import TEXT_SPECS, WRAPPERS, WrapperSpec

ROLES = ("query", "key", "value")
_PATH = re.compile(r"[A-Za-z]\w*(\.\w+)*")


def get_config_class(spec: ArchSpec | WrapperSpec) -> type[PreTrainedConfig]:
    """Return the variable-width config class of an architecture."""
    return getattr(configuration_context_pruned, config_class_name(spec))


def get_model_class(spec: ArchSpec | WrapperSpec) -> type[Any]:
    """Return the variable-width model class of an architecture, of its `headless` entry, or of a wrapper."""
    return getattr(modeling_context_pruned, model_class_name(spec))


def class_of(config: Any, spec: ArchSpec | WrapperSpec) -> type[Any]:  # noqa: ANN401
    """Return the model class of a config, native or of variable width, by the table entry of its model type."""
    variable = str(config.model_type).startswith(PREFIX)
    return get_model_class(spec) if variable else native_class(spec.model_class)


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
        _register(spec)
    for spec in TEXT_SPECS.values():
        AutoConfig.register(PREFIX + spec.model_type, get_config_class(spec), exist_ok=True)
        AutoModel.register(get_config_class(spec), get_model_class(spec.headless()), exist_ok=True)
    for wrapper in WRAPPERS.values():
        AutoConfig.register(PREFIX + wrapper.model_type, get_config_class(wrapper), exist_ok=True)
        AutoModelForImageTextToText.register(get_config_class(wrapper), get_model_class(wrapper), exist_ok=True)
    if refuse_upload not in modeling_context_pruned.UPLOAD_CHECKS:
        modeling_context_pruned.UPLOAD_CHECKS.append(refuse_upload)


def _register(spec: ArchSpec) -> None:
    AutoConfig.register(PREFIX + spec.model_type, get_config_class(spec), exist_ok=True)
    AutoModel.register(get_config_class(spec), get_model_class(spec.headless()), exist_ok=True)
    AutoModelForCausalLM.register(get_config_class(spec), get_model_class(spec), exist_ok=True)


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


def register_architecture(spec: ArchSpec) -> None:
    """Add an architecture to the table, so that its models are pruned, saved and loaded like those of the others.

    A saved model of variable widths brings the entry along: [`load_model`][], [`load_pruned`][] and the commands read
    it there if its classes are those of `transformers`, and plain `transformers` opens the folder by
    ``trust_remote_code=True``. Everything else (pruning a model of this type, `from_pretrained` without remote code)
    needs this call in each process. Classes of another package are registered with the auto classes of `transformers`
    too. ``hf-context-prune check MODEL`` proposes the entry of a model, and tests it.

    Args:
        spec: The entry. It takes the place of one that was registered before for its model type.

    Raises:
        ConfigError: The model type is one of the table, a class does not exist or is of the wrong kind, a role is
            unknown, a path does not exist in a model of the class (the message has the nearest existing ones), or the
            MLP's projections there have other sizes.

    Example:
        ```python
        from hf_context_prune import ArchSpec, Projection, register_architecture

        register_architecture(
            ArchSpec(
                "my_gpt",
                "my_package.configuration:MyConfig",  # of transformers: the name of the class alone
                "my_package.modeling:MyForCausalLM",
                layers="transformer.blocks",
                mlp_inputs=("ffn.up",),
                mlp_output="ffn.down",
                activation="ffn.act",
                attention="attn",
                attention_inputs=(Projection("attn.qkv", ("query", "key", "value")),),
                attention_output="attn.out",
                width="ffn_dim",
                query_heads="num_heads",
                kv_heads=None,
            )
        )
        ```
    """
    if not isinstance(spec, ArchSpec):
        raise ConfigError(f"register_architecture takes an ArchSpec, not {type(spec).__name__}: {spec!r:.80}.")
    if SPECS.get(spec.model_type) == spec:
        return
    if spec.model_type in BUILT_IN:
        raise ConfigError(
            f"The model type {spec.model_type!r} has an entry already, which differs. To change a family of the table, "
            f"give your config class a model_type of its own."
        )
    check_entry(spec)
    model = build_default(spec)
    if model is not None:
        check_paths(model, spec)
    if ":" in spec.config_class:
        _register_native(spec)
    SPECS[spec.model_type] = spec
    _register(spec)


def _register_native(spec: ArchSpec) -> None:
    """Let the auto classes open models of classes that are not of `transformers`, as all loading here does."""
    config_class = native_class(spec.config_class)
    AutoConfig.register(spec.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, native_class(spec.headless().model_class), exist_ok=True)
    AutoModelForCausalLM.register(config_class, native_class(spec.model_class), exist_ok=True)


def check_entry(spec: ArchSpec) -> None:
    """Refuse an entry that no model can have, as far as its words tell.

    Raises:
        ConfigError: A value is of another type, a class does not exist or is of the wrong kind, a role is unknown, or a
            path is no path.
    """
    if spec.experts is not None and spec.model_type not in BUILT_IN:
        raise ConfigError(
            f"The entry of {spec.model_type!r} has experts, and only families of the table may. Add yours to "
            f"hf_context_prune/modeling/moe_specs.py."
        )
    for item in fields(spec):
        if item.name != "experts":
            _check_type(item, getattr(spec, item.name))
    config_class = _class_of(spec.config_class, "config_class", PreTrainedConfig)
    for field, reference in (("model_class", spec.model_class), ("headless_class", spec.headless().model_class)):
        _class_of(reference, field, PreTrainedModel)
    if config_class.model_type != spec.model_type:
        raise ConfigError(
            f"The entry's model_type is {spec.model_type!r}, but {spec.config_class} says {config_class.model_type!r}. "
            f"Take that."
        )
    roles = [role for projection in spec.attention_inputs for role in projection.roles]
    if sorted(roles) != sorted(ROLES):
        raise ConfigError(
            f"attention_inputs of {spec.model_type!r} have the roles {', '.join(roles) or 'none'}; each of "
            f"{', '.join(ROLES)} is needed once."
        )
    for field in ("fixed_heads", "refused", "multi_query"):
        for pair in getattr(spec, field):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ConfigError(f"{field} of {spec.model_type!r} has {pair!r}; it must be a pair (see ArchSpec).")
    for pairs, allowed in (("attention_attributes", ("heads", "groups", "features", "config")), ("post_norms", None)):
        for pair in getattr(spec, pairs):
            good = isinstance(pair, tuple) and len(pair) == 2
            if not good or (pair[1] not in allowed if allowed else pair[0] not in UNIT_NAMES):
                raise ConfigError(
                    f"{pairs} of {spec.model_type!r} has {pair!r}; it must be a pair of "
                    + (
                        f"an attribute and one of {', '.join(allowed)}."
                        if allowed
                        else "'mlp' or 'attention' and a path."
                    )
                )
    inputs = (projection.path for projection in spec.attention_inputs)
    own = (spec.attention, spec.attention_output, *inputs, *spec.head_parameters)
    norms = (path for _, path in spec.post_norms)
    attributes = (name for name, _ in spec.attention_attributes)
    activation = () if spec.activation is None else (spec.activation,)
    for path in (spec.layers, *spec.mlp_inputs, spec.mlp_output, *activation, *own, *norms, *attributes):
        if not isinstance(path, str) or not _PATH.fullmatch(path):
            raise ConfigError(
                f"The entry of {spec.model_type!r} has the path {path!r}; a path is made of names with dots between "
                f"them, such as 'mlp.down_proj'."
            )


def _check_type(field: Field[Any], value: object) -> None:
    """Refuse a value of another type than its field: an entry is plain data, which files bring along."""
    declared = str(field.type)
    kinds: list[type] = [kind for kind in (str, bool, int, tuple) if declared.startswith(kind.__name__)]
    kinds += [type(None)] if "| None" in declared else [tuple] if declared.startswith("bool | tuple") else []
    if type(value) not in kinds or not _is_plain(value):
        raise ConfigError(f"{field.name} of the entry is {value!r}; it must be of type {declared}, in plain values.")


def _is_plain(value: object) -> bool:
    if isinstance(value, Projection):
        return all(_is_plain(part) for part in (value.path, value.roles, value.interleaved, value.blocks))
    return isinstance(value, str | int | None) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _class_of(reference: str, field: str, kind: type) -> Any:  # noqa: ANN401 - a class
    try:
        found = native_class(reference)
    except (ImportError, AttributeError, ValueError) as error:
        close = "" if ":" in reference else did_you_mean(reference, dir(sys.modules["transformers"]))
        raise ConfigError(
            f"{field} is {reference!r}, which does not exist ({type(error).__name__}: {error}).{close} Name a class of "
            f"transformers, or one of an installed package as 'package.module:Class'."
        ) from error
    if not isinstance(found, type) or not issubclass(found, kind):
        raise ConfigError(f"{field} is {reference!r}, which is no {kind.__name__}. Name a class of that kind.")
    return found


@contextmanager
def in_the_table(spec: ArchSpec) -> Iterator[None]:
    """Let an entry stand in the table within the block, in the place of that of its model type if there is one."""
    before = SPECS.get(spec.model_type)
    SPECS[spec.model_type] = spec
    try:
        _register(spec)
        yield
    finally:
        del SPECS[spec.model_type]
        if before is not None:
            SPECS[spec.model_type] = before
            _register(before)
