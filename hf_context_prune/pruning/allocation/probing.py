"""Measure the curves of adaptive widths layer by layer, and keep them for a resumed run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.errors import error_context
from hf_context_prune.modeling.architectures import Target
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.layer_device import in_hand, layer_device
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.calibrate import check_weights_finite, collect, finish
from hf_context_prune.pruning.calibration.samples import Batch, batches_of
from hf_context_prune.pruning.calibration.statistics import CalibrationStats, Key, TargetStatistics
from hf_context_prune.pruning.sequential.hidden_states import Stream, StreamStorage, capture_streams, count_positions
from hf_context_prune.pruning.surgery import ReconstructFn
from hf_context_prune.storage.kept_values import read_kept_values, write_kept_values
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils.distributed import broadcast_object, is_main_process, on_main_process, shard
from hf_context_prune.utils.precision import reduced_precision_matmul

from .budget import Curve
from .sensitivity import MOST_NATS, PROBES, LayerPrices, withhold_probe

_NAME = "hf_context_prune.sensitivity"
SEARCH_TOKENS = 16_384
"""Least tokens of the statistics: widths need less text than the reconstruction."""
TOKENS_PER_FEATURE = 4
"""Tokens of the statistics, as a multiple of the widest layer's neurons, where that is more than `SEARCH_TOKENS`."""

Prepare = Callable[[CalibrationStats], tuple[Mapping[Key, torch.Tensor], ReconstructFn]]
"""Statistics -> (importance by layer and target, reconstruction)."""


@torch.no_grad()
def search_curves(
    model: PreTrainedModel,
    samples: torch.Tensor,
    *,
    targets: tuple[Target, ...],
    statistics: frozenset[str],
    prepare: Prepare,
    identity: str,
    state_dir: Path | None = None,
) -> dict[Key, Curve]:
    """Measure what every layer pays for every width, in memory that does not grow with the number of layers.

    The statistics of a layer are summed up, used and dropped while the text is on its way through the layers.

    Args:
        model: The base model.
        samples: Calibration samples, [samples, length], int64; a part of them is used.
        targets: Which units.
        statistics: As for `calibrate`.
        prepare: Computes importance and reconstruction from statistics.
        identity: All other values that decide the result.
        state_dir: Where the complete curves are kept; a later run of the same search reads them there.

    Returns:
        As `measure_sensitivity`.

    Raises:
        ConfigError: Too little text.
        SaveError: The curves can't be written.
    """
    widest = max(widths.neurons for widths in ModelView.of(model).widths)
    fit, probe = withhold_probe(samples, max(SEARCH_TOKENS, TOKENS_PER_FEATURE * widest))
    path, key = None, ""
    if state_dir is not None:
        key = resume_key(model, [{"fit": fit, "probe": probe}], identity, targets, PROBES, MOST_NATS)
        path = state_dir / f"widths-{key[:16]}.json"  # no file of anything else can have this name
        if (known := broadcast_object(_read(path, key))) is not None:
            return known
    curves: dict[Key, Curve] = {}
    with evaluation_mode(model, inference=False):
        for found in _measure_layers(model, batches_of(fit), probe, targets, statistics, prepare):
            curves |= found
    if path is not None and is_main_process():
        values = [[layer, target, curve] for (layer, target), curve in curves.items()]
        write_kept_values(path, values, key, what="measured widths")
    return curves


def _measure_layers(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    probe: torch.Tensor,
    targets: tuple[Target, ...],
    statistics: frozenset[str],
    prepare: Prepare,
) -> Iterator[dict[Key, Curve]]:
    """Yield the curves of each layer, in all processes. The main one alone measures; all sum up the statistics."""
    view, mine = ModelView.of(model), shard(batches)
    check_weights_finite(model)
    main: list[LayerPrices] = []  # where no other process gets a copy
    on_main_process(lambda: main.append(LayerPrices(view, targets, probe)))
    storage, device = StreamStorage(count_positions(mine), device=layer_device(model)), layer_device(model)
    streams = capture_streams(view, mine, storage, base_only=True)
    for index in tqdm(range(len(view.layers)), desc="Measuring layers", unit="layer", name=_NAME):
        with in_hand(view.layers[index], device):
            found = _sum_up(view, index, streams, targets, statistics)
            importance, reconstruct = prepare(CalibrationStats(found))
            yield on_main_process(partial(_price, main, index, importance, reconstruct))
            del found, importance, reconstruct


def _sum_up(
    view: ModelView, index: int, streams: Sequence[Stream], targets: tuple[Target, ...], statistics: frozenset[str]
) -> dict[Key, TargetStatistics]:
    """Move the streams behind a layer, and return the statistics of its projections' inputs."""
    with error_context(f"layer {index}"), collect(view, targets, [index], gram="gram" in statistics) as collectors:
        for number, stream in enumerate(streams):
            for collector in collectors.values():
                collector.batch, collector.mask = number, stream.mask
            with reduced_precision_matmul():  # its rounding is far below the ridge
                stream.base.copy_(stream.call(index, view.layers[index], stream.base))
        return finish(collectors)


def _price(
    main: Sequence[LayerPrices], index: int, importance: Mapping[Key, torch.Tensor], reconstruct: ReconstructFn
) -> dict[Key, Curve]:
    (prices,) = main
    return prices.price(index, importance, reconstruct)


def _read(path: Path, key: str) -> dict[Key, Curve] | None:
    """Return the curves of the same search, if an earlier run completed it."""
    kept = read_kept_values(path, key)
    return None if kept is None else {(layer, target): tuple(map(tuple, curve)) for layer, target, curve in kept}  # type: ignore[misc]
