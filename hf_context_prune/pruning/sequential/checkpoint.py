"""Finished layers of sequential reconstruction on disk, from which an interrupted run resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_context_prune.modeling.architectures import TARGETS, Target, output_weight
from hf_context_prune.modeling.geometry import ALL_UNITS, LayerWidths
from hf_context_prune.modeling.plan import LayerPlan
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.samples import Batch
from hf_context_prune.storage.kept_tensors import KeptLayers
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils.distributed import is_main_process
from hf_context_prune.utils.memmap import spill
from hf_context_prune.utils.memory import fits_in_memory

Output = tuple[torch.Tensor, torch.Tensor | None]
"""New weight [out, kept] and bias [out] of an output projection, in the model's dtype."""


@dataclass(frozen=True)
class FinishedLayer:
    """Kept units and reconstructed weights of one layer.

    Attributes:
        layer: Kept units.
        outputs: Reconstructed output projections, by target.
    """

    layer: LayerPlan
    outputs: dict[Target, Output] = field(default_factory=dict)


class SequentialCheckpoint:
    """One file per finished layer, each whole or absent, in a subfolder for exactly these inputs.

    Args:
        folder: Where the subfolder lies; None keeps nothing.
        model: The base model.
        batches: The calibration text.
        widths: Widths after pruning.
        options: All other values that decide the result.
    """

    def __init__(
        self,
        folder: Path | None,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        widths: Sequence[LayerWidths],
        *options: object,
    ) -> None:
        self._kept: KeptLayers | None = None
        if folder is None:
            view = ModelView.of(model)
            sizes = (output_weight(view.output_projection(*place)).nbytes for place in view.places())
            self._fits = fits_in_memory(sum(sizes))
            return
        key = resume_key(model, batches, list(widths), *options)
        self._kept = KeptLayers(folder / key[:16], key)

    def load(self, index: int) -> FinishedLayer | None:
        """Return a layer that an earlier run over the same inputs finished; None if there is none."""
        kept = None if self._kept is None else self._kept.read(index, remedy="its layer is pruned again")
        if kept is None:
            return None
        tensors, _ = kept
        targets = [target for target in TARGETS if f"{target}.weight" in tensors]
        units = [tuple(tensors[name].tolist()) for name in ALL_UNITS.values()]
        return FinishedLayer(
            LayerPlan(*units, gone=not any(units)),
            {target: (tensors[f"{target}.weight"], tensors.get(f"{target}.bias")) for target in targets},
        )

    def save(self, index: int, done: FinishedLayer) -> FinishedLayer:
        """Write a finished layer; its file appears whole.

        Returns:
            The same layer, mapped from its file. Without a folder it stays in memory, if those of all layers fit.

        Raises:
            SaveError: The file can't be written.
        """
        if self._kept is None:
            return done if self._fits else replace(done, outputs=_spill(done.outputs))
        if not is_main_process():
            return done
        tensors = {name: torch.tensor(getattr(done.layer, name), dtype=torch.int64) for name in ALL_UNITS.values()}
        for target, (weight, bias) in done.outputs.items():
            tensors[f"{target}.weight"] = weight
            if bias is not None:
                tensors[f"{target}.bias"] = bias
        self._kept.write(index, tensors)
        return self.load(index) or done


def _spill(outputs: Mapping[Target, Output]) -> dict[Target, Output]:
    """Return reconstructed output projections whose weights lie in memory-mapped files."""
    return {target: (spill({"weight": weight})["weight"], bias) for target, (weight, bias) in outputs.items()}
