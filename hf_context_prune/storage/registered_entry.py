"""The entry that a saved model of a registered architecture brings along, read as data: no code of a folder is run."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError

from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.modeling.modeling_context_pruned import REGISTERED_FILE
from hf_context_prune.modeling.registry import register_architecture
from hf_context_prune.modeling.specs import PREFIX, SPECS, ArchSpec, base_model_type, entry_from
from hf_context_prune.utils.links import resolve_inside
from hf_context_prune.utils.reading import read_bounded

_MAX_BYTES = 100_000


def register_entry_of(source: str, folder: Path, revision: str | None, values: Mapping[str, Any]) -> None:
    """Register the architecture of a saved variable-width model, where this process does not know it yet.

    Args:
        source: A model folder or Hub id, for messages.
        folder: The local folder of its config.json.
        revision: Commit on the Hub; None for a folder.
        values: The values of its config.

    Raises:
        LoadError: The entry is damaged, of another version, wrong, or names classes outside of `transformers`.
    """
    model_type = str(values.get("model_type"))
    if not model_type.startswith(PREFIX) or base_model_type(model_type) in SPECS:
        return
    if revision is not None:
        try:
            hf_hub_download(source, REGISTERED_FILE, revision=revision)
        except RemoteEntryNotFoundError:
            return  # without the file, the model type is unknown, as the caller says
        except (OSError, ValueError, HTTPError) as error:
            raise LoadError(
                f"{REGISTERED_FILE} of {source!r}, by which its architecture is known, can't be fetched "
                f"({type(error).__name__}: {error}). Try again later, or call register_architecture first."
            ) from error
    elif not (folder / REGISTERED_FILE).exists():
        return
    spec = _read(source, resolve_inside(folder, REGISTERED_FILE), base_model_type(model_type))
    if spec is None:
        return
    if foreign := [name for name in (spec.config_class, spec.headless().model_class, spec.model_class) if ":" in name]:
        raise LoadError(
            f"The classes of {source!r} are not of transformers ({', '.join(foreign)}), and no code is imported "
            f"because a folder names it. Call register_architecture with this entry first, if you trust that package."
        )
    try:
        register_architecture(spec)
    except ConfigError as error:
        raise LoadError(f"{REGISTERED_FILE} of {source!r} can't be used: {error}") from error


def _read(source: str, path: Path, model_type: str) -> ArchSpec | None:
    try:
        tree = ast.parse(read_bounded(path, _MAX_BYTES))
        (text,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.value is not None)
        entries = [entry_from(values) for values in ast.literal_eval(text)]
        return next((spec for spec in entries if spec.model_type == model_type), None)
    except (ValueError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError) as error:
        raise LoadError(
            f"{REGISTERED_FILE} of {source!r} is no entry of this version ({type(error).__name__}: {error}). Restore "
            f"the file that was saved with the model, update hf-context-prune, or call register_architecture first."
        ) from error
