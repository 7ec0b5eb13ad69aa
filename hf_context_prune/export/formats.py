"""The formats: their packages, their data types of weights, and the difference that an artefact may have."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from hf_context_prune.errors import ConfigError, ExportError, unknown_name
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.utils.memory import free_memory
from hf_context_prune.utils.version import install_command

from .runtime import Runtime
from .verify import Tolerance

Importance = Mapping[str, NDArray[np.float32]]
"""Mean square of each input, by the name of the weight that reads it."""


class FormatModule(Protocol):
    """The functions that the module of a format has."""

    def check(self, loaded: LoadedModel, dtype: str) -> None:
        """Refuse a model that the format can't hold, with an ExportError."""

    def write(self, loaded: LoadedModel, folder: Path, dtype: str, **importance: Importance) -> None:
        """Write the artefact to an empty folder; this may change the model.

        `importance` is there only for data types that are `weighted`.
        """

    def load(self, folder: Path) -> Runtime:
        """Open the artefact in the format's own runtime."""


@dataclass(frozen=True)
class ExportFormat:
    """One format.

    Attributes:
        name: Name for users; the module of this name has its functions.
        extra: The extra of this package that installs its packages.
        packages: Import names of its packages.
        dtypes: The data types of its weights with the allowed difference of each; the first is the default.
        files: Patterns of the files that count as its size.
        dtype: Data type in which the model is loaded; ``"auto"``: as it was saved.
        copies: Copies of the loaded weights that writing holds in memory; 0: one tensor at a time.
        weighted: The data types whose errors can be weighted by the importance of inputs.
    """

    name: str
    extra: str
    packages: tuple[str, ...]
    dtypes: Mapping[str, Tolerance]
    files: tuple[str, ...]
    dtype: str = "auto"
    copies: int = 2
    weighted: frozenset[str] = frozenset()

    def check_memory(self, weights: int) -> None:
        """Refuse a model that this format can't be written from in the memory that is free.

        Args:
            weights: Bytes of the loaded weights.

        Raises:
            ExportError: The message names the least that does.
        """
        needed, free = self.copies * weights, free_memory()
        if needed > free:
            raise ExportError(
                f"Writing {self.name} takes about {needed / 2**30:.1f} GiB of memory beside the model, and "
                f"{free / 2**30:.1f} GiB are free. Export to gguf, which takes one tensor at a time, or "
                f"use a machine with more memory."
            )

    def module(self) -> FormatModule:
        """Return the module with its functions.

        Raises:
            ConfigError: A package is not installed.
        """
        missing = [name for name in self.packages if not _is_installed(name)]
        if missing:
            raise ConfigError(
                f"The format {self.name!r} needs packages that are not installed ({', '.join(missing)}): "
                f"{install_command(self.extra)}."
            )
        return cast("FormatModule", importlib.import_module(f".{self.name}", __package__))

    def versions(self) -> dict[str, str]:
        """Return the versions of torch, transformers and the packages of the format, by distribution."""
        found = importlib.metadata.packages_distributions()
        tops = ["torch", "transformers", *(name.partition(".")[0] for name in self.packages)]
        names = sorted({distribution for top in tops for distribution in found.get(top, ())})
        return {name: importlib.metadata.version(name) for name in names}

    def size(self, folder: Path) -> int:
        """Return the size of the artefact in a folder, in bytes."""
        return sum(path.stat().st_size for pattern in self.files for path in folder.glob(pattern))

    def tolerance(self, dtype: str) -> Tolerance:
        """Return the allowed difference for a data type of the weights.

        Raises:
            ConfigError: The format does not have this data type.
        """
        if dtype not in self.dtypes:
            raise ConfigError(unknown_name(f"--dtype for {self.name}", dtype, self.dtypes))
        return self.dtypes[dtype]


_QUANTISED = Tolerance(perplexity=0.03)
_TIE = 0.05

FORMATS: dict[str, ExportFormat] = {
    item.name: item
    for item in (
        ExportFormat(
            "quanto",
            "quanto",
            ("optimum.quanto",),
            {"int8": Tolerance(perplexity=0.05), "int4": Tolerance(perplexity=1.0)},
            ("*.safetensors",),
        ),
        ExportFormat("torchao", "torchao", ("torchao",), {"int8": _QUANTISED}, ("*.safetensors",)),
        ExportFormat(
            "onnx",
            "onnx",
            ("onnx", "onnxscript", "onnxruntime"),
            {"float32": Tolerance(perplexity=0.001, gap=0.001), "int8": _QUANTISED},
            ("*.onnx", "*.onnx.data"),
            dtype="float32",
        ),
        ExportFormat(
            "gguf",
            "gguf",
            ("xllamacpp",),
            {
                "q8_0": _QUANTISED,
                "f16": Tolerance(perplexity=0.01, gap=_TIE),
                "bf16": Tolerance(perplexity=0.02, gap=0.2),
                "q6_k": _QUANTISED,
                "q5_k_m": Tolerance(perplexity=0.1),
                "q4_k_m": Tolerance(perplexity=0.25),
                "q3_k_m": Tolerance(perplexity=1.0),
                "q2_k": Tolerance(perplexity=10.0),
            },
            ("*.gguf",),
            dtype="float32",
            copies=0,
            weighted=frozenset({"q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"}),
        ),
    )
}


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing too
        return False


def format_of(name: str) -> ExportFormat:
    """Return a format by its name, in letters of any case.

    Raises:
        ConfigError: There is no format of that name.
    """
    if name.lower() not in FORMATS:
        raise ConfigError(unknown_name("format", name, FORMATS))
    return FORMATS[name.lower()]
