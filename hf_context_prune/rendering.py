"""Reports of pruned folders as Markdown and pictures, from the facts in the folders alone."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, LoadError
from .evaluation import EvalReport
from .figures import new_figure, widths_figure
from .markdown import inert, table
from .plan import PruningPlan
from .saving import PLAN_NAME, REPORT_NAME, staged_folder, verify_folder

REPORT_MARKDOWN = "report.md"
LOSS_PICTURE = "loss-against-size.png"


@dataclass(frozen=True)
class Folder:
    """What a pruned folder tells.

    Attributes:
        name: Of the folder.
        plan: What was kept.
        report: What it cost.
    """

    name: str
    plan: PruningPlan
    report: EvalReport


def read_folder(folder: str | Path) -> Folder:
    """Read the facts of a folder, after checking its files.

    Raises:
        LoadError: It is not one that this package wrote, is damaged, or has no report.
    """
    path = Path(folder)
    manifest = verify_folder(path)
    if REPORT_NAME not in manifest["files"]:
        raise LoadError(f"{path} has no {REPORT_NAME}: it was saved without figures. Prune it anew, or measure it.")
    return Folder(path.resolve().name, PruningPlan.load(path / PLAN_NAME), EvalReport.load(path / REPORT_NAME))


def markdown(folders: Sequence[Folder], *, pictures: bool) -> str:
    """The figures of folders, one section each.

    Args:
        folders: In the order of the sections.
        pictures: Refer to the pictures of [`render`][].
    """
    parts = ["# Pruned models", ""]
    if pictures and len(folders) > 1:
        parts += [f"![Loss against size]({LOSS_PICTURE})", ""]
    for number, folder in enumerate(folders):
        report = folder.report
        rows = report.table_rows()
        header = ("measure", "base", "pruned", "change")[: len(rows[0])]
        parts += [f"## {inert(folder.name)}", "", f"Pruned from {inert(report.base_model)}.", ""]
        parts += [table(header, rows)]
        parts += ["", inert(f"Text: {report.dataset.name}. {report.dataset.held_out}"), ""]
        parts += [f"- {inert(note)}" for note in report.notes]
        if pictures:
            parts += ["", f"![Widths of {inert(folder.name)}]({_widths_picture(folders, number)})"]
        parts += ["", f"Plan `{folder.plan.sha256}`, measured {report.created} on {inert(_machine(report))}.", ""]
    return "\n".join(parts)


def render(folders: Sequence[Folder], target: str | Path) -> Path:
    """Write ``report.md`` with its pictures to a folder, whole or not at all.

    Raises:
        ConfigError: Two folders have one name.
        SaveError: The folder can't be written, or holds something else.
    """
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError(f"The folders are named {', '.join(names)}; a report needs names that differ.")
    goal = Path(target).resolve()
    with staged_folder(goal, required_bytes=len(folders) * 2**20, replaces=REPORT_MARKDOWN) as staging:
        for number, folder in enumerate(folders):
            picture = staging / _widths_picture(folders, number)
            widths_figure(folder.plan, f"Widths of {folder.name}").savefig(picture, dpi=120)
        if len(folders) > 1:
            _loss_figure(folders).savefig(staging / LOSS_PICTURE, dpi=120)
        (staging / REPORT_MARKDOWN).write_text(markdown(folders, pictures=True), encoding="utf-8")
    return goal


def _machine(report: EvalReport) -> str:
    environment = report.environment
    return f"{environment.platform}, {environment.threads} threads, {environment.dtype}"


def _widths_picture(folders: Sequence[Folder], number: int) -> str:
    names = [re.sub(r"[^\w-]", "-", folder.name) for folder in folders]
    again = f"-{number + 1}" if names.count(names[number]) > 1 else ""
    return f"widths-{names[number]}{again}.png"


def _loss_figure(folders: Sequence[Folder]) -> Any:  # noqa: ANN401 - matplotlib's
    figure = new_figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for folder in folders:
        loss, size = folder.report.loss, folder.report.size
        for summary, marker, when in ((loss.pruned, "o", ""), (loss.recovered, "s", " (recovered)")):
            if summary is None or size.pruned_parameters is None:
                continue
            value = summary.bits_per_byte
            low, high = value.interval or (value.value, value.value)
            axis.errorbar(
                size.pruned_parameters / 1e6,
                value.value,
                yerr=[[value.value - low], [high - value.value]],
                fmt=marker,
                capsize=3,
                label=f"{folder.name}{when}",
            )
        base = loss.base.bits_per_byte.value
        axis.plot(size.base_parameters / 1e6, base, "*", color="0.4", markersize=11)
    axis.set_xlabel("parameters, millions (stars: bases)")
    axis.set_ylabel("bits a byte, held-out text")
    axis.legend(fontsize="small")
    return figure


def matrix_picture(names: Sequence[str], changes: Mapping[tuple[str, str], float]) -> bytes:
    """Draw the domain matrix as a heat map; a PNG file's bytes.

    Args:
        names: Domains, in order.
        changes: Change of the bits a byte against the dense model, by (calibrated on, measured on).
    """
    side = 2.5 + 0.9 * len(names)
    figure = new_figure(figsize=(side + 1.5, side))
    axis = figure.subplots()
    values = [[100 * changes[row, column] for column in names] for row in names]
    most = max(1e-9, *(abs(value) for line in values for value in line))
    image = axis.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most)  # white: as the dense model
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "white" if abs(value) > 0.6 * most else "black"
            axis.text(column, row, f"{value:+.1f} %", ha="center", va="center", color=colour)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("measured on")
    axis.set_ylabel("calibrated on")
    axis.set_title("Bits a byte against the dense model")
    figure.colorbar(image, ax=axis, shrink=0.8, label="per cent")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
