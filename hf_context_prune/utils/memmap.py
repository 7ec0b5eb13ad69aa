"""Tensors in memory-mapped temporary files."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from hf_context_prune.errors import SaveError

from .temporary import scratch_folder


def memmap_zeros(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros in a memory-mapped file in the folder for temporary files (``$TMPDIR``).

    The file has no name any more, and its room is free when the tensor is freed.

    Args:
        elements: Length of the tensor.
        dtype: Dtype of the tensor.

    Returns:
        [elements], zeros.

    Raises:
        SaveError: The disk has no room.
    """
    size = elements * dtype.itemsize
    with scratch_folder() as folder:  # removed at once: the mapping keeps the file alive
        path = folder / "memory"
        try:
            with path.open("xb") as file:
                if hasattr(os, "posix_fallocate"):  # without this, writing to a full disk ends the process by a signal
                    os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(str(path), shared=True, size=elements, dtype=dtype)
        except (OSError, RuntimeError) as error:
            raise SaveError(
                f"Data that does not fit into memory needs {size:,} bytes in {folder.parent}: {error}. Make room "
                f"there, set TMPDIR to a folder on a larger disk, or calibrate on fewer samples "
                f"(num_calibration_samples)."
            ) from error


def spill(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of tensors that lie in memory-mapped files; see [`memmap_zeros`][]."""
    return {
        name: memmap_zeros(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)
        for name, tensor in tensors.items()
    }
