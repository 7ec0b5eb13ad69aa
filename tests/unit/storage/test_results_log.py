"""Rows of a long run: kept one by one, never of another setting."""

import errno
import os

import pytest

from hf_context_prune.errors import ConfigError, NumericsError, SaveError
from hf_context_prune.storage.results_log import ResultsLog, open_results_log
from tests.support.limits import within

SETTING = {"seed": 0, "text": ["a", None]}


def counted(value):
    calls = []
    return calls, lambda: calls.append(1) or {"value": value}


def test_a_finished_row_is_not_measured_again(tmp_path):
    calls, measure = counted(0.1)
    path = tmp_path / "deep" / "rows.jsonl"
    first = ResultsLog(path, SETTING).get_or_measure(["a", None, 0.1], measure)
    again = ResultsLog(path, dict(reversed(SETTING.items()))).get_or_measure(["a", None, 0.1], measure)
    assert again == first == {"key": ["a", None, 0.1], "value": 0.1}
    assert len(calls) == 1


def test_a_line_that_was_cut_short_is_measured_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ResultsLog(path, SETTING)
    rows.get_or_measure([1], lambda: {"value": 1})
    rows.get_or_measure([2], lambda: {"value": 2})
    path.write_text(path.read_text()[:-5])
    calls, measure = counted(3)
    rows = ResultsLog(path, SETTING)
    assert rows.get_or_measure([1], measure)["value"] == 1
    assert rows.get_or_measure([2], measure)["value"] == 3
    assert len(calls) == 1
    assert ResultsLog(path, SETTING).get_or_measure([2], measure)["value"] == 3


def test_a_failure_leaves_what_was_finished(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ResultsLog(path, SETTING)
    rows.get_or_measure([1], lambda: {"value": 1})
    with pytest.raises(ZeroDivisionError):
        rows.get_or_measure([2], lambda: {"value": 1 / 0})
    with pytest.raises(NumericsError, match=r"row \[3\]"):
        rows.get_or_measure([3], lambda: {"value": float("nan")})
    assert list(ResultsLog(path, SETTING).rows) == ["[1]"]


def test_a_row_that_does_not_fit_leaves_no_half_a_line(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows = ResultsLog(path, SETTING)
    rows.get_or_measure(["\u00e4"], lambda: {"value": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SaveError, match="No space left"):
            rows.get_or_measure([2], lambda: {"value": 2})
    assert rows.get_or_measure([3], lambda: {"value": 3})["value"] == 3  # the same run may go on
    assert list(ResultsLog(path, SETTING).rows) == ['["\\u00e4"]', "[3]"]


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    (tmp_path / "link.jsonl").symlink_to(path)
    with open_results_log(path, SETTING) as rows:
        rows.get_or_measure([1], lambda: {"value": 1})
        path.open("a").write('{"key": [2], "va')  # as another run in the middle of a line would see it
        with (
            pytest.raises(SaveError, match="Another run is saving"),
            open_results_log(tmp_path / "link.jsonl", SETTING),
        ):
            pytest.fail("entered beside another run")
        assert path.read_text().endswith('"va')  # not taken for what a kill cut short
    with open_results_log(path, SETTING) as rows:
        assert list(rows.rows) == ["[1]"]


def test_rows_of_another_setting_are_refused_by_name(tmp_path):
    path, other = tmp_path / "rows.jsonl", {**SETTING, "seed": 1, "extra": 2}
    ResultsLog(path, {**SETTING, "seed": 3})  # of a run that ended before its first row
    ResultsLog(path, SETTING).get_or_measure(["a"], lambda: {"b": 1})
    with pytest.raises(ConfigError, match="other values of extra, seed"):
        ResultsLog(path, other)
    assert ResultsLog(path, SETTING).rows


FOREIGN = {
    "notes without an end": b"my own notes without newline",
    "notes": b"hello\n",
    "JSON lines": b'{"a":1}\n{"b":2}',
    "a list": b"[1]\n",
    "no rows": b'{"setting": {}}\n{"b": 2}\n',
    "a setting of another program": b'{"setting": "dark"}',
    "other fields": b'{"setting": {"theme": "dark"}}\n',
    "other fields, without an end": b'{"setting": {"theme": "dark"}}',
    "something beside the setting": b'{"setting": {}, "theme": "dark"}\n',
    "a setting that is indented": b'{"setting": {\n  "theme": "dark"}}\n',
    "notes in the last line": b'{"setting": {"seed": 0, "text": ["a", null]}}\n{"key": [1], "value": 1}\nmy notes',
    "not text": b'{"setting": \xff',
    "no bytes of text": b"\x00\xff" * 30,
}


def test_another_file_is_refused_and_left_byte_for_byte(tmp_path, subtests):
    path = tmp_path / "rows.jsonl"
    for what, content in FOREIGN.items():
        with subtests.test(what):
            path.write_bytes(content)
            if what == "not text":  # begun as a first line, and no JSON: as a kill leaves it
                assert not ResultsLog(path, SETTING).rows
                continue
            with pytest.raises(ConfigError):
                ResultsLog(path, SETTING)
            assert path.read_bytes() == content


def test_a_first_line_that_was_cut_short_is_written_again(tmp_path, subtests):
    path = tmp_path / "rows.jsonl"
    ResultsLog(path, SETTING)
    line = path.read_bytes()
    for size in (0, len(b'{"setting"'), len(line) - 1):
        with subtests.test(size=size):
            path.write_bytes(line[:size])
            ResultsLog(path, SETTING)
            assert path.read_bytes() == line


def test_a_link_or_a_special_file_in_its_place_is_not_opened(tmp_path, subtests):
    path, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    ResultsLog(other, SETTING)
    before = other.read_bytes()
    places = {
        "a link": lambda: path.symlink_to(other),
        "a link, not": lambda: path.symlink_to(tmp_path / "absent"),
        "a named pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a link, ": lambda: path.symlink_to("/dev/zero"),
    }
    for kind, make in places.items():
        make()
        with subtests.test(kind), within(), pytest.raises(SaveError, match=f"it is {kind}"):
            ResultsLog(path, {**SETTING, "seed": 5})
        path.rmdir() if kind == "a folder" else path.unlink()
    assert other.read_bytes() == before
    assert os.listdir(tmp_path) == ["other.jsonl"]


def test_a_damaged_row_is_named_and_can_be_removed(tmp_path):
    path = tmp_path / "rows.jsonl"
    for key in (1, 2):
        ResultsLog(path, SETTING).get_or_measure([key], lambda: {"value": 1})
    setting, _, second = path.read_text().splitlines()
    path.write_text(f"{setting}\n{{garbage\n{second}\n")
    with pytest.raises(ConfigError, match=r"Line 2 of .*rows\.jsonl is damaged .*Remove that line"):
        ResultsLog(path, SETTING)
    path.write_text(f"{setting}\n{second}\n")
    assert list(ResultsLog(path, SETTING).rows) == ["[2]"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError):
        ResultsLog(tmp_path / "file" / "rows.jsonl", SETTING)
