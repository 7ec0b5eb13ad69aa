"""Reports from folders: Markdown that shows names as they are, and pictures."""

from __future__ import annotations

import builtins
import functools
import itertools
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hf_context_prune import PrunerConfig, prune
from hf_context_prune.errors import ConfigError, LoadError, SaveError
from hf_context_prune.evaluation.reports.files import check_report_folder, save_report
from hf_context_prune.evaluation.reports.plots import new_figure
from hf_context_prune.evaluation.reports.rendering import (
    SIDE_BY_SIDE,
    Folder,
    read_folder,
    read_folders,
    render,
    render_markdown,
    side_by_side,
)
from hf_context_prune.evaluation.reports.report import Environment
from hf_context_prune.evaluation.reports.rows import table_rows
from hf_context_prune.evaluation.reports.run_report import ReportTable, RunReport, load_report
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.saving import save_pruned
from tests.support.limits import within
from tests.support.runs import OPTIONS, QUICK
from tests.support.tiny import texts, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    paths = []
    for name, asked in (
        ("small", {"mlp_ratio": 0.5}),
        ("wide one", {"pruning_ratio": 0.2, "units": "neurons,kv_groups", "native_architecture": False}),
    ):
        config = PrunerConfig(**asked, **OPTIONS)
        result = prune(tiny_model("llama"), texts(), config, tokenizer=tiny_tokenizer(), eval_options=QUICK)
        paths.append(result.save_pretrained(place / name))
    return paths


def test_markdown_and_pictures(folders, tmp_path):
    pytest.importorskip("matplotlib")
    found = [read_folder(folder) for folder in folders]
    out = render(found, tmp_path / "out")
    names = {path.name for path in out.iterdir()} - {"manifest.json"}
    assert names == {"report.md", "loss-against-size.png", "widths-wide-one.png"}  # equal widths make no picture
    text = (out / "report.md").read_text(encoding="utf-8")
    for folder in found:
        assert folder.plan.sha256 in text
        for row in table_rows(folder.report):
            assert row[1] in text.replace("\\", "")
    for name in names - {"report.md"}:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text
    verify_folder(out)
    assert render(found, out) == out  # an older report is replaced
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(SaveError):
        render(found, tmp_path / "mine")


def test_a_report_replaces_reports_alone(folders, tmp_path):
    pytest.importorskip("matplotlib")
    found = [read_folder(folder) for folder in folders]
    with pytest.raises(SaveError, match=r"a model, not a rendered report.*would be lost"):
        render(found, folders[0])
    verify_folder(folders[0])
    names = ("a b", "a-b", "a-b-2", "a_b")
    alike = [Folder(name, found[1].plan, found[1].report) for name in names]
    out = render(alike, tmp_path / "alike")
    text = (out / "report.md").read_text(encoding="utf-8")
    pictures = ["widths-a-b.png", "widths-a-b-2.png", "widths-a-b-2-2.png", "widths-a_b.png"]
    assert {path.name for path in out.glob("widths-*")} == set(pictures)
    assert re.findall(r"\((widths.*?)\)", text) == pictures


def test_names_stay_names(folders):
    folder = read_folder(folders[0])
    hostile = "x\n# Heading | [link](http://a) <b> `code` ![i](u)"
    report = replace(folder.report, base_model=hostile, notes=(hostile,))
    text = render_markdown([Folder(hostile, folder.plan, report)], pictures={hostile: [(hostile, "widths.png")]})
    text = text.replace("![x", "").replace("](widths.png)", "")  # the picture's own
    assert "\n# Heading" not in text
    for part in ("<b>", "[link]", "![i]", "| [", "`code`"):
        assert part not in text.replace("\\" + part[0], "?")


def test_what_is_refused(folders, tmp_path):
    found = read_folder(folders[0])
    (tmp_path / "link").symlink_to(folders[0])
    assert [folder.name for folder in read_folders([folders[0], tmp_path / "link"])] == [found.name, "link"]
    with pytest.raises(ConfigError, match=r"named small, small; a report needs names that differ"):
        read_folders([folders[0], f"{folders[0]}/"])
    bare = save_pruned(tiny_model("llama"), tmp_path / "bare")
    with pytest.raises(LoadError, match=r"has no eval_report\.json"):
        read_folder(bare)
    with pytest.raises(LoadError, match=r"has no eval_report\.json and no manifest\.json"):
        read_folder(tmp_path)


RUN = RunReport(
    "bench",
    "a `base` |",
    "Speed",
    (ReportTable("T <b>", ("measure", "x | y"), (("a", "# 1"), ("b", "2")), "Read [this](http://a)."),),
    {"deep": [1, None, {"x": 0.5}]},
    Environment.current("float32"),
    ("A *note*.",),
)


def test_a_run_without_a_model_is_reported_too(folders, tmp_path):
    save_report(RUN, tmp_path / "speed")
    save_report(replace(RUN, title="Again"), tmp_path / "speed")  # an older one is replaced
    assert [path.name for path in (tmp_path / "speed").iterdir()] == ["eval_report.json"]
    found = [read_folder(tmp_path / "speed"), read_folder(folders[0])]
    assert (found[0].plan, found[0].report) == (None, replace(RUN, title="Again"))
    out = render(found, tmp_path / "out")
    assert {path.name for path in out.glob("*.png")} == {"loss-against-size.png"}
    text = (out / "report.md").read_text(encoding="utf-8")
    for part in ("[this]", "<b>", "*note*", "| # 1"):
        assert part not in text.replace("\\" + part[0], "?")
    assert text.index("## speed") < text.index("## small")
    for place in (folders[0], out):
        with pytest.raises(SaveError, match="holds a model or a rendered report"):
            check_report_folder(place, "bench")
    with pytest.raises(SaveError, match="bench, which would be lost"):
        save_report(found[1].report, tmp_path / "speed")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/eval_report.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SaveError, match="would be lost"):
        check_report_folder(tmp_path / "broken", "bench")
    (tmp_path / "speed/eval_report.json").write_text("{}")
    with pytest.raises(SaveError, match="would be lost"):
        save_report(RUN, tmp_path / "speed")
    assert (tmp_path / "speed/eval_report.json").read_text() == "{}"


def test_files_of_others_in_a_report_folder_are_not_replaced(tmp_path, subtests):
    (tmp_path / "elsewhere").write_text("mine")
    places = {
        "a link": lambda path: path.symlink_to(tmp_path / "elsewhere"),
        "a named pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "a file": lambda path: path.write_text("mine"),
    }
    for (what, make), name in itertools.product(places.items(), ("eval_report.json", "matrix.md")):
        folder = tmp_path / f"{what} {name}"
        folder.mkdir()
        make(folder / name)
        with subtests.test(what, name=name), within(), pytest.raises(SaveError, match="would be lost"):
            check_report_folder(folder, "matrix" if name == "matrix.md" else "bench")
        assert os.listdir(folder) == [name]
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_losses_on_different_texts_have_panels_of_their_own(folders, tmp_path, monkeypatch):
    drawn = {}

    def draw(panels, *_):
        drawn.update(panels)
        raise InterruptedError

    monkeypatch.setattr("hf_context_prune.evaluation.reports.rendering.plot_losses", draw)
    found = [read_folder(folder) for folder in folders]
    report = found[1].report
    other = replace(report, dataset=replace(report.dataset, fingerprint="f" * 64))
    with pytest.raises(InterruptedError):
        render([found[0], replace(found[1], report=other)], tmp_path / "out")
    loss = report.loss
    name, much = (
        report.dataset.name,
        f": {loss.base.num_documents} documents, {loss.base.num_bytes:,} bytes, windows of 32 tokens",
    )
    assert list(drawn) == [f"{name}{much}", f"{name} (ffffffff){much}"]
    base = f"base: {report.base_model}"
    assert [[point.label for point in points] for points in drawn.values()] == [[base, "small"], [base, "wide one"]]
    drawn.clear()
    less = replace(report, loss=replace(loss, pruned=replace(loss.pruned, num_documents=1, num_bytes=12)))
    with pytest.raises(InterruptedError):
        render([found[0], replace(found[1], report=less)], tmp_path / "out")
    assert list(drawn) == [f"{name}{much}", f"{name}: 1 documents, 12 bytes, windows of 32 tokens"]


DAMAGE = [
    ({"kind": "sweeep"}, "of kind 'sweeep'"),
    ({"schema_version": 2}, "schema_version 2"),
    ({"tables": [{"title": "T", "header": ["a"], "rows": [["1", "2"]], "caption": ""}]}, "other lengths"),
    ({"notes": [1]}, r"report\.notes\[0\]"),
    ({"more": 1}, "more is unknown"),
    ({"figures": functools.reduce(lambda inner, _: [inner], range(5000), 0)}, "nested too deeply"),
]


def test_damaged_reports_of_runs_are_refused(tmp_path, subtests):
    for change, said in DAMAGE:
        with subtests.test(change=change, said=said):
            with pytest.raises(LoadError, match=said):
                RunReport.from_dict(RUN.to_dict() | change)
            (tmp_path / "eval_report.json").write_text("[")
            with pytest.raises(LoadError, match="not a readable evaluation report"):
                load_report(tmp_path / "eval_report.json")


def test_figures_that_do_not_draw_are_told(tmp_path):
    save_report(replace(RUN, kind="matrix"), tmp_path / "broken")
    with pytest.raises(LoadError, match="The figures of broken can't be drawn"):
        render([read_folder(tmp_path / "broken")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_domains_are_no_formulas(tmp_path):
    names = [r"$\frac{$", "_b"]
    ratio = {"bits_per_byte_ratio": {"value": 1.1, "interval": None}}
    cells = [{"calibrated": a, "measured": b, "change": ratio} for a in names for b in names]
    figures = {"domains": names, "reference": names[0], "cells": cells, "mixes": {names[0]: [[0, 0.1, 0.2]]}}
    save_report(replace(RUN, kind="matrix", figures=figures), tmp_path / "odd")
    out = render([read_folder(tmp_path / "odd")], tmp_path / "out")
    assert {path.name for path in out.glob("*.png")} == {"matrix-odd.png", "mix-odd.png"}


NO_REPORTS = [
    ('{"loss": "\\ud800"}', "not a readable evaluation report"),
    ("[" * 100_000, "not a readable evaluation report"),
    ('{"kind": "bench"}', "schema_version None"),
]


def test_files_that_are_no_reports(tmp_path, subtests):
    for text, said in NO_REPORTS:
        with subtests.test(text=text, said=said):
            (tmp_path / "eval_report.json").write_text(text)
            with pytest.raises(LoadError, match=said):
                read_folder(tmp_path)


def test_several_models_stand_side_by_side(folders):
    found = [folder for folder in map(read_folder, folders) if folder.plan is not None]
    rows = side_by_side(found)
    assert [row[0] for row in rows] == [folder.name for folder in found]
    assert len(rows) > 1
    for row, folder in zip(rows, found, strict=True):
        change = folder.report.loss.comparison.bits_per_byte_ratio.value - 1
        assert f"{100 * change:+.1f} %" in row
        assert f"{folder.report.size.pruned_parameters:,}" in row
    assert f"| {' | '.join(SIDE_BY_SIDE)} |" in render_markdown(found)
    assert side_by_side(found[:1]) == []
    assert f"| {SIDE_BY_SIDE[0]} |" not in render_markdown(found[:1])


def test_when_it_was_measured_is_text_too(folders):
    folder = read_folder(folders[0])
    report = replace(folder.report, created="x <img src=x> [a](http://evil)\n# Big")
    text = render_markdown([replace(folder, report=report)])
    assert "<img" not in text.replace("\\<", "?")
    assert "\n# Big" not in text


def test_no_folder_for_the_fonts_of_matplotlib(monkeypatch):
    real = builtins.__import__

    def fails(name, *arguments, **options):
        if name == "matplotlib.backends.backend_agg":
            raise OSError("Matplotlib requires a directory; set MPLCONFIGDIR to a writable directory")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(SaveError, match=r"Pictures can't be drawn: .*MPLCONFIGDIR to a writable directory with free"):
        new_figure()
