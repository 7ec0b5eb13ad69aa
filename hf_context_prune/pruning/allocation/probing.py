"""Measure the curves of adaptive widths some layers at a time, and keep them for a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_context_prune.errors import SaveError
from hf_context_prune.modeling.architectures import Target
from hf_context_prune.modeling.patching import bfloat16_layers
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.calibrate import calibrate
from hf_context_prune.pruning.calibration.chunked import layer_groups
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.calibration.statistics import CalibrationStats, Key
from hf_context_prune.pruning.surgery import ReconstructFn
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils.distributed import broadcast_object, is_main_process, on_main_process
from hf_context_prune.utils.files import write_file
from hf_context_prune.utils.precision import reduced_precision_matmul
from hf_context_prune.utils.reading import read_json

from .budget import Curve
from .sensitivity import MOST_NATS, PROBES, measure_sensitivity, withhold_probe

SEARCH_TOKENS = 16_384
"""Least tokens of the statistics: widths need less text than the reconstruction."""
TOKENS_PER_FEATURE = 4
"""Tokens of the statistics, as a multiple of the widest layer's neurons, where that is more than `SEARCH_TOKENS`."""

Prepare = Callable[[CalibrationStats], tuple[Mapping[Key, torch.Tensor], ReconstructFn]]
"""Statistics -> (importance by layer and target, reconstruction)."""


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

    Where the Gram matrices of all layers would not fit, layers take turns. That costs passes over the text and changes
    no curve.

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
    for layers in layer_groups(model, targets):
        with bfloat16_layers(model), reduced_precision_matmul():  # its rounding is far below the ridge
            stats = calibrate(model, batches_of(fit), targets=targets, statistics=statistics, layers=layers)
        measure = partial(measure_sensitivity, model, *prepare(stats), probe, targets=targets)
        curves |= on_main_process(measure)
    if path is not None and is_main_process():
        _save(path, key, curves)
    return curves


def _read(path: Path, key: str) -> dict[Key, Curve] | None:
    """Return the curves of the same search, if an earlier run completed it."""
    try:
        kept = read_json(path)
        if not isinstance(kept, dict) or kept.get("key") != key:
            return None
        return {(layer, target): tuple(map(tuple, curve)) for layer, target, curve in kept["curves"]}  # type: ignore[misc]
    except (OSError, ValueError, KeyError, TypeError):  # cut short by a kill, or damaged: measured again
        return None


def _save(path: Path, key: str, curves: Mapping[Key, Curve]) -> None:
    """Write the curves with the key of their search."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(
            f"The measured widths can't be kept in {path}: {error}. Name another folder (resume_dir)."
        ) from error
    values = [[layer, target, curve] for (layer, target), curve in curves.items()]
    write_file(path, json.dumps({"key": key, "curves": values}))
