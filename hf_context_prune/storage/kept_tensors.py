"""Tensors of finished work in a resume folder: one file, whole or absent, that belongs to exactly one key."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_context_prune.errors import SaveError

logger = logging.getLogger(__name__)


def read_kept_tensors(path: Path, key: str, *, remedy: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Return the tensors (on the CPU) and facts of a file, if it was written whole with this key; else None.

    Args:
        path: The file; it need not exist.
        key: See [`resume_key`][].
        remedy: What happens to a damaged file, for the log: "its layer is pruned again".
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s); %s.", path.name, error, remedy)
        return None


def write_kept_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], key: str, facts: Mapping[str, str] | None = None, *, what: str
) -> None:
    """Write a file that replaces an older one as a whole.

    Args:
        path: The file, in an existing folder.
        tensors: Tensors that share no memory.
        key: See [`resume_key`][].
        facts: Further texts, by name.
        what: The work that the file holds, for the message: "finished layer".

    Raises:
        SaveError: The file can't be written; an older one is as it was.
    """
    write_tensors(path, tensors, {**(facts or {}), "key": key}, what=what)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, what: str) -> None:
    """Write a safetensors file that replaces an older one as a whole; other arguments as [`write_kept_tensors`][].

    Raises:
        SaveError: The file can't be written; an older one is as it was.
    """
    partial = path.with_suffix(".partial")
    try:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, partial, metadata=dict(metadata))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise SaveError(
            f"A {what} can't be written to {path}: {error}. Make room, then run the same command again: it resumes "
            f"from the last {what}."
        ) from error


class KeptLayers:
    """Tensors of finished layers: one file each, whole or absent, in a folder for exactly one key.

    Args:
        folder: The folder; made if it is not there.
        key: See [`resume_key`][].

    Raises:
        SaveError: The folder can't be made.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(
                f"The folder for resuming, {folder}, can't be made: {error}. Name another (resume_dir)."
            ) from error

    def read(self, index: int, *, remedy: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        """Return the tensors and facts of a layer; None if none is whole. See [`read_kept_tensors`][]."""
        return read_kept_tensors(self._path(index), self.key, remedy=remedy)

    def write(self, index: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str] | None = None) -> None:
        """Write a layer; its file appears whole. See [`write_kept_tensors`][]."""
        write_kept_tensors(self._path(index), tensors, self.key, facts, what="finished layer")

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"
