"""Reports of runs as Markdown and pictures, from the facts in their folders alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, LoadError, SaveError
from .evaluation import AnyReport, EvalReport, RunReport, load_report
from .figures import Point, curves_figure, losses_figure, matrix_figure, widths_figure
from .files import check_writable, write_file
from .manifest import MANIFEST_NAME
from .markdown import inert, table
from .plan import PruningPlan
from .saving import PLAN_NAME, REPORT_NAME, staged_folder, verify_folder

REPORT_MARKDOWN = "report.md"
LOSS_PICTURE = "loss-against-size.png"
_SIZE, _LOSS = "parameters, millions (stars: bases)", "bits a byte, held-out text"


@dataclass(frozen=True)
class Folder:
    """What the folder of a run tells.

    Attributes:
        name: Of the folder.
        plan: What was kept; None where no model lies there.
        report: What was measured.
    """

    name: str
    plan: PruningPlan | None
    report: AnyReport


def read_folder(folder: str | Path) -> Folder:
    """Read the facts of a folder; those of a pruned model after checking its files.

    Raises:
        LoadError: It is not one that this package wrote, is damaged, or has no report.
    """
    path = Path(folder)
    name, report = path.resolve().name, path / REPORT_NAME
    if not (path / MANIFEST_NAME).is_file() and report.is_file():  # of evaluate, bench, matrix or sweep
        return Folder(name, None, load_report(report))
    if REPORT_NAME not in (files := verify_folder(path)["files"]):
        raise LoadError(f"{path} has no {REPORT_NAME}: it was saved without figures. Prune it anew, or measure it.")
    return Folder(name, PruningPlan.load(path / PLAN_NAME) if PLAN_NAME in files else None, load_report(report))


def markdown(folders: Sequence[Folder], *, pictures: Mapping[str, Sequence[tuple[str, str]]] | None = None) -> str:
    """The figures of folders, one section each.

    Args:
        folders: In the order of the sections.
        pictures: (what it shows, file) of the pictures of a folder, by its name; by ``""`` of all folders.
    """
    pictures = pictures or {}
    parts = ["# Reports", "", *_shown(pictures.get("", ()))]
    for folder in folders:
        parts += [f"## {inert(folder.name)}", ""]
        parts += _run_parts(folder.report) if isinstance(folder.report, RunReport) else _model_parts(folder.report)
        parts += _shown(pictures.get(folder.name, ()))
        plan = f"Plan `{folder.plan.sha256}`, measured" if folder.plan else "Measured"
        parts += [f"{plan} {folder.report.created} on {inert(_machine(folder.report))}.", ""]
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
    safe = [re.sub(r"[^\w-]", "-", name) for name in names]
    goal = Path(target).resolve()
    with staged_folder(goal, required_bytes=len(folders) * 2**20, replaces=REPORT_MARKDOWN) as staging:
        shown: dict[str, list[tuple[str, str]]] = {}
        for number, folder in enumerate(folders):
            again = f"-{number + 1}" if safe.count(safe[number]) > 1 else ""
            for file, (title, figure) in _pictures(folder).items():
                own = f"{Path(file).stem}-{safe[number]}{again}.png"
                figure.savefig(staging / own, dpi=120)
                shown.setdefault(folder.name, []).append((title, own))
        if panels := _panels(folders):
            losses_figure(panels, _SIZE, _LOSS).savefig(staging / LOSS_PICTURE, dpi=120)
            shown[""] = [("Loss against size", LOSS_PICTURE)]
        (staging / REPORT_MARKDOWN).write_text(markdown(folders, pictures=shown), encoding="utf-8")
    return goal


def check_report_place(folder: str | Path, kind: str) -> None:
    """Refuse a folder that a report can't go to, before the long work.

    Args:
        folder: May be absent.
        kind: Of the report: the command. An older one of the same is replaced.

    Raises:
        SaveError: It holds a model, another kind of report or something else that this package saved, or can't be
            written.
    """
    path = Path(folder)
    check_writable(path)
    if (path / MANIFEST_NAME).is_file():
        raise SaveError(f"{path} holds a model or a rendered report; figures go to a folder of their own: --output.")
    if (path / REPORT_NAME).exists():
        try:
            older = load_report(path / REPORT_NAME)
        except LoadError as error:
            raise SaveError(f"{error} It would be lost: remove it, or choose another --output.") from error
        if (held := _kind(older)) != kind:
            raise SaveError(f"{path} holds what {held} found, which would be lost: choose another --output.")


def save_report(report: AnyReport, folder: str | Path) -> None:
    """Write ``eval_report.json`` to a folder, which is made if it is not there; an older report is replaced.

    Raises:
        SaveError: See [`check_report_place`][]; or the file can't be written.
    """
    path = Path(folder)
    check_report_place(path, _kind(report))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{path} can't be made: {error.strerror or error}. Choose another --output.") from error
    report.save(path / REPORT_NAME)


def write_run(report: RunReport, folder: Path, file: str) -> None:
    """Write a run's ``eval_report.json``, its pictures, and its Markdown.

    Args:
        report: Of the run.
        folder: Of the run; is there.
        file: Name of the Markdown file.

    Raises:
        SaveError: One can't be written.
    """
    import io

    pictures = _pictures(Folder(folder.name, None, report))
    for name, (_, figure) in pictures.items():
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=120)
        write_file(folder / name, drawn.getvalue())
    shown = _shown([(title, name) for name, (title, _) in pictures.items()])
    write_file(folder / file, "\n".join([f"# {inert(report.title)}", "", *shown, *_run_parts(report)]))
    save_report(report, folder)


def _kind(report: AnyReport) -> str:
    return report.kind if isinstance(report, RunReport) else "evaluate"


def _shown(pictures: Sequence[tuple[str, str]]) -> list[str]:
    return [line for title, file in pictures for line in (f"![{inert(title)}]({file})", "")]


def _machine(report: AnyReport) -> str:
    environment = report.environment
    return f"{environment.platform}, {environment.threads} threads, {environment.dtype}"


def _model_parts(report: EvalReport) -> list[str]:
    rows = report.table_rows()
    single = report.size.pruned_parameters is None
    header = ("measure", "base", "pruned", "change") if not single else ("measure", "value")
    return [
        f"{inert(report.base_model)}, alone." if single else f"Pruned from {inert(report.base_model)}.",
        "",
        table(header, rows),
        "",
        inert(f"Text: {report.dataset.name}. {report.dataset.held_out}"),
        "",
        *(line for note in report.notes for line in (f"- {inert(note)}", "")),
    ]


def _run_parts(report: RunReport) -> list[str]:
    parts = []
    for one in report.tables:
        parts += [inert(one.caption or one.title), "", table(one.header, one.rows), ""]
    return [*parts, *(f"- {inert(note)}" for note in report.notes), *([""] if report.notes else [])]


def _pictures(folder: Folder) -> dict[str, tuple[str, Any]]:
    """(what it shows, matplotlib figure) by file name."""
    found: dict[str, tuple[str, Any]] = {}
    if folder.plan is not None:
        title = f"Widths of {folder.name}"
        found["widths.png"] = (title, widths_figure(folder.plan, title))
    if isinstance(folder.report, RunReport):
        try:
            found |= _run_pictures(folder.report)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(f"The figures of the report in {folder.name} are damaged ({error!r}).") from error
    return found


def _run_pictures(report: RunReport) -> dict[str, tuple[str, Any]]:
    figures = report.figures
    if report.kind == "matrix":
        names = figures["domains"]
        changes = {
            (cell["calibrated"], cell["measured"]): cell["change"]["bits_per_byte_ratio"]["value"] - 1
            for cell in figures["cells"]
            if "change" in cell
        }
        found = {"matrix.png": ("Change of the bits a byte", matrix_figure(names, changes))}
        if curves := figures["mixes"]:
            found["mix.png"] = ("General text mixed in", curves_figure(curves, figures["reference"]))
        return found
    if report.kind == "sweep":
        base, points = figures["base"], []
        for row in figures["rows"]:
            label = ", ".join(
                f"{name} {'off' if row[name] is None else format(row[name], 'g')}"
                for name in ("linear", "activation", "embedding")
            )
            for when, marker in (("pruned", "o"), ("tuned", "s")):
                if row[when] is not None:
                    points.append(_point(f"{label}{'' if when == 'pruned' else ', tuned'}", row[when], marker))
        panels = {"": [_point("dense", base, "*"), *points]}
        return {LOSS_PICTURE: ("Loss against size", losses_figure(panels, _SIZE, _LOSS))}
    return {}


def _point(label: str, scores: Mapping[str, Any], marker: str) -> Point:
    bits = scores["loss"]["bits_per_byte"]
    interval = bits["interval"]
    return Point(label, scores["parameters"] / 1e6, bits["value"], interval and (interval[0], interval[1]), marker)


def _panels(folders: Sequence[Folder]) -> dict[str, list[Point]]:
    """Losses of pruned models against their sizes, by the text that they were measured on."""
    panels: dict[str, list[Point]] = {}
    titles: dict[str, str] = {}
    for folder in folders:
        report = folder.report
        if isinstance(report, RunReport) or report.size.pruned_parameters is None:
            continue
        size, loss, text = report.size, report.loss, report.dataset
        title = titles.setdefault(text.fingerprint, text.name)
        if any(other == title for key, other in titles.items() if key != text.fingerprint):
            title = titles[text.fingerprint] = f"{text.name} ({text.fingerprint[:8]})"
        points = panels.setdefault(title, [])
        base = Point("base", size.base_parameters / 1e6, loss.base.bits_per_byte.value, None, "*")
        if base not in points:
            points.append(base)
        for summary, marker, when in ((loss.pruned, "o", ""), (loss.recovered, "s", " (recovered)")):
            if summary is not None:
                bits = summary.bits_per_byte
                place = report.size.pruned_parameters / 1e6
                points.append(Point(f"{folder.name}{when}", place, bits.value, bits.interval, marker))
    return panels
