"""References to code in the JSON files of a model folder: the code that ``trust_remote_code=True`` runs.

`transformers` reads them in ``config.json``, ``tokenizer_config.json`` and the configs of processors, at any depth:
``auto_map`` names a class for each auto class, ``custom_pipelines`` one for each task. ``custom_generate/generate.py``
runs without being named. Of all these, only the modeling files that travel with a pruned model are this package's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_context_prune.errors import ContextPruneError, LoadError

from .files import write_file
from .reading import read_bounded

_OWN = re.compile(r"(configuration|modeling)_context_pruned\.\w+")
_KEYS = ("auto_map", "custom_pipelines")
_GENERATE = "custom_generate/generate.py"
_MAX_BYTES = 8 * 2**20


def find_foreign_code(folder: str | Path) -> list[str]:
    """Return the references to foreign code in a model folder, in words; empty if there are none.

    Args:
        folder: A model folder.

    Raises:
        LoadError: A config is larger than 8 MiB.
    """
    found = [words for file in _configs(Path(folder)) for words in _describe(file.name, _read(file))]
    if os.path.lexists(Path(folder, _GENERATE)):
        found.append(f"{_GENERATE} replaces generate()")
    return found


def refuse_foreign_code(
    folder: str | Path, error: type[ContextPruneError] = LoadError, *, saved_here: bool = False
) -> None:
    """Refuse a model folder that names foreign code.

    Args:
        folder: A model folder.
        error: Type of the error.
        saved_here: Whether this package saved the folder, so that its ``card`` command can mend it.

    Raises:
        ContextPruneError: With the file, the reference and the remedy.
    """
    if found := find_foreign_code(folder):
        remedy = (
            f"`{shlex.join(['hf-context-prune', 'card', str(folder)])}` removes it." if saved_here else "Remove it."
        )
        raise error(
            f"{folder} names code that is not this package's, which trust_remote_code=True would run: "
            f"{'; '.join(found[:3])}{' and more' if len(found) > 3 else ''}. {remedy}"
        )


def drop_foreign_code(folder: Path) -> list[str]:
    """Remove the references to foreign code from the JSON files of a folder that is being written.

    What was loaded are classes of `transformers` and of this package, so nothing that the folder holds needs them.

    Args:
        folder: A model folder. Each file that changes is replaced, so that a hard link to it keeps its content.

    Returns:
        The removed references, in words.

    Raises:
        SaveError: A file can't be written.
    """
    dropped = []
    for file in _configs(folder):
        values = _read(file)
        if words := _describe(file.name, values):
            _clean(values)
            write_file(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
            dropped += words
    return dropped


def forget_foreign_code(model: Any, tokenizer: Any) -> None:  # noqa: ANN401
    """Remove the references to foreign code from a model's config and a tokenizer that others will save.

    Args:
        model: A model of `transformers`.
        tokenizer: Its tokenizer, or None.
    """
    generation_config = getattr(model, "generation_config", None)
    for holder in (model.config, generation_config):
        _clean(vars(holder) if holder is not None else {})
    _clean(getattr(tokenizer, "init_kwargs", {}))


def _configs(folder: Path) -> list[Path]:
    """Return the files from which `transformers` may read references, such as ``config.4.9.0.json``."""
    return sorted(path for path in folder.glob("*config*.json") if path.is_file())


def _read(file: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value in a JSON file; None where it holds none, which `transformers` can't read either.

    The strict reader of JSON would not do: it refuses files that `transformers` reads.
    """
    try:
        content = read_bounded(file, _MAX_BYTES)
    except ValueError as error:
        raise LoadError(f"{file} can't be searched for references to code: {error}. Restore or remove it.") from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _describe(file: str, values: object) -> list[str]:
    return [
        f"{file} names {text!r:.120} in {key}"
        for mapping, key in _find_keys(values)
        for text in _texts(mapping[key])
        if not _is_own(text)
    ]


def _find_keys(values: object) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each mapping, at any depth, that has a key which names code."""
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from ((value, key) for key in _KEYS if key in value)
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()


def _texts(value: object) -> Iterator[str]:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()


def _clean(values: object) -> None:
    for mapping, key in list(_find_keys(values)):
        named = mapping[key]
        kept = {name: item for name, item in named.items() if _is_own(item)} if isinstance(named, dict) else {}
        if kept:
            mapping[key] = kept
        elif not _is_own(named):
            del mapping[key]


def _is_own(value: object) -> bool:
    return all(map(_OWN.fullmatch, _texts(value)))
