"""Calibrate some layers at a time, where the Gram matrices of all would not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from hf_context_prune.modeling.architectures import Target, output_weight
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.utils.distributed import broadcast_object
from hf_context_prune.utils.memmap import memmap_zeros
from hf_context_prune.utils.memory import free_memory

from .calibrate import calibrate
from .samples import Batch
from .statistics import CalibrationStats

GRAM_SHARE = 0.25
"""Share of the free memory that Gram matrices may take at once."""


def calibrate_in_turns(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    targets: tuple[Target, ...],
    statistics: frozenset[str],
) -> CalibrationStats:
    """Do the same as [`calibrate`][] in limited memory: Gram matrices that would not fit lie in a memory-mapped file.

    Raises:
        SaveError: The disk has no room for them.
    """
    turns = list(layer_groups(model, targets)) if "gram" in statistics else []
    if len(turns) < 2:
        return calibrate(model, batches, targets=targets, statistics=statistics)
    result = CalibrationStats()
    for layers in turns:
        found = calibrate(model, batches, targets=targets, statistics=statistics, layers=layers)
        for key, own in found.targets.items():
            assert own.gram is not None
            room = memmap_zeros(own.gram.numel(), own.gram.dtype).view(own.gram.shape)
            result.targets[key] = replace(own, gram=room.copy_(own.gram))
        result.num_samples, result.num_tokens = found.num_samples, found.num_tokens
    return result


def layer_groups(model: PreTrainedModel, targets: tuple[Target, ...]) -> Iterator[range]:
    """Yield neighbouring layers whose Gram matrices fit into memory together, the same in all processes."""
    limit = broadcast_object(int(GRAM_SHARE * free_memory(model.device)))
    view = ModelView.of(model)
    first = held = 0
    for index in range(len(view.layers)):
        own = [target for target in targets if target in view.targets(index)]
        widths = (output_weight(view.output_projection(index, target)).shape[1] for target in own)
        size = sum(4 * width**2 for width in widths)
        if index > first and held + size > limit:
            yield range(first, index)
            first, held = index, 0
        held += size
    yield range(first, len(view.layers))
