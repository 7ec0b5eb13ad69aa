"""Reading of a model's config, with every check that needs no weight, before anything loops over a size in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    find_adapter_config_file,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
)

from hf_context_prune.errors import ContextPruneError, LoadError, UnsupportedArchitectureError, unknown_name
from hf_context_prune.modeling.architectures import QUANTISED, spec_of
from hf_context_prune.modeling.configuration_context_pruned import check_config_size, check_counts, native_class
from hf_context_prune.modeling.wrapper_specs import text_spec
from hf_context_prune.modeling.wrappers import text_entry, text_part, wrapper_spec

from .model_checks import MAX_SIZE, RESTORE, check_size, check_sizes, list_size_fields
from .registered_entry import register_entry_of

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_INSTALLED = {
    **dict.fromkeys(("eager", "sdpa", "flex_attention"), lambda: True),
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
}
_FRACTIONS = (
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "dropout", "attention_dropout", "activation_dropout"),
    *("hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "layerdrop"),
)
_FACTORS = (
    *("query_pre_attn_scalar", "attention_multiplier", "embedding_multiplier", "residual_multiplier"),
    *("logits_scaling", "attn_logit_softcapping", "final_logit_softcapping"),
)
_MAX_FACTOR = 1e6
_ROTATION = (
    *("rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("short_factor", "long_factor"),
)
_PERIODS = ("no_rope_layer_interval", "sliding_window_pattern", "_sliding_window_pattern", "sliding_window")
_SHOWN = 500


def read_config(source: str, folder: Path, revision: str | None) -> PreTrainedConfig:
    """Read and check a model's config.

    What the config says of a run and not of the weights (which outputs a forward returns) is not followed.

    Args:
        source: A model folder or Hub id.
        folder: The local folder of its config.json.
        revision: Commit on the Hub; None for a folder.

    Raises:
        LoadError: The config is damaged, or a value in it is one that no model can have.
        UnsupportedArchitectureError: The architecture is not in the table, or the weights are quantised.
    """
    try:
        check_config_size(str(folder))
    except ValueError as error:
        raise LoadError(f"{source!r} can't be loaded: {error}") from error
    try:
        values, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if not isinstance(values, dict):
            raise LoadError(
                f"The config.json of {source!r} holds a {type(values).__name__}, not an object with the fields of a "
                f"model config. {RESTORE}"
            )
        register_entry_of(source, folder, revision, values)
        if values.get("model_type"):  # before AutoConfig, which may know the type only by remote code
            _check_values(source, values)
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except ContextPruneError:
        raise
    except _CONFIG_ERRORS as error:
        raise LoadError(f"The config.json of {source!r} is not a model config: {describe(error)}. {RESTORE}") from error
    text, spec = text_part(config)
    check_sizes(text, spec)
    _check_functions(source, text)
    _check_rotation(source, getattr(text, "rope_parameters", None))
    for part in {id(part): part for part in (config, text)}.values():
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False
    return config


def read_any_config(source: str, folder: Path, revision: str | None, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Read the config of a model whose architecture may be unknown, with the checks that need no table entry.

    Args:
        source: A model folder or Hub id.
        folder: The local folder of its config.json.
        revision: Commit on the Hub; None for a folder.
        trust_remote_code: Whether to run code of the folder or repository, where its config names some.

    Raises:
        LoadError: The config is damaged, or its class is in code of the folder that may not be run.
        UnsupportedArchitectureError: The weights are quantised.
    """
    try:
        check_config_size(str(folder))
        values, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        register_entry_of(source, folder, revision, values)
        _refuse_quantised(source, values)
        check_counts(values.get("num_hidden_layers"), values.get("per_layer_config"), values.get("num_labels"))
        kind = values.get("model_type")
        if kind is None:
            raise LoadError(
                f"The config.json of {source!r} has no model_type, so no class can be chosen. Restore the config.json "
                f"that was saved with the weights, or download or save the model again."
            )
        if not trust_remote_code and kind not in CONFIG_MAPPING:
            code = values.get("auto_map")
            raise LoadError(
                f"transformers {transformers.__version__} knows no model type {kind!r}. "
                + (
                    f"{source!r} brings code of its own ({code}), which was not run: read it, and allow it by "
                    f"--trust-remote-code."
                    if code
                    else "Update transformers, if a later version has it."
                )
            )
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except ContextPruneError:
        raise
    except Exception as error:  # as of _CONFIG_ERRORS, OSError, or any of the code that was allowed
        raise LoadError(f"The config.json of {source!r} is not a model config: {describe(error)}. {RESTORE}") from error
    _check_functions(source, config)
    _check_rotation(source, getattr(config, "rope_parameters", None))
    return config


_CONFIG_ERRORS = (
    *(StrictDataclassError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError),
    *(KeyError, IndexError, RecursionError),
)


def refuse_adapter(source: str, revision: str | None = None) -> None:
    """Refuse a place that holds a PEFT adapter: of one beside a whole model, nothing says which of the two is meant.

    Args:
        source: A folder or Hub id.
        revision: Commit on the Hub.

    Raises:
        LoadError: The place has an adapter_config.json; the message says how to merge it.
    """
    if find_adapter_config_file(source, revision=revision) is None:
        return
    raise LoadError(
        f"{source!r} holds a PEFT adapter ({ADAPTER_CONFIG_NAME}). Merge it into its base model and save the result, "
        f"with the tokenizer, in a folder of its own: peft.AutoPeftModelForCausalLM.from_pretrained({source!r})"
        f".merge_and_unload().save_pretrained(FOLDER). If the model beside it is meant without the adapter, copy it "
        f"without the adapter's files."
    )


def describe(error: BaseException) -> str:
    """Return the type and the message of a library's error, which may repeat a whole config, cut to one paragraph."""
    message = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {message if len(message) <= _SHOWN else message[:_SHOWN] + ' ...'}"


def _check_values(source: str, values: Mapping[str, Any]) -> None:
    """Refuse values before the config class sees them, which divides by some sizes and makes lists of others."""
    model = SimpleNamespace(model_type=str(values["model_type"]))
    wrapper = wrapper_spec(model)
    if wrapper is not None:
        parts = {name: values.get(name) for name in ("text_config", "vision_config")}
        for name, part in parts.items():
            if not isinstance(part, dict):
                raise _wrong(source, name, part, "an object with the fields of a model config")
        text = {"model_type": wrapper.texts[0], **parts["text_config"]}  # type: ignore[dict-item]
        text_entry(
            SimpleNamespace(model_type=model.model_type, text_config=SimpleNamespace(model_type=text["model_type"]))
        )
        _check_part(source, values)
        _check_vision(source, parts["vision_config"])  # type: ignore[arg-type]
        values = text
    spec = spec_of(model) if wrapper is None else text_spec(str(values["model_type"]))
    assert spec is not None  # `text_entry` has found it
    names = native_class(spec.config_class).attribute_map
    for field in list_size_fields(spec):
        for name in {field, names.get(field, field)}:
            if values.get(name) is not None:  # null may stand for a default
                check_size(name, values[name])
                if field == "num_hidden_layers":
                    check_counts(values[name], values.get("per_layer_config"))
    check_counts(None, labels=values.get("num_labels"))
    off = hasattr(native_class(spec.config_class), "use_sliding_window") and not values.get("use_sliding_window")
    for name in _PERIODS:
        if type(values.get(name)) is int and not (off and name == "sliding_window"):  # Qwen2-MoE writes 0 for none
            check_size(name, values[name])
    _check_part(source, values)


def _check_vision(source: str, values: Mapping[str, Any]) -> None:
    """Refuse a vision part of sizes that no model has: its layers are built one by one."""
    for name in ("num_hidden_layers", "depth"):
        check_counts(values.get(name))
    for name, value in values.items():
        if type(value) is int and not -1 <= value <= MAX_SIZE:
            raise _wrong(source, f"vision_config.{name}", value, f"an integer up to {MAX_SIZE:,}")
    _check_part(source, values)


def _check_part(source: str, values: Mapping[str, Any]) -> None:
    """Refuse what no part of a model can have: its text part, its vision part, or the model itself."""
    _refuse_quantised(source, values)
    _check_attention(source, values)
    for name in ("dtype", "torch_dtype"):
        dtype = values.get(name)
        if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise _wrong(source, name, dtype, "the name of a torch dtype, such as 'bfloat16'")
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise _wrong(source, name, value, "a finite number")
        if name in _FRACTIONS and isinstance(value, int | float) and not 0 <= value <= 1:
            raise _wrong(source, name, value, "a number from 0 to 1")
        if name in _FACTORS and value is not None and not (_is_positive(value) and value <= _MAX_FACTOR):
            raise _wrong(source, name, value, f"a number above 0 and at most {_MAX_FACTOR:,.0f}")


def _check_attention(source: str, values: Mapping[str, Any]) -> None:
    """Refuse an attention by which `transformers` would fetch and run a kernel of the Hub, or that can't run here."""
    for field in ("attn_implementation", "_attn_implementation"):
        name = values.get(field)
        if name is None:
            continue
        if not isinstance(name, str) or name not in _INSTALLED:
            raise LoadError(
                f"The config.json of {source!r} gives {field} = {repr(name)[:80]}; allowed are "
                f"{', '.join(_INSTALLED)}. Kernels of the Hub, which are native code, are not run because a config "
                f"names them: remove {field} from config.json."
            )
        if not _INSTALLED[name]():
            raise LoadError(
                f"The config.json of {source!r} gives {field} = {name!r}, which is not installed on this machine. "
                f"Install it (package flash-attn), or remove {field} from config.json."
            )


def _wrong(source: str, field: str, value: object, allowed: str) -> LoadError:
    return LoadError(
        f"The config.json of {source!r} gives {field} = {repr(value)[:80]}; it must be {allowed}. {RESTORE}"
    )


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def _refuse_quantised(source: str, values: Mapping[str, Any]) -> None:
    for field in ("quantization_config", "compression_config"):
        if (quantisation := values.get(field)) is not None:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
            raise UnsupportedArchitectureError(
                f"The config.json of {source!r} has a {field} (quant_method {str(method)[:80]!r}). {QUANTISED}"
            )


def _check_functions(source: str, config: PreTrainedConfig) -> None:
    """Refuse names of functions that the library does not know, where it would raise a bare `KeyError`."""
    for field in _ACTIVATIONS:
        name = getattr(config, field, None)
        if name is not None and name not in ACT2CLS:
            raise LoadError(f"The config.json of {source!r}: {unknown_name(field, name, ACT2CLS)} {RESTORE}")
    allowed = ("default", *ROPE_INIT_FUNCTIONS)
    for kind in _rope_types(getattr(config, "rope_parameters", None)):
        if kind not in allowed:
            raise LoadError(f"The config.json of {source!r}: {unknown_name('rope_type', kind, allowed)} {RESTORE}")


def _check_rotation(source: str, parameters: Any) -> None:  # noqa: ANN401
    """Refuse parameters of the rotation by which it can't be computed, or gives no numbers."""
    if not isinstance(parameters, dict):
        return
    for name, value in parameters.items():
        _check_rotation(source, value)
        each = value if isinstance(value, list) else [value]
        if name.startswith("mscale") and value == 0:
            continue  # DeepSeek's scale of the attention, switched off
        if name in _ROTATION and value is not None and not all(_is_positive(factor) for factor in each):
            raise _wrong(source, f"{name} of the rotation", value, "finite and above 0")


def _rope_types(parameters: Any) -> Iterator[object]:  # noqa: ANN401
    """Yield the kinds of rotation that a config names: one, or one per type of layer."""
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters:
        yield parameters["rope_type"]
    for value in parameters.values():
        yield from _rope_types(value)
