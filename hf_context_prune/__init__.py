"""Contextual pruning for Hugging Face causal LMs: really smaller models for one domain.

    from hf_context_prune import PrunerConfig, prune

    result = prune("HuggingFaceTB/SmolLM2-135M-Instruct", "contracts.jsonl", PrunerConfig(pruning_ratio=0.2))
    result.save_pretrained("mini-gpt-contracts")

Names are imported when they are first used, so that ``import hf_context_prune`` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .utils.version import __version__

if TYPE_CHECKING:
    from .config import PrunerConfig
    from .errors import ContextPruneError
    from .evaluation.reports.report import EvalReport
    from .modeling.plan import PruningPlan
    from .pipelines.evaluate import QuestionOptions, evaluate
    from .pipelines.prune import EvalOptions, prune
    from .pipelines.result import PruneResult
    from .pruning.calibration.calibrate import calibrate
    from .pruning.criteria import CRITERIA
    from .pruning.planner import make_plan
    from .pruning.surgery import apply_plan
    from .pruning.vocabulary.prune import prune_vocabulary
    from .publishing.hub import push_folder
    from .storage.loading import load_model, load_pruned
    from .training.callback.callback import ContextPruneCallback
    from .training.callback.schedule import PruningSchedule
    from .training.recovery.config import RecoveryConfig
    from .training.recovery.recover import recover

_HOME = {
    "CRITERIA": "criteria",
    "ContextPruneCallback": "callback",
    "ContextPruneError": "errors",
    "EvalOptions": "pipeline",
    "EvalReport": "evaluation",
    "PruneResult": "result",
    "PrunerConfig": "config",
    "PruningPlan": "plan",
    "PruningSchedule": "callback",
    "RecoveryConfig": "recovery",
    "apply_plan": "surgery",
    "calibrate": "calibration",
    "QuestionOptions": "measuring",
    "evaluate": "measuring",
    "load_model": "loading",
    "load_pruned": "loading",
    "make_plan": "planning",
    "prune": "pipeline",
    "prune_vocabulary": "vocabulary",
    "push_folder": "hub",
    "recover": "recovery",
}

__all__ = [
    "CRITERIA",
    "ContextPruneCallback",
    "ContextPruneError",
    "EvalOptions",
    "EvalReport",
    "PruneResult",
    "PrunerConfig",
    "PruningPlan",
    "PruningSchedule",
    "QuestionOptions",
    "RecoveryConfig",
    "__version__",
    "apply_plan",
    "calibrate",
    "evaluate",
    "load_model",
    "load_pruned",
    "make_plan",
    "prune",
    "prune_vocabulary",
    "push_folder",
    "recover",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions alike
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
