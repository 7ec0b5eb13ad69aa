"""GGUF files, dequantised once to a folder in the cache."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_context_prune.errors import ContextPruneError, LoadError, SaveError
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.utils.foreign_code import drop_foreign_code

from .cache import CACHE_VARIABLE, cache_dir
from .manifest import hash_file, verify_if_ours
from .model_checks import check_complete, check_links, check_sizes
from .saving import estimate_bytes
from .staging import staged_folder

_LOGGER = logging.getLogger(__name__)


def resolve_source(name: str) -> str:
    """Return the path or Hub id to give to `transformers`; of a GGUF file, its dequantised copy in the cache."""
    return str(ensure_dequantised(Path(name))) if os.path.isfile(name) else name


def ensure_dequantised(gguf: Path) -> Path:
    """Return the float32 safetensors folder of a GGUF file, made once and cached under the file's sha256.

    Raises:
        LoadError: The file can't be read as a GGUF model, or the cache can't be written.
    """
    try:
        folder = cache_dir() / "gguf" / hash_file(gguf)
    except OSError as error:
        raise LoadError(f"{gguf} can't be read: {error}. Check its permissions, or download it again.") from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # a second run waits for the first and reads its result
            if not _is_cached(folder):
                dequantise(gguf, folder)
    except OSError as error:
        cause = error.__cause__ if isinstance(error, SaveError) else error  # a SaveError advises on --output
        if isinstance(error, LoadError) or cause is None:
            raise
        raise LoadError(
            f"The dequantised {gguf.name} can't be kept in the cache folder {folder.parent}: {cause}. Set "
            f"{CACHE_VARIABLE} to a writable folder with free space."
        ) from error
    return folder


def _is_cached(folder: Path) -> bool:
    """Return whether the copy was made before, and is whole."""
    try:
        return verify_if_ours(folder) is not None
    except LoadError as error:
        raise LoadError(f"{error} Or remove {folder}, which the next run makes again from the GGUF file.") from error


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to a folder, in float32.

    Raises:
        LoadError: The file can't be read as a GGUF model.
        SaveError: The folder can't be written.
    """
    check_links(gguf.parent)  # transformers also reads the tokenizer_config.json and the chat template there
    _LOGGER.info("Dequantising %s once; the result is kept in the cache.", gguf.name)
    try:
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        check_sizes(config, spec_of(config))
        model, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            trust_remote_code=False,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by check_complete
        )
        check_complete(gguf.name, model.config, info)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    except ContextPruneError:
        raise
    except Exception as error:  # the readers of GGUF files raise many types
        raise LoadError(f"{gguf} can't be read as a GGUF model: {type(error).__name__}: {error}") from error
    model.config.name_or_path = gguf.stem
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain float32 now
    with staged_folder(folder, required_bytes=estimate_bytes(model)) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        drop_foreign_code(staging)  # of a tokenizer_config.json beside the file
