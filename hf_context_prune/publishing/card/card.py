"""Model cards: built from the facts of a pruned folder, with the picture of the widths."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

from huggingface_hub import ModelCard
from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.evaluation.reports.markdown import Trusted, inert
from hf_context_prune.evaluation.reports.plots import describe_widths, plot_widths, png_of
from hf_context_prune.evaluation.reports.report import EvalReport
from hf_context_prune.modeling.geometry import widths_vary
from hf_context_prune.storage.manifest import hash_file, verify_folder
from hf_context_prune.storage.staging import staged_folder
from hf_context_prune.utils.file_names import CARD_NAME, PICTURE_NAME, PLAN_NAME, REPORT_NAME, RESULTS_NAME
from hf_context_prune.utils.files import resolve_path, write_file
from hf_context_prune.utils.foreign_code import drop_foreign_code, find_foreign_code
from hf_context_prune.utils.links import resolve_inside
from hf_context_prune.utils.locks import reserves

from .facts import CardFacts, facts_in
from .metadata import benchmark_results, card_data
from .text import body_values

CARD_FILES = (CARD_NAME, PICTURE_NAME, RESULTS_NAME)
_LOGGER = logging.getLogger(__name__)


@cache
def _template(name: str) -> Template:
    path = Path(__file__).parents[1] / "templates" / f"{name}.md.jinja"
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, finalize=_finalize, keep_trailing_newline=True, autoescape=False
    )
    return environment.from_string(path.read_text(encoding="utf-8"))


def _finalize(value: object) -> object:
    """Return trusted Markdown as it is, and anything else as text without markup."""
    return value if isinstance(value, Trusted) else inert(str(value))


def render(template: str, values: Mapping[str, object]) -> str:
    """Return a template of a card, filled in; values that are not trusted Markdown become text without markup."""
    return re.sub(r"\n{3,}", "\n\n", _template(template).render(values)).strip()


def build_card(facts: CardFacts) -> ModelCard:
    """Build the card of a pruned model.

    Every value that others chose (names, texts, options, versions) is shown as text: it can't become markup, a link, a
    template or another field of the metadata.
    """
    body = render("model_card", body_values(facts))
    return ModelCard(f"---\n{card_data(facts).to_yaml()}\n---\n\n{body}\n")


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write the card into a folder, such as one that is being written, with a picture where widths vary.

    Raises:
        SaveError: A file can't be written.
    """
    facts = replace(facts, foreign_code=tuple(find_foreign_code(folder)))
    write_file(folder / CARD_NAME, str(build_card(facts)))
    if widths_vary(facts.plan.widths):
        removed = facts.report.size.achieved_ratio if facts.report is not None else None
        picture = plot_widths(facts.plan, describe_widths(facts.plan, removed))
        write_file(folder / PICTURE_NAME, png_of(picture))
    if facts.report is not None and (results := benchmark_results(facts.report)) is not None:
        (folder / RESULTS_NAME).parent.mkdir(exist_ok=True)
        write_file(folder / RESULTS_NAME, results)


@reserves("folder")
def make_card(
    folder: str | Path, *, name: str | None = None, overwrite: bool = False, report: EvalReport | None = None
) -> Path:
    """Rewrite the card of a folder from the folder alone, whole or not at all.

    References to code of others, as earlier versions took over from the base, are removed from the folder.

    Args:
        folder: A saved folder with a plan.
        name: The name of the model, such as its id on the Hub; None takes the name of the folder.
        overwrite: Replace a card that was edited by hand.
        report: A newer report, which replaces the one in the folder.

    Returns:
        The path of the card.

    Raises:
        ConfigError: The card was edited, and `overwrite` is not set.
        LoadError: The folder was not saved by this package, is damaged, or has no plan.
        SaveError: The card can't be written; the folder is as it was.
    """
    path = resolve_path(folder, LoadError)
    files = verify_folder(path, hash_weights=False)["files"]
    if PLAN_NAME not in files:
        raise LoadError(f"{path} has no {PLAN_NAME}, so a card would have no facts. Prune a model first.")
    if not overwrite and CARD_NAME in files and hash_file(path / CARD_NAME) != files[CARD_NAME]["sha256"]:
        raise ConfigError(
            f"{path / CARD_NAME} was edited by hand, and the edits would be lost. Add --overwrite to replace the card."
        )
    facts = facts_in(path, name=name or path.name, report=report)  # here, so that errors name files that stay
    with staged_folder(path, required_bytes=2**20, discard_edits=overwrite) as staging:
        for file in files:
            if file not in (*CARD_FILES, *([REPORT_NAME] if report else [])):
                (staging / file).parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(path, file, staging / file)
        if report is not None:
            report.save(staging / REPORT_NAME)
        for dropped in drop_foreign_code(staging):
            _LOGGER.warning("Removed from %s: %s. It is not this package's, and nothing here needs it.", path, dropped)
        write_card(staging, facts)
    return path / CARD_NAME


def _link_or_copy(folder: Path, name: str, target: Path) -> None:
    """Link a file to a second name, so that weights are not written again; copy it where links are not possible.

    A file of the Hub's cache, to which its snapshot links, is copied too: it must keep its own permissions.
    """
    source = resolve_inside(folder, name)
    with suppress(OSError):
        if source == folder / name:
            os.link(source, target)
            return
    shutil.copyfile(source, target)
