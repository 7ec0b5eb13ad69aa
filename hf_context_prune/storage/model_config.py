"""Reading of a model's config, with every check that needs no weight, before anything loops over a size in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from hf_context_prune.errors import ContextPruneError, LoadError, UnsupportedArchitectureError, unknown_name
from hf_context_prune.modeling.architectures import QUANTISED, spec_of
from hf_context_prune.modeling.configuration_context_pruned import check_config_size, check_layer_count

from .model_checks import RESTORE, check_size, check_sizes, list_size_fields

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_SHOWN = 500


def read_config(source: str, folder: Path, revision: str | None) -> PreTrainedConfig:
    """Read and check a model's config.

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
        values, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if not isinstance(values, dict):
            raise LoadError(
                f"The config.json of {source!r} holds a {type(values).__name__}, not an object with the fields of a "
                f"model config. {RESTORE}"
            )
        if values.get("model_type"):  # before AutoConfig, which may know the type only by remote code
            _check_values(source, values)
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except ContextPruneError:
        raise
    except _CONFIG_ERRORS as error:
        raise LoadError(f"The config.json of {source!r} is not a model config: {describe(error)}. {RESTORE}") from error
    check_sizes(config, spec_of(config))
    _check_functions(source, config)
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
    spec = spec_of(SimpleNamespace(model_type=str(values["model_type"])))
    _refuse_quantised(source, values)
    names = getattr(transformers, spec.config_class).attribute_map
    for field in list_size_fields(spec):
        for name in {field, names.get(field, field)}:
            if values.get(name) is not None:  # null may stand for a default
                check_size(name, values[name])
                if field == "num_hidden_layers":
                    check_layer_count(values[name], values.get("per_layer_config"))


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


def _rope_types(parameters: Any) -> Iterator[object]:  # noqa: ANN401
    """Yield the kinds of rotation that a config names: one, or one per type of layer."""
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters:
        yield parameters["rope_type"]
    for value in parameters.values():
        yield from _rope_types(value)
