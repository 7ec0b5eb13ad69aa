"""Reports from folders: Markdown that shows names as they are, and pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_context_prune import PrunerConfig, prune
from hf_context_prune.errors import ConfigError, LoadError, SaveError
from hf_context_prune.rendering import Folder, markdown, read_folder, render
from hf_context_prune.saving import save_pruned, verify_folder
from tests.test_pipeline import OPTIONS, QUICK, texts
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    paths = []
    for name, ratio in (("small", 0.5), ("wide one", 0.25)):
        config = PrunerConfig(mlp_ratio=ratio, **OPTIONS)
        result = prune(tiny_model("llama"), texts(), config, tokenizer=tiny_tokenizer(), evaluation=QUICK)
        paths.append(result.save_pretrained(place / name))
    return paths


def test_markdown_and_pictures(folders, tmp_path):
    pytest.importorskip("matplotlib")
    found = [read_folder(folder) for folder in folders]
    out = render(found, tmp_path / "out")
    names = {path.name for path in out.iterdir()} - {"manifest.json"}
    assert names == {"report.md", "loss-against-size.png", "widths-small.png", "widths-wide-one.png"}
    text = (out / "report.md").read_text(encoding="utf-8")
    for folder in found:
        assert folder.plan.sha256 in text
        for row in folder.report.table_rows():
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
    with pytest.raises(SaveError, match=r"as something else \(it has no report\.md\), which would be lost"):
        render(found, folders[0])
    verify_folder(folders[0])
    twins = [Folder("a b", found[0].plan, found[0].report), Folder("a-b", found[1].plan, found[1].report)]
    out = render(twins, tmp_path / "twins")
    assert {path.name for path in out.glob("widths-*")} == {"widths-a-b-1.png", "widths-a-b-2.png"}
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "(widths-a-b-1.png)" in text
    assert "(widths-a-b-2.png)" in text


def test_names_stay_names(folders):
    folder = read_folder(folders[0])
    hostile = "x\n# Heading | [link](http://a) <b> `code` ![i](u)"
    report = replace(folder.report, base_model=hostile, notes=(hostile,))
    text = markdown([Folder(hostile, folder.plan, report)], pictures=False)
    assert "\n# Heading" not in text
    for part in ("<b>", "[link]", "![i]", "| [", "`code`"):
        assert part not in text.replace("\\" + part[0], "?")


def test_what_is_refused(folders, tmp_path):
    found = read_folder(folders[0])
    with pytest.raises(ConfigError, match="needs names that differ"):
        render([found, found], tmp_path / "out")
    bare = save_pruned(tiny_model("llama"), tmp_path / "bare")
    with pytest.raises(LoadError, match=r"has no eval_report\.json"):
        read_folder(bare)
    with pytest.raises(LoadError):
        read_folder(tmp_path)
