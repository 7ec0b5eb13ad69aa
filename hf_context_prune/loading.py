"""MODEL -> a causal LM with its tokenizer: from a local folder, the Hub, or a GGUF file. Never from a pickle."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils import cached_file

from . import modeling as modeling  # registers the variable-width classes with the auto classes
from .architectures import spec_of
from .cache import cache_dir
from .errors import ConfigError, ContextPruneError, LoadError
from .manifest import PICKLE_SUFFIXES, read_manifest, verify_folder
from .saving import estimate_bytes, staged_folder

_LOGGER = logging.getLogger(__name__)
_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory and where it came from.

    Attributes:
        model: The causal LM, in evaluation mode.
        tokenizer: Its tokenizer.
        name: Hub id, or the base name of the folder or file.
        revision: Commit of the Hub, else None.
        folder: Local folder with its safetensors files, for measuring memory; None for a model given in memory.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    revision: str | None
    folder: Path | None


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
    if dtype not in _DTYPES:
        raise ConfigError(f"Unknown dtype {dtype!r}; allowed are {', '.join(_DTYPES)}.")
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise LoadError(f"{path} is a file; MODEL must be a model folder, a .gguf file or a Hub id.")
        folder = _dequantised(path)
    elif path.is_dir():
        _check_folder(path)
        folder = path
    elif path.is_absolute() or path.suffix.lower() == ".gguf" or str(source).startswith(("./", "../", "~")):
        raise LoadError(f"{path} does not exist; MODEL must be a model folder, a .gguf file or a Hub id.")
    else:
        return _load_hub(str(source), dtype, revision, device)
    model, tokenizer = _load(str(folder), dtype, device, revision=None)
    return LoadedModel(model, tokenizer, path.resolve().name, None, folder)


def _load(source: str, dtype: str, device: str | None, revision: str | None) -> tuple[PreTrainedModel, Any]:
    try:
        spec_of(AutoConfig.from_pretrained(source, revision=revision))
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=_DTYPES[dtype], use_safetensors=True, revision=revision
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except ContextPruneError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError, SafetensorError...
        raise LoadError(
            f"{source} can't be loaded as a causal LM with its tokenizer: {type(error).__name__}: {error}"
        ) from error
    try:
        target = torch.device(device) if device else PartialState().device
        return model.eval().to(target), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {device!r} can't be used: {error}") from error


def _load_hub(source: str, dtype: str, revision: str | None, device: str | None) -> LoadedModel:
    try:
        config_file = Path(cached_file(source, "config.json", revision=revision))
    except Exception as error:  # repository not found, gated, offline, malformed id: OSError and ValueError kin
        raise LoadError(
            f"{source!r} is neither a local folder or file nor a Hub model that can be reached: {error}"
        ) from error
    folder = config_file.parent
    commit = folder.name  # the cache keeps every revision in a folder named by its commit
    model, tokenizer = _load(source, dtype, device, revision=commit)
    return LoadedModel(model, tokenizer, source, commit, folder)


def load_outline(source: str | Path, *, revision: str | None = None) -> PreTrainedModel:
    """The model on the meta device: shapes from the config alone, no weights.

    Args:
        source: As for [`load_model`][].
        revision: Branch, tag or commit of a Hub repository.

    Raises:
        LoadError: There is no config to read.
        UnsupportedArchitectureError: Its architecture is not in the table.
    """
    path = Path(source).expanduser()
    gguf = {"gguf_file": path.name} if path.is_file() and path.suffix.lower() == ".gguf" else {}
    try:
        config = AutoConfig.from_pretrained(path.parent if gguf else str(source), revision=revision, **gguf)
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(
            f"{str(source)!r} has no model config that can be read: {error}. MODEL must be a model folder, a .gguf "
            f"file or a Hub id."
        ) from error
    spec_of(config)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def load_pruned(folder: str | Path, *, dtype: str = "auto", verify: bool = True) -> PreTrainedModel:
    """Load a folder that this package saved, after checking it against its manifest.

    Args:
        folder: A local folder.
        dtype: As in [`load_model`][].
        verify: Check every file's sha256 first.

    Raises:
        LoadError: A file is missing, changed or unexpected, or a width does not belong to the weights.
    """
    if verify:
        verify_folder(folder)
    return load_model(folder, dtype=dtype).model


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} holds no config.json, so it is not a model folder.")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLE_SUFFIXES)
        if pickles:
            raise LoadError(
                f"{folder} holds its weights as a pickle ({', '.join(pickles)}), which can run any code when it is "
                f"loaded, and is refused. Convert it to safetensors once, where you trust it: "
                f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
            )
        raise LoadError(f"{folder} holds no *.safetensors file, so there are no weights to load.")
    if read_manifest(folder) is not None:
        verify_folder(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dequantised(gguf: Path) -> Path:
    """The float32 safetensors folder of a GGUF file, made once and kept in the cache under the file's sha256."""
    folder = cache_dir() / "gguf" / _sha256(gguf)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # a second run waits for the first, and then reads its result
        if read_manifest(folder) is None:
            _dequantise(gguf, folder)
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    _LOGGER.info("Dequantising %s once; the result is kept in the cache.", gguf.name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # as in _load: the readers raise whatever they meet
        raise LoadError(f"{gguf} can't be read as a GGUF model: {type(error).__name__}: {error}") from error
    spec_of(model.config)
    model.config._name_or_path = gguf.stem
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it is plain float32 from here on
    with staged_folder(folder, required_bytes=estimate_bytes(model)) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
