"""Models of images and text: their text part as a causal LM, and back.

Everything in this package works on causal LMs. The text part of a model of images and text (a *wrapper*) is one: where
there is no image, its logits are the wrapper's. So it is taken out, pruned, and put back into the wrapper, whose other
weights do not change.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from hf_context_prune.errors import SaveError, UnsupportedArchitectureError
from hf_context_prune.utils.compat import copy_attention_implementation

from .architectures import QUANTISED, spec_of
from .buffers import fill_buffers
from .configuration_context_pruned import has_tied_head
from .geometry import read_geometry
from .layer_device import run_layers_alike
from .modeling_context_pruned import model_class_name
from .native_fit import build_native_config, build_variable_config, values_for_another_class
from .registry import build_auto_map, class_of, get_config_class
from .specs import PREFIX, SPECS, ArchSpec, base_model_type
from .wrapper_specs import WRAPPERS, WrapperSpec, text_spec

_HEAD = "lm_head."


def wrapper_spec(config: Any) -> WrapperSpec | None:  # noqa: ANN401 - a config, or something with a model type
    """Return the table entry of a model of images and text, native or variable-width; None for any other model."""
    return WRAPPERS.get(base_model_type(str(config.model_type)))


def auto_class(config: Any) -> Any:  # noqa: ANN401 - a config, and an auto class of `transformers`
    """Return the auto class that opens models of a config."""
    return AutoModelForCausalLM if wrapper_spec(config) is None else AutoModelForImageTextToText


def text_part(config: Any) -> tuple[Any, ArchSpec]:  # noqa: ANN401 - a config
    """Return the config that holds the sizes of a model's decoder layers, with its table entry.

    Raises:
        UnsupportedArchitectureError: The model, or the text part of a wrapper, is not in the table.
    """
    if wrapper_spec(config) is None:
        return config, spec_of(config)
    return config.text_config, text_entry(config)


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the causal LM that computes what the text part of a model of images and text does."""
    return _causal_config(config.text_config, text_entry(config))


def text_entry(config: Any) -> ArchSpec:  # noqa: ANN401 - the config of a wrapper, or something with its values
    """Return the table entry of a wrapper's text part.

    Raises:
        UnsupportedArchitectureError: The wrapper has a text part that the table does not know there.
    """
    spec, text = wrapper_spec(config), str(config.text_config.model_type)
    entry = text_spec(text)
    if spec is None or entry is None or base_model_type(text) not in spec.texts:
        raise UnsupportedArchitectureError(
            f"The text part of this {config.model_type} model has the model type {text[:80]!r}; supported are "
            f"{', '.join(spec.texts if spec else ())}. To add one, add it to WRAPPERS in "
            f"hf_context_prune/modeling/specs.py."
        )
    return entry


def text_model(wrapper: PreTrainedModel) -> PreTrainedModel:
    """Return the text part of a model of images and text, as a causal LM that shares its tensors.

    Args:
        wrapper: The model, of `transformers` or of this package; it may lie on the meta device.

    Returns:
        The causal LM of the text part's family; of a Qwen3-VL, whose text part has none of its own, a Qwen3, which
        computes the same where all positions are those of text.

    Raises:
        UnsupportedArchitectureError: The wrapper or its text part is not in the table, or its weights are quantised or
            replaced by an adapter.
    """
    spec = wrapper_spec(wrapper.config)
    if spec is None or type(wrapper).__name__.removeprefix("ContextPruned") != spec.model_class:
        raise UnsupportedArchitectureError(
            f"The model is a {type(wrapper).__name__}, which is no model of images and text that this package knows: "
            f"those are {', '.join(entry.model_class for entry in WRAPPERS.values())}."
        )
    if getattr(wrapper, "is_quantized", False) or getattr(wrapper, "hf_quantizer", None) is not None:
        raise UnsupportedArchitectureError(f"The model is quantised. {QUANTISED}")
    config = _causal_config(wrapper.config.text_config, text_entry(wrapper.config))
    config.tie_word_embeddings = has_tied_head(wrapper)
    copy_attention_implementation(wrapper.config.text_config, config)
    part = wrapper.get_submodule(spec.text)
    state = {f"model.{name}": tensor for name, tensor in part.state_dict().items()}
    if not config.tie_word_embeddings:
        state |= {name: tensor for name, tensor in wrapper.state_dict().items() if name.startswith(_HEAD)}
    model = _build(class_of(config, spec_of(config)), config, state)
    if wrapper.device.type != "meta":
        fill_buffers(part, model.get_submodule("model"))  # type: ignore[arg-type]
    learns = {name: parameter.requires_grad for name, parameter in wrapper.named_parameters()}
    return _like(wrapper, model, {name: learns[_name_in_wrapper(name, spec)] for name, _ in model.named_parameters()})


def with_text(wrapper: PreTrainedModel, text: PreTrainedModel) -> PreTrainedModel:
    """Return a wrapper with another text part, which shares its tensors with both.

    Args:
        wrapper: A model of images and text; it is left as it is.
        text: What became of its [`text_model`][]: narrower or trained, with the same vocabulary.

    Returns:
        A model of the native class where all layers of the text part have the same widths, else of the variable-width
        class of the wrapper. All other weights are the wrapper's.

    Raises:
        SaveError: The text part has what no config of its family can express, fewer layers, or another vocabulary: the
            wrapper and its processor name tokens of images by their ids.
    """
    spec = wrapper_spec(wrapper.config)
    assert spec is not None  # `text_model` has checked it
    if reason := getattr(text, "_context_prune_unsavable", None):
        raise SaveError(f"This text part can't be put back into a {spec.model_class}: {reason}")
    layers, known = text.config.num_hidden_layers, wrapper.config.text_config.num_hidden_layers
    if layers != known:
        raise SaveError(
            f"The text part has {layers} layers, and the {spec.model_class} has {known}: its images may enter at "
            f"layers by their number. Save the text part alone: --text-only, or text_only=True."
        )
    if (rows := text.config.vocab_size) != (known := wrapper.config.text_config.vocab_size):
        raise SaveError(
            f"The text part has {rows:,} vocabulary entries, and the {spec.model_class} has {known:,}: its processor "
            f"names tokens of images by their ids. Save the text part alone: --text-only, or text_only=True."
        )
    config = _wrapper_config(wrapper.config, spec, text)
    for own, other in zip(_parts(wrapper.config), _parts(config), strict=True):
        copy_attention_implementation(own, other)
        other.dtype = wrapper.dtype  # as `from_pretrained` writes it
    state = {
        name: tensor for name, tensor in wrapper.state_dict().items() if not name.startswith((f"{spec.text}.", _HEAD))
    }
    names = {name: _name_in_wrapper(name, spec) for name in text.state_dict()}
    tied = config.tie_word_embeddings
    state |= {
        names[name]: tensor for name, tensor in text.state_dict().items() if not (tied and name.startswith(_HEAD))
    }
    model = _build(class_of(config, spec), config, state)
    fill_buffers(wrapper, model)
    learns = {name: parameter.requires_grad for name, parameter in wrapper.named_parameters()}
    learns |= {names[name]: parameter.requires_grad for name, parameter in text.named_parameters()}
    return _like(wrapper, model, learns)


def _causal_config(text: PreTrainedConfig, entry: ArchSpec) -> PreTrainedConfig:
    """Return the config of the causal LM that computes what a text part does on text alone."""
    spec = _causal_spec(entry)
    values = values_for_another_class(text)
    if spec is not entry and isinstance(rotation := values.get("rope_parameters"), dict):
        # Sections of a rotation by time, height and width: of a text, all three are the position.
        values["rope_parameters"] = {key: value for key, value in rotation.items() if not key.startswith("mrope")}
    config: PreTrainedConfig = getattr(transformers, spec.config_class).from_dict(values)
    config.architectures = [spec.model_class]
    if not str(text.model_type).startswith(PREFIX):
        return config
    return build_variable_config(config, spec, read_geometry(text, entry).layers)


def _causal_spec(entry: ArchSpec) -> ArchSpec:
    """Return the entry of the causal LM of a text part: its own, or that of another family."""
    return next(spec for spec in SPECS.values() if spec.model_class == entry.model_class)


def _wrapper_config(config: PreTrainedConfig, spec: WrapperSpec, text: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of a wrapper with this text part."""
    entry, variable = text_entry(config), str(text.config.model_type).startswith(PREFIX)
    widths = read_geometry(text.config, _causal_spec(entry)).layers
    part = (build_variable_config if variable else build_native_config)(config.text_config, entry, widths)
    values = values_for_another_class(config)
    part.tie_word_embeddings = values["tie_word_embeddings"] = has_tied_head(text)
    vars(part).pop("auto_map", None)  # the wrapper's names the code
    part.architectures = None
    chosen = get_config_class(spec) if variable else getattr(transformers, spec.config_class)
    architecture = model_class_name(spec) if variable else spec.model_class
    auto_map = {"auto_map": build_auto_map(spec)} if variable else {}
    result: PreTrainedConfig = chosen.from_dict(
        {**values, "text_config": part, "architectures": [architecture], **auto_map}
    )
    return result


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    return [config, *(getattr(config, name) for name in sorted(config.sub_configs))]


def _build(model_class: type[Any], config: PreTrainedConfig, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Build a model that shares the tensors of a state."""
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
    found = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    known = dict(model.named_parameters())  # without a tied head
    other = sorted({*found.unexpected_keys, *(name for name in found.missing_keys if name in known)})
    if other:
        raise UnsupportedArchitectureError(
            f"The tensors {', '.join(other[:3])} are not those of a {model_class.__name__}: an adapter or a quantiser "
            f"has replaced some of its modules. Merge or unload it first (merge_and_unload() for PEFT)."
        )
    return model


def _like(source: PreTrainedModel, model: PreTrainedModel, learns: dict[str, bool]) -> PreTrainedModel:
    """Give a model the generation config, the name, the mode and the device of another, and what of it is frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns[name])
    model.generation_config = copy.deepcopy(source.generation_config)
    run_layers_alike(source, model)
    model.config.name_or_path = source.config.name_or_path
    return model.train(source.training)


def _name_in_wrapper(name: str, spec: WrapperSpec) -> str:
    return name if name.startswith(_HEAD) else f"{spec.text}.{name.removeprefix('model.')}"
