"""Rows of a long run: kept one by one, never of another setting."""

import errno
import os

import pytest

from hf_context_prune.errors import ConfigError, NumericsError, SaveError
from hf_context_prune.storage.results_log import ResultsLog, open_results_log

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
    ResultsLog(path, other)  # of a run that ended before its first row
    ResultsLog(path, SETTING).get_or_measure(["a"], lambda: {"b": 1})
    with pytest.raises(ConfigError, match="other values of extra, seed"):
        ResultsLog(path, other)
    assert ResultsLog(path, SETTING).rows


@pytest.mark.parametrize("text", ["hello\n", "[1]\n", '{"a": 1}\n', '{"setting": {}}\n{"b": 2}\n'])
def test_another_file_is_refused_and_left(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError):
        ResultsLog(path, {})
    assert path.read_text() == text


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
