"""A Space as a folder that is ready to run, written whole or not at all."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, SpaceCardData
from huggingface_hub.errors import HTTPError

from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.evaluation.reports.markdown import Trusted, code, inert, table
from hf_context_prune.evaluation.reports.report import EvalReport
from hf_context_prune.publishing.prompts import choose_prompts
from hf_context_prune.storage.hub_errors import explain_hub_error
from hf_context_prune.storage.known_models import DEMO_MODEL, is_demo_base
from hf_context_prune.storage.manifest import verify_if_ours
from hf_context_prune.storage.staging import resolve_target, staged_folder
from hf_context_prune.utils.file_names import EXPORT_REPORT_NAME, MANIFEST_NAME, SPACE_SETTINGS_NAME
from hf_context_prune.utils.files import expand_home
from hf_context_prune.utils.foreign_code import drop_foreign_code, refuse_foreign_code
from hf_context_prune.utils.hub_ids import is_hub_id
from hf_context_prune.utils.links import resolve_inside
from hf_context_prune.utils.locks import reserves
from hf_context_prune.utils.upload_check import is_allowed

from .example import Example, make_examples
from .facts import Facts, read_facts
from .gradio_import import import_gradio
from .html import read_template_file, template_environment
from .settings import (
    COMMIT,
    DEMO_FOLDER,
    Entry,
    Settings,
    Source,
    check_name,
    demo_settings,
    read_space_settings,
    write_settings,
)
from .wheel import pin_requirements, write_wheel

TITLE = "Mini-GPTs"
_OTHER_FILES_BYTES = 8 * 2**20
_PREFIX = re.compile(r"^mini(-?gpts?)?[-_ ]", re.IGNORECASE)


def make_space_settings(models: Sequence[str], *, base: str | None = None, title: str | None = None) -> Settings:
    """Make the settings of a Space for pruned models.

    Args:
        models: Folders that this package wrote, or Hub ids (``owner/name``, ``owner/name@revision``), which are pinned
            to a commit. An existing folder is preferred to a Hub id of the same name. Models whose plans name one
            domain and one base become the sizes of that domain.
        base: The same for the base of all models, or ``"demo"`` for the base of the demo; None takes the base that each
            plan names.
        title: Heading of the page; by default it names the domain, if there is one.

    Returns:
        Settings for [`write_space`][].

    Raises:
        ConfigError: A name is neither a folder nor a Hub id, or the base must be given.
        LoadError: A plan or a revision can't be read.
    """
    given = None if base is None else Source() if base == DEMO_MODEL else _pin(base)
    found = []
    for model in models:
        source = _pin(model)
        entry = Entry(source.label, source, given or Source())
        facts = read_facts(entry)
        domain = _name(facts.domain or _PREFIX.sub("", source.label.rpartition("/")[2]), source.label)
        prompts = choose_prompts(facts.data_name, domain, domain=facts.domain)
        entry = replace(entry, name=domain, domain=domain, prompts=prompts, base=given or _find_base(entry, facts))
        found.append((entry, facts))
    entries = tuple(_name_sizes(found))
    usual = f"{TITLE[:-1]}: {entries[0].domain}" if len({entry.domain for entry in entries}) == 1 else TITLE
    return Settings(title or usual, entries)


def _name(text: str, otherwise: str) -> str:
    name = text.replace("-", " ").replace("_", " ").strip()
    return check_name((name[:1].upper() + name[1:]) or otherwise, "the name of a model")


def _name_sizes(found: Sequence[tuple[Entry, Facts]]) -> list[Entry]:
    """Return models of one domain and base under names of their sizes, the largest first; others as they are."""
    groups: dict[tuple[str, Source], list[tuple[Entry, Facts]]] = {}
    for entry, facts in found:
        groups.setdefault((entry.domain, entry.base), []).append((entry, facts))
    entries = []
    for group in groups.values():
        if len(group) == 1 or any(facts.domain is None for _, facts in group):
            entries += [entry for entry, _ in group]
            continue
        group.sort(key=lambda pair: pair[1].share_removed or 0.0)
        shares = [facts.share_removed for _, facts in group]
        sizes = ["" if share is None else f"{share:.0%} removed" for share in shares]
        for (entry, _), size in zip(group, sizes, strict=True):
            if not size or sizes.count(size) > 1:
                size = entry.model.label
            entries.append(replace(entry, name=check_name(f"{entry.domain}, {size}", "the name of a model")))
    return entries


@reserves("target")
def write_space(settings: Settings, target: str | Path, *, examples: bool = True) -> Path:
    """Write the folder of a Space: app, settings, requirements, front matter, the wheel of this package, local models.

    Args:
        settings: The settings of the Space.
        target: The folder: absent, empty, or an older Space of this package, which is replaced.
        examples: Let all models write after their first prompt, for the finished examples that the page opens with.
            False keeps the examples that the settings name.

    Returns:
        Path of the folder that was written.

    Raises:
        ConfigError: An example can't be made.
        SaveError: Saving failed; an older folder is as it was.
        LoadError: A local model is damaged or is not a model folder.
    """
    goal = resolve_target(target)
    needed = pin_requirements()
    sources = dict.fromkeys(source for entry in settings.entries for source in (entry.base, entry.model))
    local = {source: _model_files(source.path) for source in sources if source.path is not None}
    size = sum(file.stat().st_size for found in local.values() for file in found.values())
    made = make_examples(settings, _kept_examples(settings, goal)) if examples else _read_examples(settings)
    with staged_folder(goal, required_bytes=size + _OTHER_FILES_BYTES, replaces=SPACE_SETTINGS_NAME) as staging:
        places = _copy_models(local, staging)
        moved = replace(
            settings,
            entries=tuple(
                _relocate(index, entry, places, staging, made.get(entry.name))
                for index, entry in enumerate(settings.entries)
            ),
        )
        write_settings(moved, staging / SPACE_SETTINGS_NAME)
        wheel = write_wheel(staging)
        _write(staging / "app.py", read_template_file("app.py"))
        _write(staging / "README.md", render_readme(moved, wheel=wheel.name))
        _write(staging / "requirements.txt", "".join(f"{line}\n" for line in needed))
    return goal


def render_readme(settings: Settings, *, wheel: str | None) -> str:
    """Return the README.md of a Space, with the front matter that the Hub reads.

    Args:
        settings: The settings of the Space.
        wheel: Name of the wheel of this package beside it; None in the checkout.

    Raises:
        ConfigError: Gradio is not installed.
    """
    repos = [source.repo for entry in settings.entries for source in (entry.base, entry.model) if source.repo]
    card = SpaceCardData(
        title=settings.title,
        emoji="✂️",
        colorFrom="green",
        colorTo="gray",
        sdk="gradio",
        sdk_version=import_gradio().__version__,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        short_description="A dense and a pruned language model, side by side",
        models=list(dict.fromkeys(repos)) or None,
        tags=["pruning", "context-pruning"],
    )
    rows = [(entry.name, _describe_source(entry.model), _describe_source(entry.base)) for entry in settings.entries]
    shown = {"title": inert(settings.title), "models": table(("domain", "pruned", "dense"), rows), "wheel": wheel}
    return template_environment().get_template("README.md.jinja").render(metadata=card.to_yaml().strip(), **shown)


def demo_files() -> dict[str, str]:
    """Return the files of the repository's ``spaces/`` by name: the Space of the demo, run from the checkout."""
    return {
        "app.py": read_template_file("app.py"),
        "README.md": render_readme(demo_settings(Path(DEMO_FOLDER)), wheel=None),
        "requirements.txt": "# In the root of the checkout: pip install -r spaces/requirements.txt\n.[space]\n",
    }


def check_space_publishable(settings: Settings) -> None:
    """Refuse to push a Space with models in its folder: on the Hub it reads them from their own repositories.

    Args:
        settings: The settings of the Space.

    Raises:
        ConfigError: A model is a folder; the message has the command that pushes it.
    """
    for entry in settings.entries:
        for what, source in (("model", entry.model), ("base", entry.base)):
            if source.path is not None:
                command = shlex.join(["hf-context-prune", "push", str(source.path), "owner/name"])
                raise ConfigError(
                    f"The {what} of {entry.name!r} is the folder {source.path}. A Space on the Hub reads models from "
                    f"their own repositories: push the folder (`{command}`), then give owner/name here."
                )


def _pin(text: str) -> Source:
    """Return the source that a text names: a folder, or a Hub id at a commit."""
    path = expand_home(text)
    if os.path.exists(path) or not is_hub_id(text.partition("@")[0]):
        if not (os.path.isdir(path) or (path.suffix.lower() == ".gguf" and path.is_file())):
            raise ConfigError(
                f"{text!r} is neither a folder nor a Hub id (owner/name, owner/name@revision), nor a .gguf file."
            )
        return Source(path=Path(os.path.abspath(path)))
    repo, _, revision = text.partition("@")
    if COMMIT.fullmatch(revision):
        return Source(repo, revision)
    try:
        commit = HfApi().model_info(repo, revision=revision or None).sha
    except (OSError, ValueError, HTTPError) as error:
        raise LoadError(
            f"The commit of {text!r} can't be looked up: {explain_hub_error(error)}; or give the commit, as in "
            f"{repo}@COMMIT ({type(error).__name__})."
        ) from error
    if not commit:
        raise LoadError(f"The Hub names no commit of {text!r}.")
    return Source(repo, commit)


def _find_base(entry: Entry, facts: Facts) -> Source:
    if facts.plan is None:
        raise LoadError(f"{entry.model.label}: {' '.join(facts.problems)}")
    name, revision = (facts.plan.provenance.get(key) for key in ("base_model", "base_revision"))
    if is_demo_base(facts.plan.provenance):
        return Source()
    if is_hub_id(name) and isinstance(revision, str) and COMMIT.fullmatch(revision):
        return Source(name, revision)
    raise ConfigError(
        f"{entry.model.label} was pruned from {name!r} at revision {revision!r}, which is not a commit of a Hub "
        f"repository. Give the base with --base (a folder, owner/name, owner/name@revision, or demo)."
    )


def _model_files(path: Path) -> dict[str, Path]:
    """Return the files of a local model by their names in the Space; no link leads to one of another place."""
    if path.is_file():
        return {path.name: _gguf_file(path)}
    if not (path / "config.json").is_file():
        raise LoadError(f"{path} holds no config.json, so it is not a model folder.")
    manifest = verify_if_ours(path)
    if manifest is None:
        names = [
            entry.name for entry in sorted(path.iterdir()) if is_allowed(entry.name, "model") and not entry.is_dir()
        ]
    else:
        files = manifest["files"]
        if EXPORT_REPORT_NAME in files:
            raise LoadError(f"{path} is an export, which a Space can't load. Give the folder that was exported.")
        names = [*files, MANIFEST_NAME]
        refuse_foreign_code(path, saved_here=True)
    return {name: resolve_inside(path, name) for name in names}


def _gguf_file(path: Path) -> Path:
    """Return the real path of a GGUF file; no other file that a YAML names is copied."""
    file = resolve_inside(path.parent, path.name)
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise LoadError(f"{path} is neither a model folder nor a GGUF file.")
    return file


def _copy_models(local: dict[Source, dict[str, Path]], staging: Path) -> dict[Source, Source]:
    places = {}
    for source, found in local.items():
        assert source.path is not None
        folder = (
            staging / "models" / source.path.stem if source.path.is_file() else staging / "models" / source.path.name
        )
        while folder.exists():
            folder = folder.with_name(f"{folder.name}-2")
        for name, file in found.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
        drop_foreign_code(folder)  # of a base: many name code that nothing here needs
        places[source] = Source(path=folder / source.path.name if source.path.is_file() else folder)
    return places


def _kept_examples(settings: Settings, goal: Path) -> dict[str, Example]:
    """Return the examples of the Space that is replaced, where both models are of the same commits as now.

    So the same command writes the same files, and a push of them has nothing to do.
    """
    try:
        if verify_if_ours(goal, hash_weights=False) is None or not (goal / SPACE_SETTINGS_NAME).is_file():
            return {}
        old = read_space_settings(goal / SPACE_SETTINGS_NAME)
    except (ConfigError, LoadError):  # damaged or edited: whether it may be replaced is asked when it is
        return {}
    before = {entry.name: entry for entry in old.entries if entry.example is not None}
    same = {
        entry.name: before[entry.name]
        for entry in settings.entries
        if entry.name in before
        and entry.model.repo
        and (entry.base.repo or entry.base == Source())
        and _choice(entry) == _choice(before[entry.name])
        and settings.limits == old.limits
    }
    return _read_examples(replace(old, entries=tuple(same.values()))) if same else {}


def _choice(entry: Entry) -> tuple[Source, Source, tuple[str, ...]]:
    return entry.model, entry.base, entry.prompts


def _read_examples(settings: Settings) -> dict[str, Example]:
    """Return the examples that the settings name; no other file that a YAML names is copied, and perhaps pushed."""
    return {
        entry.name: Example.load(resolve_inside(entry.example.parent, entry.example.name))
        for entry in settings.entries
        if entry.example is not None
    }


def _relocate(index: int, entry: Entry, places: dict[Source, Source], staging: Path, example: Example | None) -> Entry:
    reports = {}
    for number, (text, file) in enumerate(entry.reports.items()):
        reports[text] = staging / "reports" / f"{index}-{number}.json"
        reports[text].parent.mkdir(exist_ok=True)
        if not file.exists():
            raise LoadError(f"The report {file} of {entry.name!r} is missing.")
        real = resolve_inside(file.parent, file.name)
        EvalReport.load(real)  # no other file that a YAML names is copied, and perhaps pushed
        shutil.copyfile(real, reports[text])
    model, base = (places.get(source, source) for source in (entry.model, entry.base))
    place = None if example is None else staging / "examples" / f"{index}.json"
    if example is not None and place is not None:
        place.parent.mkdir(exist_ok=True)
        example.save(place)
    return replace(entry, model=model, base=base, reports=reports, example=place)


def _describe_source(source: Source) -> str:
    if source.repo is None:
        return source.label
    return Trusted(
        f"[{inert(source.repo)}](https://huggingface.co/{source.repo}) at {code((source.revision or '')[:12])}"
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
