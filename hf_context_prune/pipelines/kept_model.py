"""The pruned model as a finished stage: kept in the resume folder while it is trained back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from hf_context_prune.errors import LoadError
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pruning.model_builder import PrunedModel
from hf_context_prune.storage.loading import LoadedModel, load_model
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.resume import has_room, resume_key
from hf_context_prune.storage.saving import estimate_bytes, save_pruned, tokenization_of
from hf_context_prune.utils.file_names import PLAN_NAME

_LOGGER = logging.getLogger(__name__)


def load_or_prune(
    resume_dir: Path | None, base: LoadedModel, identity: object, prune: Callable[[], PrunedModel]
) -> PrunedModel:
    """Return the pruned model that an earlier run of the same inputs left, or prune, and leave it for a later run.

    The folder holds one such model at a time.

    Args:
        resume_dir: The run's folder of finished work; None keeps nothing.
        base: The base model with its tokenizer.
        identity: All other values that decide the pruned model; its `repr` counts.
        prune: Prunes.

    Raises:
        SaveError: The pruned model can't be written, although there seemed to be room.
        ContextPruneError: As `prune`.
    """
    if resume_dir is None:
        return prune()
    key = resume_key(base.model, [], tokenization_of(base.tokenizer), identity)
    place = resume_dir / f"pruned-{key}"
    if place.is_dir():
        try:
            verify_folder(place, hash_weights=False)  # `load_model` takes a folder without a manifest, too
            kept = load_model(place, device=str(base.model.device))
            return PrunedModel(kept.model, kept.tokenizer, PruningPlan.load(place / PLAN_NAME))
        except LoadError as error:
            _LOGGER.warning("%s is damaged (%s); the model is pruned again.", place.name, error)
    for older in resume_dir.glob("pruned-*"):
        shutil.rmtree(older, ignore_errors=True)  # what stays goes with the whole resume folder
    pruned = prune()
    if has_room(resume_dir, estimate_bytes(pruned.model), what="The pruned model"):
        save_pruned(pruned.model, place, tokenizer=pruned.tokenizer, plan=pruned.plan)
    return pruned
