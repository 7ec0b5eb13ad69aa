"""Pruning inside `transformers.Trainer`."""

from ..errors import PruningWarning
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
