"""How long a run will take on this machine: products of one layer's size are timed, and the rest follows from shapes.

That is meant to tell minutes from hours. It leaves out evaluation and training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_context_prune.config import CalibrationConfig, PrunerConfig
from hf_context_prune.modeling.architectures import TARGETS, output_weight
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.probing import SEARCH_TOKENS, TOKENS_PER_FEATURE
from hf_context_prune.pruning.allocation.sensitivity import PROBE_TOKENS, PROBES
from hf_context_prune.pruning.scoring import Requirements
from hf_context_prune.pruning.sequential.regression import keeps_rows
from hf_context_prune.pruning.vocabulary.refit import num_refit_samples
from hf_context_prune.utils.precision import rounded_product

_TIMED_TOKENS = 256
"""Tokens of the timed products of a layer."""
_TIMED_WIDTH = 4096
"""Most rows and columns of a matrix that is multiplied; the time of a larger one follows from it."""
_TIMED_SIZE = 1024
"""Rows and columns of the timed products of equations."""
_WALK = 2.5
"""Forward passes of the walk: the base model's, and the pruned one's before and behind each projection."""
_SKETCH = 5
"""Forward passes that the gradients of the search are worth."""
_SYSTEMS = 7
"""Systems of a projection: four trial ridges, the best full weights, and two for the narrowed ones."""


def estimate_seconds(model: PreTrainedModel, config: CalibrationConfig) -> dict[str, float]:
    """Return the seconds of each long step, from products that are timed here: about a second of work.

    Args:
        model: The base model; its weights may be on the meta device.
        config: All choices.
    """
    view = ModelView.of_shapes(model)
    tokens = config.num_calibration_samples * config.max_seq_length
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    dense = _seconds_per_token(view, model.dtype, device)
    if not isinstance(config, PrunerConfig):
        return {"calibration": tokens * dense}
    steps: dict[str, float] = {}
    if config.prunes_layers:
        cost = _timed_costs()
        shapes = [
            tuple(output_weight(view.output_projection(index, target)).shape)
            for index in range(len(view.layers))
            for target in TARGETS
            if target in Requirements.of(config).targets
        ]
        if config.allocation == "adaptive":
            widest = max(widths.neurons for widths in view.widths)
            text = min(tokens, max(SEARCH_TOKENS, TOKENS_PER_FEATURE * widest))
            steps["search"] = (text + _SKETCH * PROBE_TOKENS) * dense
            steps["search"] += sum(_search_seconds(m, n, text, cost) for m, n in shapes)
        steps["layers"] = _WALK * tokens * dense + sum(_solver_seconds(m, n, tokens, cost) for m, n in shapes)
    if config.refits_lm_head:
        samples = num_refit_samples(model, config.num_calibration_samples, config.max_seq_length)
        steps["refit of the LM head"] = 2 * samples * config.max_seq_length * dense
    return steps


def describe_seconds(steps: Mapping[str, float]) -> str:
    """Return the estimate as a sentence."""
    parts = ", ".join(f"{step} {_rounded(seconds)}" for step, seconds in steps.items())
    return (
        f"Takes about {_rounded(sum(steps.values()))} on this machine when it is idle ({parts}), beside evaluation and "
        f"training."
    )


def _rounded(seconds: float) -> str:
    """Return a time of two digits at most: an estimate is no better than that."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36_000 else f"{round(seconds / 3600)} h"


def _seconds_per_token(view: ModelView, dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds of all layers for a token: of the products with each of a layer's matrices."""
    total = 0.0
    known: dict[tuple[int, int], float] = {}
    for layer in view.layers:
        for weight in layer.parameters():
            if weight.ndim < 2:
                continue
            high, wide = (min(size, _TIMED_WIDTH) for size in weight.shape[-2:])
            if (high, wide) not in known:
                left, right = (torch.ones(n, wide, dtype=dtype, device=device) for n in (_TIMED_TOKENS, high))
                known[high, wide] = _timed(partial(_multiply, left, right))
            total += known[high, wide] * (weight.numel() / (high * wide))
    return total / _TIMED_TOKENS


def _timed_costs() -> Mapping[str, float]:
    """Return the seconds of a multiplication with addition, by kind of product."""
    matrix = torch.ones(_TIMED_SIZE, _TIMED_SIZE)
    wide = matrix.double()
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "rounded": lambda: rounded_product(matrix, matrix),
        "float32": lambda: matrix @ matrix,
        "float64": lambda: wide @ wide,
    }
    return {kind: _timed(function) / _TIMED_SIZE**3 for kind, function in kinds.items()}


def _multiply(left: torch.Tensor, right: torch.Tensor) -> None:
    product = left @ right.T
    if product.device.type == "cuda":
        torch.cuda.synchronize(product.device)


def _timed(function: Callable[[], object]) -> float:
    """Return the seconds of the fastest of three calls."""
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    return min(found)


def _solver_seconds(outputs: int, features: int, tokens: int, cost: Mapping[str, float]) -> float:
    """Return the seconds of the equations of one output projection."""
    size, others, kind = (
        (tokens, features, "float32") if keeps_rows(features, tokens) else (features, tokens, "float64")
    )
    systems = _SYSTEMS * (size**3 / 3 + size**2 * outputs)
    surgeon = size**3 + size * features * outputs / 4
    return (systems + surgeon) * cost[kind] + size**2 * others * cost["rounded"]


def _search_seconds(outputs: int, features: int, tokens: int, cost: Mapping[str, float]) -> float:
    """Return the seconds of the Gram matrix, the surgeon's ranks and the probed widths of one output projection."""
    kept = [share * features for share in PROBES]
    systems = sum(n**3 / 3 + n**2 * outputs + n * (features - n) * outputs for n in kept)
    ranks = features**3 + features**2 * (outputs + features)
    return (systems + ranks) * cost["float64"] + features**2 * tokens * cost["rounded"]
