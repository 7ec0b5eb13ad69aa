"""Tensors in memory-mapped temporary files."""

from __future__ import annotations

import os
import tempfile

import torch

from hf_context_prune.errors import SaveError


def memmap_zeros(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros in a memory-mapped file in the folder for temporary files (``$TMPDIR``).

    The file is removed when the tensor is freed.

    Args:
        elements: Length of the tensor.
        dtype: Dtype of the tensor.

    Returns:
        [elements], zeros.

    Raises:
        SaveError: The disk has no room.
    """
    size = elements * dtype.itemsize
    try:
        with tempfile.NamedTemporaryFile(prefix="hf-context-prune-") as file:  # the mapping keeps the file alive
            if hasattr(os, "posix_fallocate"):  # without this, writing to a full disk ends the process by a signal
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=elements, dtype=dtype)
    except (OSError, RuntimeError) as error:
        raise SaveError(
            f"Data that does not fit into memory needs {size:,} bytes in {tempfile.gettempdir()}: {error}. Make room "
            f"there, set TMPDIR to a folder on a larger disk, or calibrate on fewer samples (num_calibration_samples)."
        ) from error
