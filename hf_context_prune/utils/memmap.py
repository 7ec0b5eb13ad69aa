"""Tensors in memory-mapped temporary files."""

from __future__ import annotations

import os
import tempfile

import torch

from hf_context_prune.errors import SaveError


def memmap_zeros(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Room in a memory-mapped file of the folder for temporary files (``$TMPDIR``), which dies with the tensor.

    Args:
        elements: How many.
        dtype: Of the tensor.

    Returns:
        [elements], zeros.

    Raises:
        SaveError: The disk has no room.
    """
    size = elements * dtype.itemsize
    try:
        with tempfile.NamedTemporaryFile(prefix="hf-context-prune-") as file:  # the mapping keeps the file alive
            if hasattr(os, "posix_fallocate"):  # else a full disk shows as a signal, when the room is written to
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=elements, dtype=dtype)
    except (OSError, RuntimeError) as error:
        raise SaveError(
            f"What does not fit into memory needs {size:,} bytes in {tempfile.gettempdir()}: {error}. Make room there, "
            f"set TMPDIR to a folder of a larger disk, or calibrate on fewer blocks (num_calibration_samples)."
        ) from error
