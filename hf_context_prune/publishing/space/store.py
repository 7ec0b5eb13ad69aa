"""Models that are loaded when they are first needed, once for all visitors."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hf_context_prune.data.demo import smollm2_gguf
from hf_context_prune.storage.loading import LoadedModel, load_model

from .settings import Source


def load_source(source: Source) -> LoadedModel:
    """Load a model that the settings name; never with code of its repository.

    Raises:
        ContextPruneError: It is missing, damaged or can't be fetched.
    """
    if source.repo is not None:
        return load_model(source.repo, revision=source.revision)
    if source.path is not None:
        return load_model(source.path.absolute())  # against its manifest first; absolute, so never taken for a Hub id
    return load_model(smollm2_gguf())


class ModelStore:
    """One copy of each model. A load that failed is tried again by the next visitor: the Hub may be back."""

    def __init__(self, load: Callable[[Source], LoadedModel] = load_source) -> None:
        """Start empty.

        Args:
            load: Loads one model.
        """
        self._load = load
        self._models: dict[Source, LoadedModel] = {}
        self._locks: dict[Source, threading.Lock] = {}
        self._lock = threading.Lock()

    def has(self, source: Source) -> bool:
        """Whether a model is in memory."""
        return source in self._models

    def get(self, source: Source) -> LoadedModel:
        """A model, loaded now if it is not there; others that ask for it meanwhile wait for the same copy.

        Raises:
            ContextPruneError: As `load`.
        """
        with self._lock:
            lock = self._locks.setdefault(source, threading.Lock())
        with lock:  # of this model only: another one loads meanwhile
            if source not in self._models:
                self._models[source] = self._load(source)
            return self._models[source]
