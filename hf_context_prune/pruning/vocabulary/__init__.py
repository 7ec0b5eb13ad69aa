"""Pruning the vocabulary: the tokenizer, the embedding and the head, to the tokens that a domain needs."""

from .prune import TrimmedModel, VocabularyPruner, check_prunable, prune_vocabulary
from .selection import VocabularySize

__all__ = ["TrimmedModel", "VocabularyPruner", "VocabularySize", "check_prunable", "prune_vocabulary"]
