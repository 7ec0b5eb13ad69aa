"""The card of an export: what it was made from, how to run it, and how close it is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_context_prune.evaluation.reports.markdown import Trusted, block, code, inert, one_line, table
from hf_context_prune.evaluation.reports.summary import headline
from hf_context_prune.utils.file_names import CARD_NAME, PLAN_NAME
from hf_context_prune.utils.files import write_file

from .card import render
from .facts import CardFacts, facts_in
from .metadata import TAGS, export_data
from .text import licence_text

_LIBRARIES = {"gguf": None, "onnx": None, "quanto": "transformers", "torchao": "transformers"}
"""The Hub's name of the library that opens a format; it knows GGUF by its files, and ONNX by its tag."""


def write_export_card(
    folder: Path,
    *,
    name: str,
    source: Path | None,
    base: Mapping[str, Any],
    made_as: tuple[str, str, str],
    rows: Sequence[Sequence[str]],
    caption: str,
) -> None:
    """Write the card of an export into its folder.

    Args:
        folder: The folder that is being written.
        name: Name of the export.
        source: The folder that it was made from; with a plan its figures and its base are told.
        base: What the model that it was made from states of itself, where it has no plan.
        made_as: Format, data type of the weights, and name of the model that it was made from.
        rows: Rows of measure, that model, the export, change.
        caption: What they were measured on.

    Raises:
        SaveError: The file can't be written.
    """
    format, weights, origin = made_as
    facts = None
    if source is not None and (source / PLAN_NAME).is_file():
        facts = facts_in(source, name=source.name)
    stated, place = (base, origin) if facts is None else (facts.base, facts.base_name)
    values = {
        "name": name,
        "summary": _summary(format, weights, origin, facts),
        "run": _run_lines(format, name),
        "comparison": Trusted(f"{table(('measure', 'before', 'export', 'change'), rows)}\n\n{inert(caption)}"),
        "limits": _LIMITS,
        "licence": licence_text(stated, place),
    }
    tags = (*(TAGS if facts is not None else ()), format)
    data = export_data(stated, _LIBRARIES[format], tags)
    write_file(folder / CARD_NAME, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{render('export_card', values)}\n")))


_LIMITS = Trusted(
    "The limits of the model that this was made from hold here too: it is no source of legal, medical or financial "
    "advice, and what pruning did to refusals and other safety behaviour was not tested."
)


def _summary(format: str, weights: str, origin: str, facts: CardFacts | None) -> Trusted:
    text = f"{code(origin)} as {inert(format)} with {inert(weights)} weights"
    if facts is None:
        return Trusted(f"{text}.")
    text += f"; {code(facts.name)} was pruned from {code(facts.base_id or facts.base_name)} by contextual pruning"
    figures = "" if facts.report is None else f" Before the export it was: {inert(' '.join(headline(facts.report)))}"
    return Trusted(f"{text}.{figures}")


def _run_lines(format: str, name: str) -> Trusted:
    place = shlex.quote(one_line(name))
    if format == "gguf":
        lines = [f"llama-cli -m {place}/model.gguf", f"cd {place} && ollama create {place} -f Modelfile"]
        return block("sh", "\n".join(lines))
    lines = ["from hf_context_prune import open_export", "", f"runtime = open_export({one_line(name)!r})"]
    extra = f"with hf-context-prune and its extra {code(format)}, from a checkout: {code(f'pip install .[{format}]')}."
    return Trusted(f"{block('python', chr(10).join(lines))}\n\n{extra}")
