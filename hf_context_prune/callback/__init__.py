"""Pruning inside `transformers.Trainer`."""

from .callback import ContextPruneCallback, PruningWarning
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
