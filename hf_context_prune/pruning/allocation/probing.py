"""Statistics of some layers at a time, and the search of adaptive widths by them, its curves kept for a resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_context_prune.errors import SaveError
from hf_context_prune.modeling.architectures import Target, check_supported
from hf_context_prune.modeling.specs import read_geometry
from hf_context_prune.pruning.calibration.calibrate import calibrate
from hf_context_prune.pruning.calibration.chunked import layer_groups
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.calibration.statistics import CalibrationStats, Key
from hf_context_prune.pruning.surgery import ReconstructFn
from hf_context_prune.storage.files import write_file
from hf_context_prune.storage.resume import resume_key
from hf_context_prune.utils.distributed import broadcast_object, is_main_process, on_main_process

from .budget import Curve
from .sensitivity import PROBE_TOKENS, PROBES, measure_sensitivity, withhold_probe

SEARCH_TOKENS = 16_384
"""Text of the statistics, or `TOKENS_A_FEATURE` times the widest layer: widths need less of it than the refit."""
TOKENS_A_FEATURE = 4
_NAME = "widths.json"

Prepare = Callable[[CalibrationStats], tuple[Mapping[Key, torch.Tensor], ReconstructFn]]


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
    """Measure what every layer pays for every width, within a memory that does not grow with the number of layers.

    Where the Gram matrices of all layers would not fit, layers take turns: that costs passes over the text and changes
    no curve.

    Args:
        model: The dense model.
        samples: Text of the walk, [blocks, length], int64; a part of it is used.
        targets: Which units.
        statistics: As for `calibrate`.
        prepare: Importance and repair from statistics.
        identity: Whatever decides the result beside model and text.
        state_dir: Where the curves are kept once they are complete; the same search takes them from there.

    Returns:
        As `measure_sensitivity`.

    Raises:
        ConfigError: Too little text.
        SaveError: The curves can't be kept.
    """
    widest = max(widths.neurons for widths in read_geometry(model.config, check_supported(model)).layers)
    fit, probe = withhold_probe(samples, max(SEARCH_TOKENS, TOKENS_A_FEATURE * widest))
    path, key = None, ""
    if state_dir is not None:
        path = state_dir / _NAME
        key = resume_key(model, [{"fit": fit, "probe": probe}], identity, targets, PROBES, PROBE_TOKENS)
        if (known := broadcast_object(_read(path, key))) is not None:
            return known
    curves: dict[Key, Curve] = {}
    for layers in layer_groups(model, targets):
        stats = calibrate(model, batches_of(fit), targets=targets, statistics=statistics, layers=layers)
        measure = partial(measure_sensitivity, model, *prepare(stats), probe, targets=targets)
        curves |= on_main_process(measure)
    if path is not None and is_main_process():
        _keep(path, key, curves)
    return curves


def _read(path: Path, key: str) -> dict[Key, Curve] | None:
    """The curves of the same search, if it came to its end."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or kept.get("key") != key:
        return None
    return {(layer, target): tuple(map(tuple, curve)) for layer, target, curve in kept["curves"]}  # type: ignore[misc]


def _keep(path: Path, key: str, curves: Mapping[Key, Curve]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(
            f"The measured widths can't be kept in {path}: {error}. Name another folder (resume_dir)."
        ) from error
    values = [[layer, target, curve] for (layer, target), curve in curves.items()]
    write_file(path, json.dumps({"key": key, "curves": values}))
