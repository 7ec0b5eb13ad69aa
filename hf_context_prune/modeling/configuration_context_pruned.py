"""Configs of variable-width models: ``ContextPruned<Base>Config`` for every entry of the table.

Widths are kept in the ``per_layer_config`` field of `transformers` (sparse: ``{layer: {attribute: value}}``); the
global attributes keep the values of the base model. The classes are made on first access (PEP 562), so that
pickle, ``auto_map`` and remote code all find them by name.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pprint
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict

from .registered import ENTRIES
from .specs import BUILT_IN, PREFIX, SPECS, ArchSpec, bare_name, values_of
from .wrapper_specs import TEXT_SPECS, WRAPPERS, WrapperSpec, text_spec

MAX_LAYERS = 512
"""Most decoder layers of a model; the largest published ones have about 300."""
MAX_LABELS = 10_000
"""Most labels of a config: a language model uses none, but `transformers` makes two tables of them."""
MAX_CONFIG_BYTES = 500_000
"""Largest config.json that is read; those of published models have some kilobytes."""


def config_class_name(spec: ArchSpec | WrapperSpec) -> str:
    """Return the name of the variable-width config class, such as ``ContextPrunedLlamaConfig``."""
    return f"ContextPruned{bare_name(spec.config_class)}"


def native_class(reference: str) -> Any:  # noqa: ANN401 - a class of configs or of models
    """Return a class that an entry names: of `transformers`, or ``"package.module:Class"``.

    Raises:
        AttributeError: The module has no such class.
        ImportError: There is no such module.
    """
    module, _, name = reference.rpartition(":")
    return getattr(importlib.import_module(module) if module else transformers, name)


def classes_on_demand(
    module: str, specs: Callable[[], Mapping[str, Any]], make: Callable[[Any], type]
) -> Callable[[str], type]:
    """Return a module-level ``__getattr__`` (PEP 562) that makes an architecture's class on first access to its name.

    Args:
        module: Name of the module, for the error.
        specs: Returns the table's entries by class name; asked every time, since entries may be registered later.
        make: Makes the class of an entry; called once per entry.
    """
    made: dict[ArchSpec | WrapperSpec, type] = {}

    def get(name: str) -> type:
        spec = specs().get(name)
        if spec is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if spec not in made:
            made[spec] = make(spec)
        return made[spec]

    return get


def _check_width(layer: int, name: str, value: object, dense: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"per_layer_config[{layer}].{name} is {value!r} ({type(value).__name__}); it must be an integer "
            f"from 1 to {dense}, the width of the base model."
        )
    if not 1 <= value <= dense:
        raise ValueError(
            f"per_layer_config[{layer}].{name} is {value}; it must be from 1 to {dense}, the width of the base model."
        )


def check_counts(layers: object, per_layer_config: object = None, labels: object = None) -> None:
    """Refuse, before anything loops over them, more layers or labels than a model can have.

    Args:
        layers: The value of ``num_hidden_layers``; one that is no integer is left to other checks.
        per_layer_config: The value of ``per_layer_config``, None if there is none.
        labels: The value of ``num_labels``, None if there is none.

    Raises:
        ValueError: There are more than `MAX_LAYERS` layers or entries for layers, or the labels are no integer from 0
            to `MAX_LABELS`.
    """
    if labels is not None and (type(labels) is not int or not 0 <= labels <= MAX_LABELS):
        raise ValueError(f"num_labels is {str(labels)[:80]}; it must be an integer from 0 to {MAX_LABELS:,}.")
    if not isinstance(layers, int):
        return
    if layers > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers}; at most {MAX_LAYERS} layers are read.")
    if per_layer_config is not None and not isinstance(per_layer_config, dict):
        raise ValueError(
            f"per_layer_config is a {type(per_layer_config).__name__}; it must be an object that maps layers to widths."
        )
    if per_layer_config is not None and len(per_layer_config) > MAX_LAYERS:
        raise ValueError(f"per_layer_config has {len(per_layer_config)} entries; at most {MAX_LAYERS} layers are read.")


def check_config_size(folder: str) -> None:
    """Refuse a config that is larger than that of any model, before it is parsed.

    Args:
        folder: A model folder; anything else is left to other checks.

    Raises:
        ValueError: A config has more than `MAX_CONFIG_BYTES` bytes.
    """
    for name in ("config.json", "generation_config.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and (size := os.path.getsize(path)) > MAX_CONFIG_BYTES:
            raise ValueError(
                f"{name} has {size:,} bytes; a model config has at most {MAX_CONFIG_BYTES:,}. Download or save the "
                f"model again."
            )


def is_modeling_file(path: str) -> bool:
    """Return whether a path is a regular file (no link) of the code that travels with a model, of any version.

    The first line tells: it is that of the file of the same name beside this one, in every version so far.
    """
    own = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.path.basename(path))
    if os.path.islink(path) or not (os.path.isfile(path) and os.path.isfile(own)):
        return False
    with open(path, "rb") as file, open(own, "rb") as shipped:
        return file.readline(1000).rstrip() == shipped.readline(1000).rstrip()


def refuse_other_code(paths: Iterable[str]) -> None:
    """Refuse to replace files, unless they are older files of the code that travels with a model.

    Raises:
        ValueError: Names such a file.
    """
    for path in paths:
        if os.path.lexists(path) and not is_modeling_file(path):
            raise ValueError(
                f"{path} is a link, or no modeling file of this model, and would be replaced by the file of that name. "
                f"Move it, or save the model to another folder."
            )


def write_entry(path: str, spec: ArchSpec) -> None:
    """Write the entry of a registered architecture into the copy of ``registered.py`` beside a saved model.

    Where that file brings the entry already, or the table has it, nothing is written.
    """
    if spec.model_type in {*BUILT_IN, *(entry["model_type"] for entry in ENTRIES)}:
        return
    with open(path, encoding="utf-8") as file:
        start, name, _ = file.read().rpartition("ENTRIES: ")
    entries = pprint.pformat((values_of(spec),), width=110, sort_dicts=False)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{start}{name}tuple[dict[str, Any], ...] = {entries}\n")


def has_tied_head(model: Any) -> bool:  # noqa: ANN401
    """Return whether the LM head and the embedding are one tensor in memory, whatever the config says."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return False
    first, second = head.weight, embedding.weight
    if first is second:
        return True
    if type(first).__name__ != "Parameter" or not first.numel():  # sharded or partitioned: memory does not tell
        return bool(model.config.tie_word_embeddings)
    same = first.shape == second.shape and first.device.type != "meta"
    return same and first.data_ptr() == second.data_ptr()


@contextmanager
def config_of_memory(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Let a config say in the block whether the head is tied in memory: so a saved model reloads as it is.

    Of a model without a head, the config says what the causal LM does.
    """
    said = model.config.tie_word_embeddings
    if model.get_output_embeddings() is not None:
        model.config.tie_word_embeddings = has_tied_head(model)
    try:
        yield
    finally:
        model.config.tie_word_embeddings = said


def native_overrides(config: Any, spec: ArchSpec) -> dict[int, dict[str, Any]]:  # noqa: ANN401
    """Return what a config sets layer by layer as its native class does (Gemma 4): ``{layer: {attribute: value}}``."""
    found = {
        int(layer): {name: value for name, value in values.items() if name in spec.native_overrides}
        for layer, values in (config.to_dict().get("per_layer_config") or {}).items()
    }
    return {layer: values for layer, values in found.items() if values}


@contextmanager
def dense_widths(config: Any, spec: ArchSpec) -> Iterator[None]:  # noqa: ANN401
    """Let all layers of a variable-width config have the widths of the base model in the block."""
    overrides = config.to_dict().get("per_layer_config", {})
    config.per_layer_config = native_overrides(config, spec) or None
    try:
        yield
    finally:
        config.per_layer_config = overrides


class BoundedConfigMixin:
    """Look at the size of a config before it is read."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Read a config like `PreTrainedConfig.get_config_dict`, after a look at its size.

        Raises:
            ValueError: See [`check_config_size`][].
        """
        check_config_size(str(pretrained_model_name_or_path))
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]


class ContextPrunedConfigMixin(BoundedConfigMixin):
    """Check per-layer widths, and lift the native rule that the hidden size is a multiple of the head count."""

    spec: ArchSpec
    model_type: str
    _unfinished = False

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Check the numbers of layers and labels before the native config makes lists of them.

        Raises:
            ValueError: See [`check_counts`][].
        """
        counts = (kwargs.get(name) for name in ("per_layer_config", "num_labels"))
        check_counts(None if self._unfinished else self.num_hidden_layers, *counts)  # type: ignore[attr-defined]
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def validate_architecture(self) -> None:
        """Refuse widths that no layer could have.

        Raises:
            ValueError: A width is not an integer, is below 1 or above the width of the base model, or query heads
                and KV groups do not have the ratio of the base model.
        """
        if self._unfinished:
            return
        spec, overrides = self.spec, self.width_overrides()
        experts = spec.experts.count if spec.experts else None
        names = (spec.width, spec.query_heads, spec.kv_heads, experts)
        dense = {name: self._dense_value(name) for name in names if name}
        for name, value in dense.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; the width of the base model must be an integer of at least 1.")
        if spec.kv_heads and dense[spec.query_heads] % dense[spec.kv_heads]:
            raise ValueError(
                f"{spec.query_heads} is {dense[spec.query_heads]} and {spec.kv_heads} is {dense[spec.kv_heads]}; the "
                f"base model's query heads must be a multiple of its KV heads."
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
            least = 1 if spec.experts is None else getattr(self, spec.experts.per_token)
            if experts in values and values[experts] < least:
                raise ValueError(
                    f"per_layer_config[{layer}].{experts} is {values[experts]}; every token is routed to {least} "
                    f"experts, so that at least as many must stay."
                )
            heads = values.get(spec.query_heads, dense[spec.query_heads])
            groups = values.get(spec.kv_heads, dense[spec.kv_heads]) if spec.kv_heads else heads
            if heads != groups * ratio:
                raise ValueError(
                    f"per_layer_config[{layer}] has {heads} query heads and {groups} KV groups; each KV group must "
                    f"have {ratio} query heads, as in the base model."
                )

    def validate_rope(self) -> None:
        """Check the rotary embedding as the native config does, which may read head counts: those of the base model."""
        with dense_widths(self, self.spec):
            super().validate_rope()  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """Return the native config's values, plus ``num_hidden_layers``, which a Trainer needs to resume.

        The Trainer resumes with a config made from these values alone, and some families name that count otherwise.
        """
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if "per_layer_config" in values:
            values.setdefault("num_hidden_layers", self.num_hidden_layers)  # type: ignore[attr-defined]
        return values

    def width_overrides(self) -> dict[int, dict[str, Any]]:
        """Return a copy of the sparse per-layer widths: ``{layer: {attribute: value}}``."""
        overrides = self.to_dict().get("per_layer_config", {})  # type: ignore[attr-defined]
        own = self.spec.native_overrides
        found = {int(layer): {k: v for k, v in values.items() if k not in own} for layer, values in overrides.items()}
        return {layer: values for layer, values in found.items() if values}

    def _dense_value(self, name: str) -> int:
        value = self._getattr_without_heterogeneous_validation(name)  # type: ignore[attr-defined]
        return 4 * self.hidden_size if value is None else value  # type: ignore[attr-defined]


class ContextPrunedWrapperConfigMixin(BoundedConfigMixin):
    """Read the text part's config of a model of images and text as a variable-width config."""

    spec: WrapperSpec
    text_config: Any

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Make the text part's config of its values: the native class knows only types that are registered.

        Raises:
            ValueError: The text part is none that this model may have.
        """
        if isinstance(self.text_config, dict):
            model_type = str(self.text_config.get("model_type"))
            if model_type not in [PREFIX + text for text in self.spec.texts]:
                raise ValueError(
                    f"text_config.model_type is {model_type[:80]!r}; a {PREFIX}{self.spec.model_type} model has "
                    f"{' or '.join(PREFIX + text for text in self.spec.texts)}."
                )
            self.text_config = text_config_class(model_type)(**self.text_config)
        super().__post_init__(**kwargs)  # type: ignore[misc]


def text_config_class(model_type: str) -> Any:  # noqa: ANN401
    """Return the variable-width config class of a wrapper's text part."""
    spec = text_spec(model_type)
    assert spec is not None  # every text of WRAPPERS has an entry
    return __getattr__(config_class_name(spec))


def _make(spec: ArchSpec | WrapperSpec) -> type:
    parent = native_class(spec.config_class)
    name = config_class_name(spec)
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"Config of a variable-width {spec.model_type} model: `{spec.config_class}` with per-layer widths.",
        "model_type": PREFIX + spec.model_type,
        "spec": spec,
        # Without @strict on the subclass itself the parent's validators would run, not ours.
    }
    if isinstance(spec, WrapperSpec):
        return strict(type(name, (ContextPrunedWrapperConfigMixin, parent), namespace))
    if (own := _own_init(parent)) is not None:
        namespace["__init__"] = own
    if isinstance(getattr(parent, "head_dim", None), property):  # computed from head counts (Falcon): those of the base
        namespace["head_dim"] = property(lambda config: config.hidden_size // config._dense_value(spec.query_heads))
    return strict(type(name, (ContextPrunedConfigMixin, parent), namespace))


def _own_init(parent: type) -> Callable[..., None] | None:
    """Return an ``__init__`` that checks what one written by hand has set at its end; None for that of a dataclass."""
    written = next(vars(one)["__init__"] for one in parent.__mro__ if "__init__" in vars(one))
    if inspect.unwrap(written).__code__.co_filename == "<string>":  # generated
        return None

    def __init__(self: Any, *args: Any, per_layer_config: Any = None, **kwargs: Any) -> None:  # noqa: ANN401, N807
        object.__setattr__(self, "_unfinished", True)
        try:
            parent.__init__(self, *args, **kwargs)  # type: ignore[misc]
        finally:
            object.__delattr__(self, "_unfinished")
        check_counts(self.num_hidden_layers, per_layer_config)
        if per_layer_config is not None:
            self.per_layer_config = per_layer_config
        self.validate_architecture()

    return __init__


def _specs_by_name() -> dict[str, ArchSpec | WrapperSpec]:
    return {config_class_name(spec): spec for table in (SPECS, TEXT_SPECS, WRAPPERS) for spec in table.values()}


__getattr__ = classes_on_demand(__name__, _specs_by_name, _make)


def __dir__() -> list[str]:
    return sorted([*globals(), *_specs_by_name()])
