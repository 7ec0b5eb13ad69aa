"""The finished example that a Space opens with: made once, when its folder is written, so that no visitor waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.evaluation.reports.codec import Saved, decode, load_json

from .compare import Comparer, View
from .generation import CONTINUE, Request
from .settings import Entry, Settings
from .store import ModelStore

SCHEMA_VERSION = 1
_NEW_TOKENS = 64
_SECONDS = 3_600  # nobody waits for it


@dataclass(frozen=True)
class Example(Saved):
    """A finished comparison.

    Attributes:
        prompt: The text that both models continued.
        view: The page at its end.
        can_chat: Whether the base's tokenizer has a chat template, so that the page offers answers.
        schema_version: Version of the JSON layout.
    """

    prompt: str
    view: View
    can_chat: bool
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def load(cls, path: Path) -> Example:
        """Read a saved example.

        Raises:
            LoadError: The file is missing, is no JSON, or is no example of a known version.
        """
        data = load_json(path)
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            raise LoadError(
                f"{path.name} is not an example that this version of hf_context_prune reads. Write the Space again."
            )
        return decode(cls, data, "example")


def make_examples(settings: Settings, kept: Mapping[str, Example]) -> dict[str, Example]:
    """Let the models of a Space write after the first prompt of each; models without prompts get no example.

    At most a base and one pruned model are in memory.

    Args:
        settings: The settings of the Space.
        kept: Examples that need not be made again, by the names of the models.

    Returns:
        The examples by the names of the models.

    Raises:
        ConfigError: A model can't be loaded or can't write.
    """
    patient = replace(settings, limits=replace(settings.limits, seconds=_SECONDS))
    store, found = ModelStore(), dict(kept)
    open_entries = (entry for entry in settings.entries if entry.prompts and entry.name not in kept)
    entries = sorted(open_entries, key=lambda entry: entry.base.label)
    for number, entry in enumerate(entries):
        found[entry.name] = _make_example(Comparer(patient, store), store, entry)
        store.drop(entry.model)
        if number + 1 == len(entries) or entries[number + 1].base != entry.base:
            store.drop(entry.base)
    return found


def _make_example(comparer: Comparer, store: ModelStore, entry: Entry) -> Example:
    limits = comparer.settings.limits
    prompt = next((text for text in entry.prompts if not text.rstrip().endswith("?")), entry.prompts[0])
    request = Request(prompt, CONTINUE, min(_NEW_TOKENS, limits.new_tokens))
    *_, view = comparer.compare(entry.name, request)
    problems = [side.problem for side in view.sides if side.problem] or ([view.status] if view.refused else [])
    if problems:
        raise ConfigError(
            f"The example of {entry.name!r} can't be made: {' '.join(problems)} Mend that, or leave the examples out "
            f"with --no-examples (examples=False)."
        )
    return Example(prompt, view, bool(store.get(entry.base).tokenizer.chat_template))
