"""One pruning of a model that is being trained."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import CalibrationWarning
from hf_context_prune.modeling.plan import PruningPlan, fingerprint
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.planner import plan_and_reconstruct
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.utils.distributed import num_processes
from hf_context_prune.utils.version import versions

from .batches import pack_samples
from .checkpoints import PruningProgress
from .schedule import PruningSchedule, config_for_pruning
from .transplant import compose_plans, narrow_in_place, zero_in_place

_ADAPTIVE_SAMPLES = 16
"""Samples that adaptive allocation needs at least."""


def prune_in_training(
    model: PreTrainedModel,
    optimizer: Optimizer,
    progress: PruningProgress,
    config: PrunerConfig,
    schedule: PruningSchedule,
    *,
    step: int,
) -> None:
    """Do the next pruning of a schedule by the last tokens of the training.

    Args:
        model: Pruned in place; with several processes, removed units are zeroed.
        optimizer: Trains `model`; its state is mapped.
        progress: Holds the tokens; plan and metrics are set.
        config: Config of the whole training.
        schedule: Schedule of the whole training.
        step: The step that was just done.

    Raises:
        DataError: There is too little text.
        NumericsError: Weights or activations are no longer numbers.
    """
    several = num_processes() > 1
    current = ModelView.of(_without_zeroed(model, progress.plan) if several else model)
    share, size = schedule.share(progress.num_done), current.num_parameters
    asked = config_for_pruning(share, config, progress.dense, current.widths, progress.final, progress.total_params)
    smaller = None
    if progress.final is None and (asked.target_params or 0) >= size:  # whole units: the last pruning went so far
        plan = PruningPlan.identity(current.spec.model_type, current.geometry)
    else:
        fewest = _ADAPTIVE_SAMPLES if config.allocation == "adaptive" else 1
        length = config.max_seq_length
        samples = pack_samples(progress.tokens, current.model, max_seq_length=length, at_least=fewest)
        if progress.num_done == 0 and samples.numel() < config.num_calibration_samples * length:
            _warn_of_little_text(samples, config, step)
        plan, reconstruct = plan_and_reconstruct(current.model, samples, asked)
        smaller = apply_plan(current.model, plan, reconstruct=reconstruct)
        size = smaller.num_parameters()
    pruning = {"step": step, "parameters": size, "tokens": len(progress.tokens)}
    whole = _compose(progress, plan, pruning, config, schedule)
    if smaller is not None and several:
        zero_in_place(model, optimizer, whole, smaller)
    elif smaller is not None:
        narrow_in_place(model, optimizer, plan, smaller)
        model.config.use_cache = False  # as the Trainer has it while it trains
    progress.plan = whole
    progress.metrics = {"pruning/parameters": size, "pruning/ratio": 1 - size / progress.total_params}


def _warn_of_little_text(samples: torch.Tensor, config: PrunerConfig, step: int) -> None:
    warnings.warn(
        f"The pruning after step {step} calibrates on {len(samples):,} samples of {samples.shape[1]:,} tokens, and not "
        f"on {config.num_calibration_samples:,} of {config.max_seq_length:,}: the training has given no more text yet, "
        f"or the model has fewer positions. Prune later (start), or lower num_calibration_samples or max_seq_length.",
        CalibrationWarning,
        stacklevel=2,
    )


def cut_out_zeroed(model: PreTrainedModel, optimizer: Optimizer, plan: PruningPlan) -> None:
    """Cut out, in place, the units that were zeroed while several processes trained."""
    narrow_in_place(model, optimizer, _for_weights_now(model, plan), _without_zeroed(model, plan))


def _without_zeroed(model: PreTrainedModel, plan: PruningPlan | None) -> PreTrainedModel:
    """Return the model without the units that were zeroed so far."""
    return model if plan is None else apply_plan(model, _for_weights_now(model, plan))


def _for_weights_now(model: PreTrainedModel, plan: PruningPlan) -> PruningPlan:
    """Return the plan so far, for the weights as they are now."""
    return compose_plans(None, plan, model_fingerprint=fingerprint(model), provenance={})


def _compose(
    progress: PruningProgress,
    plan: PruningPlan,
    pruning: dict[str, Any],
    config: PrunerConfig,
    schedule: PruningSchedule,
) -> PruningPlan:
    """Return the plan of all prunings so far, this one included."""
    before = [] if progress.plan is None else progress.plan.provenance.get("prunings") or []
    provenance = {
        **progress.base,
        "config": config.to_dict(),
        "schedule": schedule.to_dict(),
        "prunings": [*before, pruning],
        "versions": versions(),
    }
    return compose_plans(progress.plan, plan, model_fingerprint=progress.fingerprint, provenance=provenance)
