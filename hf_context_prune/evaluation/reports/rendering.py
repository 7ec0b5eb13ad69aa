"""Reports of runs as Markdown and pictures, from the facts in their folders alone."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.evaluation.bootstrap import ratio_to_change
from hf_context_prune.modeling.geometry import widths_vary
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.storage.manifest import verify_if_ours
from hf_context_prune.storage.staging import resolve_target, staged_folder
from hf_context_prune.utils.file_names import MANIFEST_NAME, PLAN_NAME, REPORT_MARKDOWN_NAME, REPORT_NAME
from hf_context_prune.utils.links import resolve_inside

from .formatting import format_percent
from .markdown import inert, one_line, table
from .plots import PlotPoint, describe_widths, plot_curves, plot_losses, plot_matrix, plot_widths, png_of
from .report import EvalReport, LossFacts
from .rows import source_tables, table_header, table_rows
from .run_report import AnyReport, RunReport, load_report
from .summary import headline, legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS_PICTURE = "loss-against-size.png"
SIDE_BY_SIDE = ("model", "parameters", "gone", "bits per byte", "general text", "decode", "text")
"""Columns of the table that shows several models."""
FILES_OF_RUNS = {"matrix": ("matrix.md", "matrix.png", "mix.png"), "sweep": ("sweep.md", LOSS_PICTURE)}
"""Files that a run writes beside its report, by kind; Markdown first."""
_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Folder:
    """Facts of the folder of a run.

    Attributes:
        name: Name of the folder.
        plan: The pruning plan; None where the folder holds no model.
        report: The report.
    """

    name: str
    plan: PruningPlan | None
    report: AnyReport


def read_folders(folders: Sequence[str | Path]) -> list[Folder]:
    """Read the facts of folders; the files of pruned models are verified first.

    Raises:
        LoadError: A folder was not written by this package, is damaged, or has no report.
        ConfigError: Two folders have the same name.
    """
    found = [read_folder(folder) for folder in folders]
    names = [folder.name for folder in found]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"The folders are named {', '.join(names)}; a report needs names that differ. Link or rename some."
        )
    return found


def read_folder(folder: str | Path) -> Folder:
    """Read the facts of a folder; the files of a pruned model are verified first.

    Raises:
        LoadError: The folder was not written by this package, is damaged, or has no report.
    """
    path = Path(folder)
    report = path / REPORT_NAME
    # The name as given, since a link has its own name; bytes that are not UTF-8 can't be shown.
    name = one_line(os.fsencode(Path(os.path.abspath(path)).name).decode("utf-8", "replace"))
    manifest = verify_if_ours(path)
    if manifest is None:
        if not report.is_file():
            raise LoadError(
                f"{path} has no {REPORT_NAME} and no {MANIFEST_NAME}: name a folder that prune, evaluate, bench, "
                f"cross-domain or paper-grid wrote."
            )
        return Folder(name, None, load_report(resolve_inside(path, REPORT_NAME)))
    if REPORT_NAME not in (files := manifest["files"]):
        raise LoadError(
            f"{path} has no {REPORT_NAME}: it was saved without figures. Prune again with figures, or run `evaluate`."
        )
    plan = PruningPlan.load(resolve_inside(path, PLAN_NAME)) if PLAN_NAME in files else None
    return Folder(name, plan, load_report(resolve_inside(path, REPORT_NAME)))


def render_markdown(
    folders: Sequence[Folder], *, pictures: Mapping[str, Sequence[tuple[str, str]]] | None = None
) -> str:
    """Return the figures of folders as Markdown, one section each.

    Args:
        folders: Folders, in the order of the sections.
        pictures: (title, file) of the pictures of a folder, by its name; by ``""`` those of all folders.
    """
    pictures = pictures or {}
    parts = ["# Reports", ""]
    if rows := side_by_side(folders):
        parts += [table(SIDE_BY_SIDE, rows), ""]
    parts += picture_markdown(pictures.get("", ()))
    for folder in folders:
        parts += [f"## {inert(folder.name)}", ""]
        parts += run_markdown(folder.report) if isinstance(folder.report, RunReport) else _model_markdown(folder.report)
        parts += picture_markdown(pictures.get(folder.name, ()))
        plan = f"Plan `{folder.plan.sha256}`, measured" if folder.plan else "Measured"
        parts += [f"{plan} {inert(folder.report.created)} on {inert(_environment_text(folder.report))}.", ""]
    return "\n".join(parts)


def side_by_side(folders: Sequence[Folder]) -> list[tuple[str, ...]]:
    """Return a row under [`SIDE_BY_SIDE`][] for each model and each evaluation of one; none where there are not two.

    The changes are those against the base of each, on its own text; a dash stands for what was not measured.
    """
    found = [(folder.name, folder.report) for folder in folders if isinstance(folder.report, EvalReport)]
    models = [(name, report) for name, report in found if report.size.pruned_parameters is not None]
    if len(models) < 2:
        return []
    return [(name, *_short_figures(report)) for name, report in models]


def _short_figures(report: EvalReport) -> tuple[str, ...]:
    size, general = report.size, report.general
    ratio = report.speed.ratio() if report.speed else None
    gone = "-" if size.achieved_ratio is None else format_percent(-size.achieved_ratio)
    return (
        f"{size.pruned_parameters:,}",
        gone,
        _change(report.loss),
        "-" if general is None else _change(general.loss),
        "-" if ratio is None else f"x{ratio.decode.median:.2f}",
        report.dataset.name,
    )


def _change(loss: LossFacts) -> str:
    comparison = loss.last_comparison
    return "-" if comparison is None else format_percent(comparison.bits_per_byte_ratio.value - 1)


def render(folders: Sequence[Folder], target: str | Path) -> Path:
    """Write ``report.md`` with its pictures to a folder, whole or not at all.

    Args:
        folders: Facts that [`read_folders`][] gave.
        target: The folder; an older report there is replaced.

    Raises:
        LoadError: Figures can't be drawn.
        SaveError: The folder can't be written, or holds something else.
    """
    goal = resolve_target(target)
    with staged_folder(goal, required_bytes=len(folders) * 2**20, replaces=REPORT_MARKDOWN_NAME) as staging:
        shown: dict[str, list[tuple[str, str]]] = {}
        for folder in folders:
            safe = re.sub(r"[^\w-]", "-", folder.name)
            for file, (title, picture) in draw_pictures(folder).items():
                own = stem = f"{Path(file).stem}-{safe}"
                for number in itertools.count(2):
                    if not (staging / f"{own}.png").exists():
                        break
                    own = f"{stem}-{number}"
                (staging / f"{own}.png").write_bytes(picture)
                shown.setdefault(folder.name, []).append((title, f"{own}.png"))
        if panels := _panels(folders):
            (staging / LOSS_PICTURE).write_bytes(_draw_png("these folders", plot_losses, panels))
            shown[""] = [("Loss against size", LOSS_PICTURE)]
        (staging / REPORT_MARKDOWN_NAME).write_text(render_markdown(folders, pictures=shown), encoding="utf-8")
    return goal


def report_kind(report: AnyReport) -> str:
    """Return the command that wrote a report."""
    return report.kind if isinstance(report, RunReport) else "evaluate"


def picture_markdown(pictures: Sequence[tuple[str, str]]) -> list[str]:
    """Return the Markdown lines that show pictures, given as (title, file name)."""
    return [line for title, file in pictures for line in (f"![{inert(title)}]({file})", "")]


def _environment_text(report: AnyReport) -> str:
    environment = report.environment
    return f"{environment.platform}, {environment.threads} threads, {environment.dtype}"


def _model_markdown(report: EvalReport) -> list[str]:
    single = report.size.pruned_parameters is None
    about = f"{report.base_model}, alone." if single else f"Pruned from {report.base_model}."
    parts: list[str] = [
        inert(" ".join([about, *headline(report)])),
        table(table_header(report), table_rows(report, intervals=True)),
    ]
    for title, (header, *rows) in source_tables(report):
        parts += [f"{inert(title)}:", table(header, rows)]
    if brackets := legend(report):
        parts.append(inert(" ".join(brackets)))
    parts.append(inert(f"Text: {report.dataset.name}. {report.dataset.held_out}"))
    parts += [f"- {inert(note)}" for note in report.notes]
    return [line for part in parts for line in (part, "")]


def run_markdown(report: RunReport) -> list[str]:
    """Return the Markdown lines of a run: its tables and notes."""
    parts = []
    for one in report.tables:
        parts += [inert(one.caption or one.title), "", table(one.header, one.rows), ""]
    return [*parts, *(f"- {inert(note)}" for note in report.notes), *([""] if report.notes else [])]


def _draw_png(name: str, draw: Callable[..., Figure], *values: Any) -> bytes:  # noqa: ANN401
    """Return a picture as the bytes of a PNG file.

    Raises:
        LoadError: The values can't be drawn.
    """
    try:
        return png_of(draw(*values))
    except _DAMAGE as error:
        raise LoadError(f"The figures of {name} can't be drawn ({error!r:.200}): a report is damaged.") from error


def draw_pictures(folder: Folder) -> dict[str, tuple[str, bytes]]:
    """Return (title, bytes of a PNG file) by file name."""
    found: dict[str, tuple[str, bytes]] = {}
    if folder.plan is not None and widths_vary(folder.plan.widths):
        removed = folder.report.size.achieved_ratio if isinstance(folder.report, EvalReport) else None
        result = describe_widths(folder.plan, removed)
        found["widths.png"] = (f"{folder.name}: {result}", _draw_png(folder.name, plot_widths, folder.plan, result))
    if isinstance(folder.report, RunReport):
        for name, (title, draw) in _DRAWINGS.get(folder.report.kind, {}).items():
            if name != "mix.png" or folder.report.figures.get("mixes"):
                found[name] = (title, _draw_png(folder.name, draw, folder.report.figures))
    return found


def _draw_matrix(figures: Mapping[str, Any]) -> Figure:
    changes = {}
    for cell in figures["cells"]:
        if "change" in cell:
            ratio = cell["change"]["bits_per_byte_ratio"]
            interval = ratio["interval"] and (ratio["interval"][0] - 1, ratio["interval"][1] - 1)
            changes[cell["calibrated"], cell["measured"]] = (ratio["value"] - 1, interval)
    return plot_matrix(figures["domains"], changes)


def _draw_mixes(figures: Mapping[str, Any]) -> Figure:
    return plot_curves(figures["mixes"], figures["reference"])


def _draw_grid(figures: Mapping[str, Any]) -> Figure:
    points = [_point("base", figures["base"], "*")]
    for row in figures["rows"]:
        label = ", ".join(
            f"{name} {'off' if row[name] is None else format(row[name], 'g')}"
            for name in ("linear", "activation", "embedding")
        )
        for when, marker in (("pruned", "o"), ("tuned", "s")):
            if row[when] is not None:
                points.append(_point(f"{label}{'' if when == 'pruned' else ', tuned'}", row[when], marker))
    return plot_losses({"Test text": points})


_DRAWINGS: dict[str, dict[str, tuple[str, Callable[[Mapping[str, Any]], Figure]]]] = {
    "matrix": {
        "matrix.png": ("Change of the bits per byte", _draw_matrix),
        "mix.png": ("General text mixed in", _draw_mixes),
    },
    "sweep": {LOSS_PICTURE: ("Loss against size", _draw_grid)},
}


def _point(label: str, scores: Mapping[str, Any], marker: str) -> PlotPoint:
    bits, place = scores["loss"]["bits_per_byte"], scores["parameters"] / 1e6
    interval = bits["interval"] and tuple(bits["interval"])
    against = scores["change"]["bits_per_byte_ratio"]["interval"] if "change" in scores else None
    return PlotPoint(label, place, bits["value"], interval, against and (against[0] - 1, against[1] - 1), marker)


def _panels(folders: Sequence[Folder]) -> dict[str, list[PlotPoint]]:
    """Return the losses of pruned models against their sizes, by the text, and the amount of it, that they are on."""
    panels: dict[str, list[PlotPoint]] = {}
    texts: dict[str, str] = {}
    for folder in folders:
        report = folder.report
        if isinstance(report, RunReport) or report.size.pruned_parameters is None:
            continue
        size, loss, text = report.size, report.loss, report.dataset
        if text.fingerprint not in texts:
            same = text.name in texts.values()
            texts[text.fingerprint] = f"{text.name} ({text.fingerprint[:8]})" if same else text.name
        amount = f"{loss.last.num_documents:,} documents, {loss.last.num_bytes:,} bytes"
        if text.max_seq_length is not None:
            amount += f", windows of {text.max_seq_length:,} tokens"
        points = panels.setdefault(f"{texts[text.fingerprint]}: {amount}", [])
        if loss.base is not None:
            name = f"base: {report.base_model}"
            base = PlotPoint(name, size.base_parameters / 1e6, loss.base.bits_per_byte.value, marker="*")
            if base not in points:
                points.append(base)
        models = (
            ("", loss.pruned, loss.comparison, "o"),
            (" (recovered)", loss.recovered, loss.recovered_comparison, "s"),
        )
        for when, summary, against, marker in models:
            if summary is not None:
                bits, place = summary.bits_per_byte, report.size.pruned_parameters / 1e6
                change = None if against is None else ratio_to_change(against.bits_per_byte_ratio).interval
                points.append(PlotPoint(f"{folder.name}{when}", place, bits.value, bits.interval, change, marker))
    return panels
