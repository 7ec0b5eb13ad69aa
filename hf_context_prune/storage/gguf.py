"""GGUF files, dequantised once to a folder in the cache."""

from __future__ import annotations

import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig
from transformers.integrations.gguf import GgufHeader, read_gguf_metadata

from hf_context_prune.errors import ContextPruneError, LoadError, SaveError
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.inference import dtype_name
from hf_context_prune.utils.foreign_code import drop_foreign_code
from hf_context_prune.utils.memory import free_memory

from .cache import CACHE_VARIABLE, cache_dir
from .manifest import hash_file, verify_if_ours
from .model_checks import check_complete, check_links, check_sizes
from .model_config import describe
from .saving import SIDE_FILES_BYTES, estimate_bytes
from .staging import bytes_with_margin, staged_folder
from .write_errors import format_bytes

if TYPE_CHECKING:
    from .loading import LoadedModel

_LOGGER = logging.getLogger(__name__)


def resolve_source(name: str) -> str:
    """Return the path or Hub id to give to `transformers`; of a GGUF file, its dequantised copy in the cache."""
    return str(ensure_dequantised(Path(name))) if os.path.isfile(name) else name


def ensure_dequantised(gguf: Path, dtype: torch.dtype | None = None) -> Path:
    """Return the safetensors folder of a GGUF file, made once per dtype and cached under the file's sha256.

    Args:
        gguf: The file.
        dtype: Floating-point type of the copy; None: as [`gguf_dtype`][] says.

    Raises:
        LoadError: The file can't be read as a GGUF model, or the cache can't be written.
    """
    try:
        digest = hash_file(gguf)
    except OSError as error:
        raise LoadError(f"{gguf} can't be read: {error}. Check its permissions, or download it again.") from error
    place = cache_dir() / "gguf"
    try:
        place.mkdir(parents=True, exist_ok=True)
        if dtype is None:
            check_links(gguf.parent)  # before anything there is read
            dtype = gguf_dtype(gguf)
        folder = _copy_of(digest, dtype)
        with FileLock(folder.with_suffix(".lock")):  # a second run waits for the first and reads its result
            if not _is_cached(folder):
                dequantise(gguf, folder, dtype)
    except OSError as error:
        cause = error.__cause__ if isinstance(error, SaveError) else error  # a SaveError advises on --output
        if isinstance(error, LoadError) or cause is None:
            raise
        raise LoadError(
            f"The dequantised {gguf.name} can't be kept in the cache folder {place}: {cause}. Set "
            f"{CACHE_VARIABLE} to a writable folder with free space."
        ) from error
    return folder


def conversion_bytes(path: Path, dtype: torch.dtype) -> int:
    """Return the bytes that the dequantised copy of a GGUF file will take; 0 of a folder, or if it is there.

    Args:
        path: A GGUF file or model folder.
        dtype: Floating-point type of the copy.
    """
    if not path.is_file() or _copy_of(hash_file(path), dtype).is_dir():
        return 0
    return _weight_bytes(path, dtype)


def _copy_of(digest: str, dtype: torch.dtype) -> Path:
    return cache_dir() / "gguf" / f"{digest}-{str(dtype).removeprefix('torch.')}"


def _check_room(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Refuse a conversion that has no room in memory or in the cache, before it begins."""
    size = _weight_bytes(gguf, dtype)
    needed, free = bytes_with_margin(size + SIDE_FILES_BYTES), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise LoadError(
            f"The dequantised {gguf.name} takes {format_bytes(needed)} in the cache, and the disk of {folder.parent} "
            f"has {format_bytes(free)} free. Make room there, or set {CACHE_VARIABLE} to a folder on another disk."
        )
    if size > free_memory():
        raise LoadError(
            f"Converting {gguf.name} takes at least {size / 2**30:.1f} GiB of memory, and {free_memory() / 2**30:.1f} "
            f"GiB may be taken. Take the safetensors of the same model, which are read layer by layer."
        )


def _weight_bytes(gguf: Path, dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(math.prod(shape) for shape in _read_header(gguf).shapes.values())


def _is_cached(folder: Path) -> bool:
    """Return whether the copy was made before, and is whole."""
    try:
        return verify_if_ours(folder) is not None
    except LoadError as error:
        raise LoadError(f"{error} Or remove {folder}, which the next run makes again from the GGUF file.") from error


_VARIABLE = "deci"
"""Architecture of llama.cpp whose layers have sizes of their own; transformers reads none of it."""


@dataclass(frozen=True)
class _Header:
    """What the header of a GGUF file says of its tensors.

    Attributes:
        architecture: Name of the architecture.
        shapes: Shapes by name, as in torch.
        end: First byte behind the tensors.
        dtype: Floating-point type of the weights; None where blocks of them are quantised.
        is_known: Whether transformers' own reader knows all types of tensors; else the package gguf reads them.
    """

    architecture: str
    shapes: dict[str, tuple[int, ...]]
    end: int
    dtype: torch.dtype | None
    is_known: bool


def _read_header(gguf: Path) -> _Header:
    """Read the header of a GGUF file; nothing is allocated for the sizes in it."""
    try:
        header = GgufHeader.from_file(str(gguf))
    except ValueError as error:
        if "not supported" not in str(error):
            raise
        reader = GGUFReader(gguf)  # it knows more types, and maps the file
        field = reader.get_field("general.architecture")
        if field is None:
            raise
        shapes = {tensor.name: tuple(map(int, reversed(tensor.shape.tolist()))) for tensor in reader.tensors}
        end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
        return _Header(str(field.contents()), shapes, int(end), None, is_known=False)
    end = max((header.data_start + tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    return _Header(header.architecture, shapes, end, header.dtype, is_known=True)


def gguf_dtype(gguf: Path) -> torch.dtype:
    """Return the floating-point type of a GGUF file's weights; of quantised ones bfloat16, which rounds them less.

    Raises:
        LoadError: The file can't be read as a GGUF model.
    """
    try:
        return _read_header(gguf).dtype or torch.bfloat16
    except Exception as error:  # the readers of GGUF files raise many types
        raise _unreadable(gguf, error) from error


def explain_gguf_sizes(*models: LoadedModel) -> tuple[str, ...]:
    """Return a sentence per GGUF model, which says that its sizes are those of the dequantised copy."""
    return tuple(
        f"{model.name} is a GGUF file of {model.source.stat().st_size / 1e6:,.1f} MB; bytes on disk, load time and "
        f"memory are those of its copy in {dtype_name(model.model)}."
        for model in models
        if model.source is not None and model.source.suffix.lower() == ".gguf"
    )


def read_gguf_config(gguf: Path) -> PreTrainedConfig:
    """Read the config of a GGUF file from its metadata, after comparing it with the sizes of the file's tensors.

    Only the header is read, and nothing is allocated for the sizes in it.

    Raises:
        LoadError: The header is damaged, or claims a model that the tensors of the file do not make.
        UnsupportedArchitectureError: The architecture is not in the table.
    """
    try:
        header, (metadata, names) = _read_header(gguf), read_gguf_metadata(str(gguf))
        if header.architecture == _VARIABLE:
            raise LoadError(
                f"{gguf} holds a model whose layers differ in width (architecture {_VARIABLE!r}), which only llama.cpp "
                f"opens. Take the folder that it was exported from."
            )
        blocks = {name.split(".")[1] for name in names if name.startswith("blk.")}
        _compare(
            gguf, f"{header.architecture}.block_count", metadata.get(f"{header.architecture}.block_count"), len(blocks)
        )
        if header.end > gguf.stat().st_size:
            raise LoadError(
                f"{gguf} has {gguf.stat().st_size:,} bytes, but its header lists tensors up to byte {header.end:,}: "
                f"the file was cut. Download it again."
            )
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        check_sizes(config, spec_of(config))
        shapes = header.shapes
        _compare(gguf, "a vocabulary of", config.vocab_size, shapes.get("token_embd.weight", (0,))[0])
        with torch.device("meta"):
            needed = AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
        if needed > (held := sum(math.prod(shape) for shape in shapes.values())):
            raise LoadError(
                f"The metadata of {gguf} describe a model of {needed:,} parameters, but its tensors hold {held:,}. "
                f"Download the file again."
            )
    except ContextPruneError:
        raise
    except Exception as error:  # the readers of GGUF files raise many types
        raise _unreadable(gguf, error) from error
    checked: PreTrainedConfig = config
    return checked


def _compare(gguf: Path, field: str, claimed: object, found: int) -> None:
    """Refuse a count in the metadata that is not that of the tensors."""
    if claimed != found:
        raise LoadError(
            f"The metadata of {gguf} give {field} {str(claimed)[:80]}, but its tensors are of {found}. Download the "
            f"file again."
        )


def _unreadable(gguf: Path, error: Exception) -> LoadError:
    return LoadError(
        f"{gguf} can't be read as a GGUF model: {describe(error)}. Download it again, or take the "
        f"safetensors of the same model."
    )


def dequantise(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model and tokenizer of a GGUF file to a folder.

    Args:
        gguf: The file.
        folder: The folder; absent.
        dtype: Floating-point type of the weights there.

    Raises:
        LoadError: The file can't be read as a GGUF model.
        SaveError: The folder can't be written.
    """
    check_links(gguf.parent)  # transformers also reads the tokenizer_config.json and the chat template there
    _LOGGER.info("Dequantising %s once; the result is kept in the cache.", gguf.name)
    try:
        read_gguf_config(gguf)
        _check_room(gguf, folder, dtype)
        known = {"quantization_config": GgufConfig(dequantize=True)} if _read_header(gguf).is_known else {}
        model, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            trust_remote_code=False,
            **known,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by check_complete
        )
        check_complete(gguf.name, model.config, info)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    except ContextPruneError:
        raise
    except Exception as error:  # the readers of GGUF files raise many types
        raise _unreadable(gguf, error) from error
    model.config.name_or_path = gguf.stem
    model.hf_quantizer = None  # whichever reader: nothing is quantised any more
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain numbers now
    with staged_folder(folder, required_bytes=estimate_bytes(model)) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        drop_foreign_code(staging)  # of a tokenizer_config.json beside the file
