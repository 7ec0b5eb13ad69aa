"""Save or push the model of a pruning training, with its plan and card."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.errors import ConfigError, SaveError
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.publishing.card.card import write_card
from hf_context_prune.publishing.card.facts import CardFacts
from hf_context_prune.publishing.hub import PushResult, push_folder
from hf_context_prune.storage.saving import estimate_bytes, write_model_folder
from hf_context_prune.storage.staging import staged_folder
from hf_context_prune.utils.file_names import CARD_NAME
from hf_context_prune.utils.files import resolve_path
from hf_context_prune.utils.links import resolve_inside
from hf_context_prune.utils.temporary import scratch_folder

from .checkpoints import PruningProgress


def collect_facts(model: PreTrainedModel, plan: PruningPlan, name: str) -> CardFacts:
    """Return the facts of a card on a model that was not measured."""
    return CardFacts(name, plan, None, str(model.config.model_type), type(model).__name__)


def save_folder(
    target: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: PruningPlan | None,
    *,
    name: str | None = None,
    use_cache: bool = True,
    card: Path | None = None,
) -> Path:
    """Write model, tokenizer, plan and card, whole or not at all.

    Args:
        target: As for `save_pruned`.
        model: The model as it is now.
        tokenizer: Its tokenizer; None leaves it out.
        plan: Kept units so far; None before the first pruning.
        name: Name of the model in the card; None takes the folder's name.
        use_cache: `use_cache` of the saved config; a Trainer switches it off in the model while it trains.
        card: Card to copy if it exists and there is no plan.

    Raises:
        SaveError: Saving failed; the target is as it was.
    """
    path = resolve_path(target, SaveError)
    training, model.config.use_cache = model.config.use_cache, use_cache
    try:
        with staged_folder(path, required_bytes=estimate_bytes(model)) as staging:
            write_model_folder(staging, model, tokenizer=tokenizer, plan=plan)
            if plan is not None:
                write_card(staging, collect_facts(model, plan, name or path.name))
            elif card is not None and card.is_file():
                shutil.copyfile(resolve_inside(card.parent, card.name, SaveError), staging / CARD_NAME)
    finally:
        model.config.use_cache = training
    return path


class PushedFolder:
    """A model saved to a temporary folder, which is removed once it is pushed."""

    def __init__(self, model: PreTrainedModel, *what: Any, **how: Any) -> None:  # noqa: ANN401 - as save_folder's
        with ExitStack() as place:
            self._folder = save_folder(place.enter_context(scratch_folder()) / "model", model, *what, **how)
            self._place = place.pop_all()

    def push(self, repo_id: str, **options: Any) -> PushResult:  # noqa: ANN401 - as push_folder's
        """Push the folder, and remove it even if that fails."""
        with self._place:
            return push_folder(self._folder, repo_id, retry_hint="push_to_hub", **options)


class Publishable:
    """A callback whose trained model can be saved and pushed."""

    _progress: PruningProgress
    """How far the training has pruned."""
    _result: tuple[PreTrainedModel, Any] | None
    """Model and tokenizer of a training that ended."""

    def _outcome(self) -> tuple[PreTrainedModel, Any, PruningPlan]:
        if self._result is None or self._progress.plan is None:
            raise ConfigError(
                "There is no pruned model yet: the training did not end, or nothing was pruned in it. Call this after "
                "trainer.train()."
            )
        return *self._result, self._progress.plan

    def save_pretrained(self, directory: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write the trained model with tokenizer, plan and model card to a folder, whole or not at all.

        Under ``accelerate launch`` call it in the main process alone.

        Args:
            directory: Absent, empty, or an older folder of this package, which is replaced.
            tokenizer: The model's tokenizer; None takes the Trainer's ``processing_class``.

        Raises:
            ConfigError: No training ended yet.
            SaveError: Saving failed; the target is as it was.
        """
        model, own, plan = self._outcome()
        return save_folder(directory, model, tokenizer or own, plan, use_cache=self._progress.use_cache)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,  # noqa: ANN401
    ) -> PushResult:
        """Upload the files that `save_pretrained` writes, in one commit; never optimizer state or training arguments.

        Args:
            repo_id: ``owner/name``.
            tokenizer: As for `save_pretrained`.
            options: Options `private`, `revision`, `create_pr`, `commit_message` and `token` of [`push_folder`][].

        Raises:
            ConfigError: No training ended yet.
            PublishError: The upload failed; says how to mend it.
        """
        model, own, plan = self._outcome()
        return PushedFolder(model, tokenizer or own, plan, name=repo_id, use_cache=self._progress.use_cache).push(
            repo_id, **options
        )
