"""Pruning inside `transformers.Trainer`."""

from .callback import ContextPruneCallback, load_checkpoint
from .schedule import PruningSchedule

__all__ = ["ContextPruneCallback", "PruningSchedule", "load_checkpoint"]
