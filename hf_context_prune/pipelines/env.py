"""What a bug report needs to say of this machine; nothing is sent anywhere."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from hf_context_prune.modeling.generation import hardware_name
from hf_context_prune.storage.cache import cache_dir
from hf_context_prune.utils.distributed import default_device
from hf_context_prune.utils.memory import free_memory
from hf_context_prune.utils.version import __version__

PACKAGES = (
    *("torch", "transformers", "tokenizers", "accelerate", "huggingface-hub", "datasets", "safetensors", "peft"),
    *("numpy", "scipy", "gguf", "trl", "optimum-quanto", "torchao", "onnxruntime", "xllamacpp", "gradio", "vllm"),
)
"""Packages whose versions matter; those that are not installed are left out."""


@dataclass(frozen=True)
class Environment:
    """The versions and the machine of a bug report.

    Attributes:
        version: Version of this package.
        python: Version of Python.
        platform: Operating system and processor architecture.
        packages: Versions of the installed packages that matter, by name.
        processor: Name of the device that models run on, as the system gives it.
        device: The torch device that models are loaded to by default.
        cpus: Number of processor cores that this process may use.
        threads: Number of threads that torch uses.
        memory_free: Bytes of memory that are free.
        memory_total: Bytes of memory of the machine.
        cache_folder: The cache folder of this package; the home folder is written as ``~``.
        cache_bytes: Bytes in each part of the cache, by name.
    """

    version: str
    python: str
    platform: str
    packages: dict[str, str]
    processor: str
    device: str
    cpus: int
    threads: int
    memory_free: int
    memory_total: int
    cache_folder: str
    cache_bytes: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def describe_environment() -> Environment:
    """Collect versions, machine and cache of this process.

    Raises:
        ConfigError: The cache folder is that of an unknown user.
    """
    device, cache = default_device(), cache_dir()
    return Environment(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=_versions(),
        processor=hardware_name(device),
        device=str(device),
        cpus=len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_free=free_memory(),
        memory_total=psutil.virtual_memory().total,
        cache_folder=_without_home(cache),
        cache_bytes=_sizes(cache),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _without_home(path: Path) -> str:
    """Return a path without the name of the user, since bug reports are public."""
    home = Path.home()
    if path.is_relative_to(home):
        return f"~/{path.relative_to(home).as_posix()}"
    return str(Path(*("..." if part == home.name else part for part in path.parts)))


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes in each entry of a folder; a file that goes away meanwhile has none."""
    if not folder.is_dir():
        return {}
    return {entry.name: _bytes_in(entry) for entry in sorted(folder.iterdir())}


def _bytes_in(entry: Path) -> int:
    files = [entry] if not entry.is_dir() else [path for path in entry.rglob("*") if not path.is_dir()]
    total = 0
    for path in files:
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue
    return total
