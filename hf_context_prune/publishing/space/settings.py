"""Settings of a Space: one small YAML file, checked field by field. Only the models named there are ever loaded."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_context_prune.errors import ConfigError, unknown_name
from hf_context_prune.publishing.prompts import choose_prompts
from hf_context_prune.storage.known_models import DEMO_MODEL, SMOLLM2
from hf_context_prune.utils.hub_ids import is_hub_id
from hf_context_prune.utils.options import read_options

"""The base model that `hf-context-prune demo` fetches from the package index."""
DEMO_FOLDER = "mini-gpt-licences"
"""The folder that `hf-context-prune demo` writes by default."""

COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_NAME = 60
_MAX_PROMPTS = 8


@dataclass(frozen=True)
class Source:
    """The place of a model: a Hub repository at a commit, a local folder, or (with neither) the base model of the demo.

    Attributes:
        repo: Hub id.
        revision: Commit of the repository.
        path: Local folder.
    """

    repo: str | None = None
    revision: str | None = None
    path: Path | None = None

    @property
    def label(self) -> str:
        """A short name to show."""
        return self.repo or (self.path.name if self.path else str(SMOLLM2["id"]).rpartition("/")[2])


@dataclass(frozen=True)
class Entry:
    """A domain: a pruned model, its base, and example prompts.

    Attributes:
        name: Name of the model: that of the domain, and of the size where there are several of one domain.
        model: The pruned model.
        base: The base, which is dense.
        prompts: Examples. A prompt that ends with a question mark is asked as a question; any other is continued.
        reports: Evaluation reports of the pruned model on other texts, by the name of the text.
        domain: Name of the domain, as visitors choose it; models of one domain share it. By default the name.
        example: File with the finished example of this model.
    """

    name: str
    model: Source
    base: Source
    prompts: tuple[str, ...] = ()
    reports: Mapping[str, Path] = field(default_factory=dict)
    domain: str = ""
    example: Path | None = None

    def __post_init__(self) -> None:
        """Take the name for the domain where none is given."""
        object.__setattr__(self, "domain", self.domain or self.name)


@dataclass(frozen=True)
class Limits:
    """Limits of one request, enforced on the server.

    Attributes:
        prompt_characters: Largest number of characters of a prompt.
        prompt_tokens: Largest number of tokens of a prompt.
        new_tokens: Largest number of tokens that each model writes.
        seconds: Longest time from the first to the last token of both models.
        waiting: Largest number of requests in the queue; more are turned away.
    """

    prompt_characters: int = 4_000
    prompt_tokens: int = 1_024
    new_tokens: int = 256
    seconds: int = 60
    waiting: int = 16

    def __post_init__(self) -> None:
        """Refuse limits that are not positive integers.

        Raises:
            ConfigError: With the name and the value.
        """
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"limits.{name} is {value!r}; it must be a positive integer.")


@dataclass(frozen=True)
class Settings:
    """The settings of a Space.

    Attributes:
        title: Heading of the page.
        entries: The domains; at least one, with different names.
        limits: Limits of one request.
    """

    title: str
    entries: tuple[Entry, ...]
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Refuse settings without a domain, or with two domains of one name.

        Raises:
            ConfigError: With the names.
        """
        names = [entry.name for entry in self.entries]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"The models of a Space are named {names}; there must be at least one, and names that differ. Choose "
                f"the names in a SPACE.yaml."
            )

    @property
    def domains(self) -> dict[str, tuple[Entry, ...]]:
        """The models of every domain, in the order of the settings."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.domain, []).append(entry)
        return {domain: tuple(entries) for domain, entries in found.items()}


def demo_settings(folder: Path) -> Settings:
    """Return the default settings: the folder that `hf-context-prune demo` writes, beside its base."""
    name = "Software licences"
    entry = Entry(name, Source(path=folder), Source(), choose_prompts(name))
    return Settings("Mini-GPT: software licences", (entry,))


def read_space_settings(path: str | Path) -> Settings:
    """Read the YAML of a Space; paths in it are relative to its folder.

    Args:
        path: The YAML file.

    Returns:
        Settings for [`write_space`][].

    Raises:
        ConfigError: The file can't be read, or a field is missing, unknown or of a wrong type; the message names it.
    """
    path = Path(path)
    values = _fields(read_options(path), str(path), required={"models"}, allowed={"title", "base", "models", "limits"})
    models = values["models"]
    if not isinstance(models, list) or not models:
        raise ConfigError(f"models in {path} is {models!r:.80}; it must be a list with at least one model.")
    folder = path.resolve().parent
    limits = _fields(values.get("limits", {}), "limits", required=set(), allowed=_names(Limits))
    return Settings(
        _text(values.get("title", "Mini-GPTs"), "title"),
        tuple(_entry(model, f"models[{index}]", values.get("base"), folder) for index, model in enumerate(models)),
        Limits(**limits),
    )


def write_settings(settings: Settings, path: Path) -> None:
    """Write YAML that `read_space_settings` reads back, with paths relative to its folder.

    Args:
        settings: The settings; their paths lie below the folder of `path`.
        path: The file.
    """
    folder = path.resolve().parent

    def source(value: Source) -> Any:  # noqa: ANN401 - a mapping or a word
        if value.path is not None:
            return {"path": value.path.relative_to(folder).as_posix()}
        return {"repo": value.repo, "revision": value.revision} if value.repo else DEMO_MODEL

    models = []
    for entry in settings.entries:
        model: dict[str, Any] = {"name": entry.name, **source(entry.model), "base": source(entry.base)}
        if entry.domain != entry.name:
            model["domain"] = entry.domain
        if entry.prompts:
            model["prompts"] = list(entry.prompts)
        if entry.reports:
            model["reports"] = {name: file.relative_to(folder).as_posix() for name, file in entry.reports.items()}
        if entry.example is not None:
            model["example"] = entry.example.relative_to(folder).as_posix()
        models.append(model)
    document = {"title": settings.title, "models": models, "limits": dataclasses.asdict(settings.limits)}
    path.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")


def _entry(value: object, where: str, default_base: object, folder: Path) -> Entry:
    keys = {"name", "domain", "repo", "revision", "path", "base", "prompts", "reports", "example"}
    model = _fields(value, where, required={"name"}, allowed=keys)
    base = model.get("base", default_base)
    if base is None:
        raise ConfigError(
            f"{where} has no base. Add the model that it was pruned from as base, here or for the whole file."
        )
    prompts, reports = model.get("prompts", []), model.get("reports", {})
    if not isinstance(prompts, list) or len(prompts) > _MAX_PROMPTS:
        raise ConfigError(f"{where}.prompts is {prompts!r:.80}; it must be a list of at most {_MAX_PROMPTS} texts.")
    if not isinstance(reports, dict):
        raise ConfigError(f"{where}.reports is {reports!r:.80}; it must map names of texts to files.")
    place = {key: model[key] for key in ("repo", "revision", "path") if key in model}
    return Entry(
        check_name(model["name"], f"{where}.name"),
        _source(place, where, folder),
        Source() if base == DEMO_MODEL else _source(base, f"{where}.base", folder),
        tuple(_text(prompt, f"{where}.prompts") for prompt in prompts),
        {_text(name, f"{where}.reports"): folder / _text(file, f"{where}.reports") for name, file in reports.items()},
        check_name(model["domain"], f"{where}.domain") if "domain" in model else "",
        folder / _text(model["example"], f"{where}.example") if "example" in model else None,
    )


def _source(value: object, where: str, folder: Path) -> Source:
    place = _fields(value, where, required=set(), allowed={"repo", "revision", "path"})
    if ("repo" in place) == ("path" in place):
        has = ", ".join(sorted(place)) or "neither"
        raise ConfigError(f"{where} must have a repo (with its revision) or a path; it has {has}.")
    if "path" in place:
        if "revision" in place:
            raise ConfigError(f"{where} has a path and a revision; only a repo has a revision.")
        # Without "..": the page shows the name of the folder, and a copy of it gets that name.
        return Source(path=Path(os.path.normpath(folder / _text(place["path"], f"{where}.path"))))
    revision = place.get("revision")
    if not isinstance(revision, str) or not COMMIT.fullmatch(revision):
        raise ConfigError(
            f"{where}.revision is {revision!r}; it must be the commit of the repo (40 hexadecimal digits), so that "
            f"the model can't change unseen."
        )
    return Source(repo=_repo(place["repo"], f"{where}.repo"), revision=revision)


def _repo(value: object, where: str) -> str:
    if not is_hub_id(value):
        raise ConfigError(f"{where} is {value!r:.120}; it must be a Hub id, as in owner/name.")
    return value


def check_name(value: object, where: str) -> str:
    """Return the name of a domain, after checking it.

    Raises:
        ConfigError: The name is empty, too long, or not one line.
    """
    text = _text(value, where)
    if len(text) > _MAX_NAME or not text.isprintable():
        raise ConfigError(f"{where} is {text!r:.80}; it must be one line of at most {_MAX_NAME} characters.")
    return text


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} is {value!r:.80}; it must be a text.")
    return value


def _fields(value: object, where: str, *, required: set[str], allowed: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r:.80}; it must be a mapping with {', '.join(sorted(allowed))}.")
    for name in value:
        if name not in allowed:
            raise ConfigError(f"{where}: {unknown_name('field', name, sorted(allowed))}")
    if missing := required - value.keys():
        raise ConfigError(f"{where} lacks {', '.join(sorted(missing))}.")
    return value


def _names(kind: type[Limits]) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}
