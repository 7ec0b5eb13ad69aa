"""Pruning inside `transformers.Trainer`."""

from hf_context_prune.errors import PruningWarning

from .callback import ContextPruneCallback
from .checkpoints import load_checkpoint
from .mixin import ContextPruneTrainerMixin
from .schedule import PruningSchedule

__all__ = [
    "ContextPruneCallback",
    "ContextPruneTrainerMixin",
    "PruningSchedule",
    "PruningWarning",
    "load_checkpoint",
]
