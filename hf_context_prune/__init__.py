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
    from .data.documents import load_documents
    from .data.samples import tokenize_samples
    from .errors import ContextPruneError
    from .evaluation.options import EvalOptions, QuestionOptions
    from .evaluation.reports.report import EvalReport
    from .export.run import export_model, open_export
    from .modeling.plan import PruningPlan
    from .pipelines.evaluate import evaluate
    from .pipelines.prune import prune
    from .pipelines.result import PruneResult
    from .pruning.calibration.calibrate import calibrate
    from .pruning.criteria import CRITERIA
    from .pruning.planner import make_plan, plan_and_reconstruct
    from .pruning.surgery import apply_plan
    from .pruning.vocabulary.prune import prune_vocabulary
    from .publishing.hub import push_folder
    from .storage.loading import load_model, load_pruned
    from .training.callback.callback import ContextPruneCallback
    from .training.callback.checkpoints import load_checkpoint
    from .training.callback.mixin import ContextPruneTrainerMixin
    from .training.callback.schedule import PruningSchedule
    from .training.recovery.config import RecoveryConfig
    from .training.recovery.recover import recover

_HOME = {
    "CRITERIA": "pruning.criteria",
    "ContextPruneCallback": "training.callback.callback",
    "ContextPruneError": "errors",
    "ContextPruneTrainerMixin": "training.callback.mixin",
    "EvalOptions": "evaluation.options",
    "EvalReport": "evaluation.reports.report",
    "PruneResult": "pipelines.result",
    "PrunerConfig": "config",
    "PruningPlan": "modeling.plan",
    "PruningSchedule": "training.callback.schedule",
    "QuestionOptions": "evaluation.options",
    "RecoveryConfig": "training.recovery.config",
    "apply_plan": "pruning.surgery",
    "calibrate": "pruning.calibration.calibrate",
    "evaluate": "pipelines.evaluate",
    "export_model": "export.run",
    "load_checkpoint": "training.callback.checkpoints",
    "load_documents": "data.documents",
    "load_model": "storage.loading",
    "load_pruned": "storage.loading",
    "make_plan": "pruning.planner",
    "open_export": "export.run",
    "plan_and_reconstruct": "pruning.planner",
    "prune": "pipelines.prune",
    "prune_vocabulary": "pruning.vocabulary.prune",
    "push_folder": "publishing.hub",
    "recover": "training.recovery.recover",
    "tokenize_samples": "data.samples",
}

__all__ = [
    "CRITERIA",
    "ContextPruneCallback",
    "ContextPruneError",
    "ContextPruneTrainerMixin",
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
    "export_model",
    "load_checkpoint",
    "load_documents",
    "load_model",
    "load_pruned",
    "make_plan",
    "open_export",
    "plan_and_reconstruct",
    "prune",
    "prune_vocabulary",
    "push_folder",
    "recover",
    "tokenize_samples",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions alike
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
