"""Reports written to folders, and folders that are refused since they hold something else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hf_context_prune.errors import LoadError, SaveError
from hf_context_prune.storage.files import check_writable, refuse_inside_own
from hf_context_prune.storage.manifest import claims_to_be_ours
from hf_context_prune.utils.file_names import MANIFEST_NAME, REPORT_NAME
from hf_context_prune.utils.files import resolve_path, write_file

from .markdown import inert
from .rendering import FILES_OF_RUNS, Folder, draw_pictures, picture_markdown, report_kind, run_markdown
from .run_report import AnyReport, RunReport, load_report


def check_report_folder(folder: str | Path, kind: str) -> None:
    """Refuse a folder that a report can't be written to, before the long work.

    Args:
        folder: The folder, which may be absent.
        kind: Kind of the report: its command. An older report of that kind is replaced.

    Raises:
        SaveError: The folder holds a model, another kind of report or something else that this package saved, lies in
            such a folder, or can't be written.
    """
    path = resolve_path(folder, SaveError)
    refuse_inside_own(path)
    check_writable(path)
    for name in (REPORT_NAME, *FILES_OF_RUNS.get(kind, ())):
        if os.path.lexists(path / name) and not stat.S_ISREG((path / name).lstat().st_mode):
            raise SaveError(
                f"{path / name} is a link or no regular file, and would be lost: remove it, or choose another --output."
            )
    if claims_to_be_ours(path) or any(os.path.lexists(path / name) for name in (MANIFEST_NAME, "config.json")):
        raise SaveError(f"{path} holds a model or a rendered report. Write the figures to a separate folder: --output.")
    if os.path.lexists(path / REPORT_NAME):
        try:
            older = load_report(path / REPORT_NAME)
        except LoadError as error:
            raise SaveError(f"{error} The file would be lost: remove it, or choose another --output.") from error
        if (held := report_kind(older)) != kind:
            raise SaveError(f"{path} holds a report of {held}, which would be lost: choose another --output.")
    elif present := [name for name in FILES_OF_RUNS.get(kind, ()) if os.path.lexists(path / name)]:
        raise SaveError(
            f"{path} has {', '.join(present)}, but no report of an earlier {kind}: they would be lost. Choose another "
            f"--output, or move them."
        )


def save_report(report: AnyReport, folder: str | Path) -> None:
    """Write ``eval_report.json`` to a folder, which is created if absent; an older report is replaced.

    Raises:
        SaveError: See [`check_report_folder`][]; or the file can't be written.
    """
    path = resolve_path(folder, SaveError)
    check_report_folder(path, report_kind(report))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{path} can't be created: {error.strerror or error}. Choose another --output.") from error
    report.save(path / REPORT_NAME)


def write_run(report: RunReport, folder: Path) -> None:
    """Write ``eval_report.json``, pictures and Markdown of a run; the files of an earlier run are replaced.

    Args:
        report: Report of the run.
        folder: Folder of the run.

    Raises:
        SaveError: A file can't be written.
    """
    pictures = draw_pictures(Folder(folder.name, None, report))
    save_report(report, folder)  # first: it shows which run the other files belong to
    text, *names = FILES_OF_RUNS[report.kind]
    for name in names:
        if name in pictures:
            write_file(folder / name, pictures[name][1])
        else:
            (folder / name).unlink(missing_ok=True)
    shown = picture_markdown([(title, name) for name, (title, _) in pictures.items()])
    write_file(folder / text, "\n".join([f"# {inert(report.title)}", "", *shown, *run_markdown(report)]))
