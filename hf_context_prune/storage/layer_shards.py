"""Finished layers of a smaller model as files: its tensors are mapped from them, and they become its saved shards.

So the model never lies in memory as a whole, and its layers lie on the disk once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from hf_context_prune.modeling.tying import first_names
from hf_context_prune.utils.memmap import spill

from .kept_tensors import write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 2 * 10**9
"""Weights above which a model is saved in several files: saving holds one of them in memory."""
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class LayerShards:
    """The files of the layers of one smaller model.

    Args:
        folder: An existing folder; files of an earlier run there are replaced. None: files without a name, whose room
            is free with the tensors.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.files: list[Path] = []

    def keep(self, index: int, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write a layer's tensors, whole or not at all, and return them mapped from their file.

        Raises:
            SaveError: The file can't be written.
        """
        if self.folder is None:
            return spill(state)
        path = self.folder / f"layer-{index:04d}.safetensors"
        write_tensors(path, state, {"format": "pt"}, what="finished layer")
        self.files.append(path)
        return _map(path)

    def belong_to(self, model: PreTrainedModel) -> None:
        """Note that a model was built from these files, for [`save_weights`][]."""
        model._context_prune_shards = tuple(self.files)


def _map(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def save_weights(model: PreTrainedModel, target: Path) -> None:
    """Write config and weights of a model to an existing folder, in files of at most `SHARD_BYTES`.

    Files of layers that the model was built from, and whose values it still has, are linked there.
    """
    state = model.state_dict()
    first = first_names(model)
    rest = {name: tensor for name, tensor in state.items() if first.get(name, name) == name}
    files: dict[Path, dict[str, int]] = {}
    for path in getattr(model, "_context_prune_shards", ()):
        held = _read_unchanged(path, rest)
        if held is not None:
            files[path] = {name: rest.pop(name).nbytes for name in held}
    if not files:
        model.save_pretrained(target, max_shard_size=SHARD_BYTES)
        return
    sizes = files[target / _WEIGHTS] = {name: tensor.nbytes for name, tensor in rest.items()}
    # In one file, whatever its size: embedding and head are few tensors. The dictionary is emptied meanwhile.
    model.save_pretrained(target, state_dict=rest, max_shard_size=sum(sizes.values()) + 1)
    index: dict[str, str] = {}
    for number, (path, sizes) in enumerate(files.items(), start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        if path.parent == target:
            os.rename(path, target / name)
        else:
            _link(path, target / name)
        index |= dict.fromkeys(sizes, name)
    size = sum(sum(sizes.values()) for sizes in files.values())
    metadata = {"total_parameters": model.num_parameters(), "total_size": size}
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(index.items()))}, indent=2)
    (target / _INDEX).write_text(f"{text}\n", encoding="utf-8")


def _read_unchanged(path: Path, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a file where a model has all of them, unchanged (it may have been trained); else None."""
    try:
        held = _map(path)
    except (OSError, SafetensorError):  # a cache that was emptied meanwhile: the model has all values
        return None
    same = all(name in state and torch.equal(state[name].cpu(), tensor) for name, tensor in held.items())
    return held if same else None


def _link(path: Path, target: Path) -> None:
    """Give a file a second name; on another disk it is copied."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
