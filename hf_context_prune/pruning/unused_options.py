"""Options of a pruning that change nothing beside the others: named in one warning when a run begins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from hf_context_prune.config import THRESHOLDS, PrunerConfig, ThresholdConfig
from hf_context_prune.errors import PruningWarning
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.utils.unused import warn_of_unused

_NO_VOCABULARY = "no vocabulary entry is removed (vocab_size, vocab_coverage or vocab_min_count would ask for it)"
_NO_UNITS = "neither MLP neurons nor KV groups are removed"


def warn_of_unused_options(config: PrunerConfig | ThresholdConfig, more: Mapping[str, str] | None = None) -> None:
    """Warn about options that were given and change nothing.

    Args:
        config: All choices.
        more: Further reasons of the caller, as for `warn_of_unused`.

    Warns:
        PruningWarning: Names every such option, and why it changes nothing.
    """
    own = _threshold_reasons(config) if isinstance(config, ThresholdConfig) else _reasons(config)
    warn_of_unused(config, {**own, **(more or {})})


def warn_of_low_thresholds(config: ThresholdConfig, plan: PruningPlan, removed_params: int) -> None:
    """Warn about thresholds under which nothing of the model lies.

    Args:
        config: The thresholds.
        plan: What was found below them.
        removed_params: Parameters that were removed.

    Warns:
        PruningWarning: Nothing was removed or zeroed.
    """
    if not removed_params and not (plan.provenance.get("zeroed") or {}).get("zeroed_not_removed"):
        values = {name: getattr(config, name) for name in THRESHOLDS}
        given = ", ".join(f"{name}={value:g}" for name, value in values.items() if value is not None)
        warnings.warn(
            f"Nothing was removed or zeroed: nothing lies below {given} on this text. Give higher thresholds.",
            PruningWarning,
            stacklevel=2,
        )


def _threshold_reasons(config: ThresholdConfig) -> dict[str, str]:
    if config.prunes_layers:
        return {}
    why = "embedding_threshold alone counts tokens of the domain's text, and nothing is calibrated"
    return {"num_calibration_samples": why, "general_data_ratio": why}


def _reasons(config: PrunerConfig) -> dict[str, str]:
    reasons: dict[str, str] = {}
    if not config.prunes_vocabulary:
        reasons |= dict.fromkeys(("pad_to_multiple_of", "vocab_criterion"), _NO_VOCABULARY)
    if not config.removes_experts:
        reasons["expert_criterion"] = "no expert is removed (num_experts or experts_ratio would ask for it)"
    if not config.prunes_layers:
        own = ("criterion",) if config.narrows_experts else ("criterion", "round_to", "ridge")
        reasons |= dict.fromkeys(own, _NO_UNITS)
        if config.removes_layers:
            return reasons
        if config.allocation == "adaptive" and not config.shares_budget:
            reasons["allocation"] = _NO_UNITS
        if config.reconstruction != "none" and not config.prunes_experts:  # which also leaves out the refit of the rows
            reasons["reconstruction"] = _NO_UNITS
        return reasons
    if not config.has_total_budget and not config.mlp_ratio:
        reasons["round_to"] = "no MLP neuron is removed"
    if config.reconstruction in ("none", "bias"):
        reasons["ridge"] = f"reconstruction={config.reconstruction!r} solves no regression"
    return reasons
