"""Contextual pruning for Hugging Face causal LMs: physically smaller models for one domain.

    from hf_context_prune import PrunerConfig, prune

    result = prune("HuggingFaceTB/SmolLM2-135M-Instruct", "contracts.jsonl", PrunerConfig(pruning_ratio=0.2))
    result.save_pretrained("mini-gpt-contracts")

Names are imported when they are first used, so that ``import hf_context_prune`` stays fast. From then on, the auto
classes of `transformers` open variable-width models: these classes, too, are made when they are first asked for.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

import wrapt

from .utils.compat import register_on_demand
from .utils.version import __version__

if TYPE_CHECKING:
    from .config import PrunerConfig, ThresholdConfig
    from .data.documents import load_documents
    from .data.samples import tokenize_samples
    from .errors import ContextPruneError
    from .evaluation.options import EvalOptions, QuestionOptions
    from .evaluation.reports.report import EvalReport
    from .export.run import open_export, read_export
    from .modeling.plan import PruningPlan
    from .modeling.registry import register_architecture
    from .modeling.spec_parts import Projection
    from .modeling.specs import ArchSpec
    from .pipelines.bench import bench
    from .pipelines.evaluate import evaluate
    from .pipelines.export import export_model
    from .pipelines.prune import prune, prune_to_folder
    from .pipelines.recover import recover_to_folder
    from .pipelines.result import PruneResult
    from .pruning.allocation.sensitivity import withhold_probe
    from .pruning.calibration.calibrate import calibrate
    from .pruning.calibration.samples import batches_of
    from .pruning.criteria import CRITERIA
    from .pruning.planner import make_plan, plan_and_reconstruct, reconstruct_with
    from .pruning.scoring import Requirements
    from .pruning.surgery import apply_plan
    from .pruning.vocabulary.prune import prune_vocabulary
    from .publishing.card.card import make_card
    from .publishing.hub import push_folder
    from .publishing.space.folder import check_space_publishable, make_space_settings, write_space
    from .publishing.space.settings import read_space_settings
    from .storage.loading import load_model, load_pruned
    from .storage.manifest import verify_folder
    from .training.callback.callback import ContextPruneCallback
    from .training.callback.checkpoints import load_checkpoint
    from .training.callback.mixin import ContextPruneTrainerMixin
    from .training.callback.schedule import PruningSchedule
    from .training.recovery.config import RecoveryConfig
    from .training.recovery.recover import recover

_HOME = {
    "ArchSpec": "modeling.specs",
    "CRITERIA": "pruning.criteria",
    "ContextPruneCallback": "training.callback.callback",
    "ContextPruneError": "errors",
    "ContextPruneTrainerMixin": "training.callback.mixin",
    "EvalOptions": "evaluation.options",
    "EvalReport": "evaluation.reports.report",
    "Projection": "modeling.spec_parts",
    "PruneResult": "pipelines.result",
    "PrunerConfig": "config",
    "PruningPlan": "modeling.plan",
    "PruningSchedule": "training.callback.schedule",
    "QuestionOptions": "evaluation.options",
    "RecoveryConfig": "training.recovery.config",
    "Requirements": "pruning.scoring",
    "ThresholdConfig": "config",
    "apply_plan": "pruning.surgery",
    "batches_of": "pruning.calibration.samples",
    "bench": "pipelines.bench",
    "calibrate": "pruning.calibration.calibrate",
    "check_space_publishable": "publishing.space.folder",
    "evaluate": "pipelines.evaluate",
    "export_model": "pipelines.export",
    "load_checkpoint": "training.callback.checkpoints",
    "load_documents": "data.documents",
    "load_model": "storage.loading",
    "load_pruned": "storage.loading",
    "make_card": "publishing.card.card",
    "make_plan": "pruning.planner",
    "make_space_settings": "publishing.space.folder",
    "open_export": "export.run",
    "plan_and_reconstruct": "pruning.planner",
    "prune": "pipelines.prune",
    "prune_to_folder": "pipelines.prune",
    "prune_vocabulary": "pruning.vocabulary.prune",
    "push_folder": "publishing.hub",
    "read_export": "export.run",
    "read_space_settings": "publishing.space.settings",
    "reconstruct_with": "pruning.planner",
    "recover": "training.recovery.recover",
    "recover_to_folder": "pipelines.recover",
    "register_architecture": "modeling.registry",
    "tokenize_samples": "data.samples",
    "verify_folder": "storage.manifest",
    "withhold_probe": "pruning.allocation.sensitivity",
    "write_space": "publishing.space.folder",
}

__all__ = [
    "CRITERIA",
    "ArchSpec",
    "ContextPruneCallback",
    "ContextPruneError",
    "ContextPruneTrainerMixin",
    "EvalOptions",
    "EvalReport",
    "Projection",
    "PruneResult",
    "PrunerConfig",
    "PruningPlan",
    "PruningSchedule",
    "QuestionOptions",
    "RecoveryConfig",
    "Requirements",
    "ThresholdConfig",
    "__version__",
    "apply_plan",
    "batches_of",
    "bench",
    "calibrate",
    "check_space_publishable",
    "evaluate",
    "export_model",
    "load_checkpoint",
    "load_documents",
    "load_model",
    "load_pruned",
    "make_card",
    "make_plan",
    "make_space_settings",
    "open_export",
    "plan_and_reconstruct",
    "prune",
    "prune_to_folder",
    "prune_vocabulary",
    "push_folder",
    "read_export",
    "read_space_settings",
    "reconstruct_with",
    "recover",
    "recover_to_folder",
    "register_architecture",
    "tokenize_samples",
    "verify_folder",
    "withhold_probe",
    "write_space",
]


wrapt.register_post_import_hook(
    # `modeling` registers its classes when it is imported. The prefix is its `specs.PREFIX`.
    partial(
        register_on_demand, prefix="context_pruned_", register=partial(importlib.import_module, ".modeling", __name__)
    ),
    "transformers.models.auto.configuration_auto",
)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions alike
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
