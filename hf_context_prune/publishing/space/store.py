"""Models in memory: each is loaded when it is first needed, once for all visitors."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hf_context_prune.storage.known_models import fetch_smollm2
from hf_context_prune.storage.loading import LoadedModel, load_model

from .settings import Source


def load_source(source: Source) -> LoadedModel:
    """Load a model that the settings name, never with code of its repository.

    Raises:
        ContextPruneError: The model is missing, damaged or can't be fetched.
    """
    if source.repo is not None:
        return load_model(source.repo, revision=source.revision)
    if source.path is not None:
        return load_model(source.path.absolute())  # checks the manifest first; an absolute path is no Hub id
    return load_model(fetch_smollm2(), dtype="float32")


class ModelStore:
    """One copy of each model. A failed load is tried again for the next visitor, as the Hub may be back."""

    def __init__(self, load: Callable[[Source], LoadedModel] = load_source) -> None:
        """Start empty.

        Args:
            load: Function that loads one model.
        """
        self._load = load
        self._models: dict[Source, LoadedModel] = {}
        self._locks: dict[Source, threading.Lock] = {}
        self._lock = threading.Lock()

    def has(self, source: Source) -> bool:
        """Return whether a model is in memory."""
        return source in self._models

    def get(self, source: Source) -> LoadedModel:
        """Return a model, loading it if needed; concurrent callers wait for the same copy.

        Raises:
            ContextPruneError: As `load` raises it.
        """
        with self._lock:
            lock = self._locks.setdefault(source, threading.Lock())
        with lock:  # of this model only: another one loads meanwhile
            if source not in self._models:
                self._models[source] = self._load(source)
            return self._models[source]

    def drop(self, source: Source) -> None:
        """Forget a model, so that its memory is free for the next one."""
        with self._lock:
            self._models.pop(source, None)
