"""MODEL -> a causal LM with its tokenizer: from a local folder, the Hub, or a GGUF file. Never from a pickle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_context_prune.errors import ConfigError, ContextPruneError, LoadError, unknown_name
from hf_context_prune.modeling.architectures import check_supported, spec_of
from hf_context_prune.utils.distributed import device as default_device

from .gguf import ensure_dequantised, resolve_source
from .manifest import PICKLE_SUFFIXES, read_manifest, verify_folder
from .model_checks import RESTORE, check_complete, check_size, check_sizes, check_weights, list_size_fields

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONVERT = (
    "Convert them to safetensors once, where you trust them: from_pretrained(...).save_pretrained(...) of "
    "AutoModelForCausalLM."
)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory and where it came from.

    Attributes:
        model: The causal LM, in evaluation mode.
        tokenizer: Its tokenizer.
        name: Hub id, or the base name of the folder or file.
        revision: Commit of the Hub, else None.
        folder: Local folder with its safetensors files, for measuring memory; None for a model given in memory.
        source: The local folder or GGUF file that was named; None for a Hub id, or without a place of its own.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    revision: str | None
    folder: Path | None
    source: Path | None = None


def explain_gguf_sizes(*models: LoadedModel) -> tuple[str, ...]:
    """A sentence on each model whose folder is not what was named, for whoever reads sizes."""
    return tuple(
        f"{model.name} is a GGUF file of {model.source.stat().st_size / 1e6:,.1f} MB; bytes on disk, load time and "
        f"memory are those of its copy in float32."
        for model in models
        if model.source is not None and model.source.suffix.lower() == ".gguf"
    )


def load_model(
    source: str | Path, *, dtype: str = "auto", revision: str | None = None, device: str | None = None
) -> LoadedModel:
    """Load a causal LM with its tokenizer.

    Args:
        source: A local folder, a ``.gguf`` file (dequantised once to float32 and cached), or a Hub id. What exists
            locally wins over a Hub id.
        dtype: ``"auto"`` (as saved), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        revision: Branch, tag or commit of a Hub repository.
        device: A torch device; None takes what accelerate finds (an accelerator if there is one, else the CPU).

    Raises:
        LoadError: Missing, damaged, without safetensors, or not a causal LM.
        UnsupportedArchitectureError: Its architecture is not in the table.
        ConfigError: An unknown dtype or device.
    """
    _check_dtype(dtype)
    path = _local_path(source)
    if path is None:
        return _load_hub(str(source), dtype, revision, device)
    if path.is_file():
        return _load_folder(ensure_dequantised(path), path, dtype, device)
    _check_folder(path)
    if read_manifest(path) is not None:
        verify_folder(path)
    return _load_folder(path, path, dtype, device)


def _check_dtype(dtype: str) -> None:
    if dtype not in _DTYPES:
        raise ConfigError(unknown_name("dtype", dtype, _DTYPES))


def _load_folder(folder: Path, source: Path, dtype: str, device: str | None) -> LoadedModel:
    model, tokenizer = _load(str(folder), folder, dtype, device, revision=None)
    model.config.name_or_path = str(source)  # of a GGUF file, and not of its copy: a training asks the model alone
    return LoadedModel(model, tokenizer, source.resolve().name, None, folder, source)


def _local_path(source: str | Path) -> Path | None:
    """The folder or GGUF file that a source names; None for a Hub id."""
    if isinstance(source, str) and not source.strip():  # which Path takes for the current folder
        raise LoadError(f"MODEL is {source!r}; it must be a model folder, a .gguf file or a Hub id.")
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise LoadError(f"{path} is a file; MODEL must be a model folder, a .gguf file or a Hub id.")
    if path.exists():
        return path
    if path.is_absolute() or path.suffix.lower() == ".gguf" or str(source).startswith(("./", "../", "~")):
        raise LoadError(f"{path} does not exist; MODEL must be a model folder, a .gguf file or a Hub id.")
    return None


def _load(
    source: str, folder: Path, dtype: str, device: str | None, revision: str | None
) -> tuple[PreTrainedModel, Any]:
    try:
        config = _read_config(source, revision)
        if not hasattr(config, "transformers_weights"):  # which names another file
            if revision is not None:
                _fetch_weights(source, revision)
            check_weights(folder, config, sharded=revision is None)
        # Without trust_remote_code=False, transformers would ask on the terminal whether to run a repository's code.
        # It draws tensors that are missing at random, and says so in its log alone.
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=_DTYPES[dtype],
            use_safetensors=True,
            revision=revision,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by check_complete
        )
        check_complete(source, model.config, info)
        tokenizer = _load_tokenizer(source, revision)
    except ContextPruneError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError, SafetensorError...
        raise LoadError(
            f"{source} can't be loaded as a causal LM with its tokenizer: {type(error).__name__}: {error}"
        ) from error
    try:
        target = torch.device(device) if device else default_device()
        return model.eval().to(target), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {device!r} can't be used: {error}") from error


def _load_tokenizer(source: str, revision: str | None) -> Any:  # noqa: ANN401
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # as in _load
        raise LoadError(
            f"{source} holds a model, but no tokenizer that can be loaded. Save it there (tokenizer.save_pretrained); "
            f"ContextPruneCallback saves the one that its Trainer got as processing_class. "
            f"{type(error).__name__}: {error}"
        ) from error


def _read_config(source: str, revision: str | None) -> PreTrainedConfig:
    values, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    if not isinstance(values, dict):
        raise LoadError(
            f"The config.json of {source!r} holds a {type(values).__name__}, not an object with the fields of a model "
            f"config. {RESTORE}"
        )
    if model_type := values.get("model_type"):  # before AutoConfig, which knows fewer types and may want to run code
        spec = spec_of(SimpleNamespace(model_type=str(model_type)))
        names = getattr(transformers, spec.config_class).attribute_map
        for field in list_size_fields(spec):  # before the config class, which divides by some of them
            for name in {field, names.get(field, field)}:
                if values.get(name) is not None:  # null may stand for a default
                    check_size(name, values[name])
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (StrictDataclassError, TypeError, ArithmeticError, AttributeError, AssertionError) as error:
        raise LoadError(
            f"The config.json of {source!r} is not a config of a model: {type(error).__name__}: {error}. {RESTORE}"
        ) from error
    check_sizes(config, spec_of(config))
    return config


def _load_hub(source: str, dtype: str, revision: str | None, device: str | None) -> LoadedModel:
    folder = _pinned(source, revision)
    model, tokenizer = _load(source, folder, dtype, device, revision=folder.name)
    return LoadedModel(model, tokenizer, source, folder.name, folder)


def _pinned(source: str, revision: str | None) -> Path:
    """A Hub model's folder in the cache, which is named by the commit; everything else is then read at that commit."""
    try:
        return Path(hf_hub_download(source, "config.json", revision=revision)).parent
    except RemoteEntryNotFoundError as error:
        raise LoadError(
            f"{source!r} has no config.json on the Hub, so it is no model of transformers. Of a GGUF repository, "
            f"download the .gguf file and pass its path; of an adapter, merge it into its model first."
        ) from error
    except (OSError, ValueError, HTTPError) as error:
        raise _hub_error(source, revision, error) from error


def _fetch_weights(source: str, commit: str) -> None:
    """Fetch a Hub model's weights, or the index of their shards, ahead of transformers.

    It takes all that can go wrong with this file (no network, an overloaded Hub) for a file that is not there, and
    then advises to load the pickle.
    """
    failure: Exception | None = None
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        try:
            hf_hub_download(source, name, revision=commit)
            return
        except RemoteEntryNotFoundError:
            continue
        except (OSError, ValueError, HTTPError) as error:
            failure = error
    if failure is not None:
        raise _hub_error(source, commit, failure) from failure
    raise LoadError(
        f"{source!r} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} at commit {commit}. Weights "
        f"as a pickle (pytorch_model.bin) can run any code when they are loaded, and are refused. {_CONVERT}"
    )


def _hub_error(source: str, revision: str | None, error: Exception) -> LoadError:
    if isinstance(error, GatedRepoError):
        what = "is gated on the Hub; ask for access on its page, then log in with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        what = (
            "is neither a local folder or file nor a public model on the Hub; check the spelling, or log in with "
            "`hf auth login` if it is private"
        )
    elif isinstance(error, RevisionNotFoundError):
        what = f"has no branch, tag or commit {revision!r} on the Hub"
    elif isinstance(error, HFValidationError):
        what = "is neither a local folder or file nor a Hub id (owner/name)"
    else:
        what = (
            "is not whole in the cache and can't be fetched from the Hub; check the network and HF_HUB_OFFLINE, or try "
            "again later"
        )
    return LoadError(f"{source!r} {what} ({type(error).__name__}: {error})")


def load_meta_model(source: str | Path, *, revision: str | None = None) -> PreTrainedModel:
    """The model on the meta device: shapes from the config alone, no weights.

    Args:
        source: As for [`load_model`][].
        revision: Branch, tag or commit of a Hub repository.

    Raises:
        LoadError: There is no config to read, or no model of its sizes could be built.
        UnsupportedArchitectureError: Its architecture is not in the table.
    """
    path = _local_path(source)
    name, commit = (str(source), _pinned(str(source), revision).name) if path is None else (str(path), None)
    try:
        if path is not None and path.is_file():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            check_sizes(config, spec_of(config))
        else:
            config = _read_config(name, commit)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return model
    except ContextPruneError:
        raise
    except Exception as error:  # configs raise OSError, ValueError, KeyError, StrictDataclassError; models any
        raise LoadError(
            f"{name!r} has no model config that can be used ({type(error).__name__}: {error}). {RESTORE} MODEL must "
            f"be a model folder, a .gguf file or a Hub id."
        ) from error


def load_pruned(folder: str | Path, *, dtype: str = "auto", verify: bool = True) -> PreTrainedModel:
    """Load a folder that this package saved, after checking it against its manifest.

    Args:
        folder: A local folder.
        dtype: As in [`load_model`][].
        verify: Check every file's sha256 first; False reads no manifest at all.

    Raises:
        LoadError: A file is missing, changed or unexpected, or a width does not belong to the weights.
    """
    _check_dtype(dtype)
    path = _local_path(folder)
    if path is None:
        raise LoadError(f"{folder} does not exist; load_pruned takes a local folder, load_model a Hub id too.")
    if verify:
        verify_folder(path)
    _check_folder(path)
    return _load_folder(path, path, dtype, device=None).model


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} holds no config.json, so it is not a model folder.")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLE_SUFFIXES)
        if pickles:
            raise LoadError(
                f"{folder} holds its weights as a pickle ({', '.join(pickles)}), which can run any code when it is "
                f"loaded, and is refused. {_CONVERT}"
            )
        raise LoadError(f"{folder} holds no *.safetensors file, so there are no weights to load.")


def ensure_loaded(model: PreTrainedModel | LoadedModel | str | Path, tokenizer: Any) -> LoadedModel:  # noqa: ANN401
    """A model with its tokenizer and name, loaded where it is named only.

    Raises:
        ConfigError: No tokenizer can be found.
    """
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        return load_model(model)
    check_supported(model)
    name = model.config.name_or_path
    if tokenizer is None:
        if not name:
            raise ConfigError("The model does not say where it came from; pass its tokenizer: prune(..., tokenizer=).")
        try:
            tokenizer = AutoTokenizer.from_pretrained(resolve_source(name))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"No tokenizer can be loaded from {name!r}, where the model came from ({error}). Pass it: "
                f"prune(..., tokenizer=)."
            ) from error
    return in_memory(model, tokenizer)


def in_memory(model: PreTrainedModel, tokenizer: Any) -> LoadedModel:  # noqa: ANN401
    """A model that is loaded already, with the place that it says it is from."""
    name = model.config.name_or_path
    source = Path(name) if name and Path(name).exists() else None
    return LoadedModel(model, tokenizer, format_model_name(name), None, None, source)


def format_model_name(name: str) -> str:
    """How a report names the base: no machine's paths."""
    if not name:
        return "in-memory"
    return Path(name).resolve().name if Path(name).exists() else name
