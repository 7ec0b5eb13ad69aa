"""`chat` as it is used: from a pipe and in a terminal."""

from __future__ import annotations

import io
import json
import sys

import pytest

from hf_context_prune.cli import chat as command
from hf_context_prune.pipelines import chat
from tests.support.tiny import tiny_model, tiny_tokenizer

SHORT = ("--max-new-tokens", 6)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    for seed, name in enumerate(("base", "mini")):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_every_line_of_a_pipe_is_answered_by_itself(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the house\n\nthe garden\nthe house\n"))
    code, out, err = run("chat", "@mini", *SHORT, "--format", "json")
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["the house", "the garden", "the house"]
    assert answers[0] == answers[2]
    assert answers[0]["answer"]


def test_a_pipe_with_a_base(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the house\n"))
    code, out, err = run("chat", "@mini", "--base", "@base", *SHORT)
    assert code == 0, err
    assert out.startswith("base: base:")
    assert "\nmini: " in out
    monkeypatch.setattr(sys, "stdin", io.StringIO("the house\n"))
    code, out, _ = run("chat", "@mini", "--base", "@base", *SHORT, "--format", "json")
    assert set(json.loads(out)) == {"prompt", "base_answer", "answer"}


def test_a_terminal_streams_and_ends_with_ctrl_d(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("the house\n/new\n\nthe house\n"))
    code, out, err = run("chat", "@mini", *SHORT, "--temperature", 0)
    assert code == 0, err
    assert "mini continues your text" in out
    first, second = [part for part in out.split("> ") if part.strip()][1:3]
    assert first.strip() == second.strip() != ""


def test_two_columns_in_a_terminal(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("the house\n"))
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("chat", "@mini", "--base", "@base", *SHORT)
    assert code == 0, err
    header = next(line for line in out.splitlines() if "base: base" in line)
    assert header.index("base: base") < header.index("mini")


def test_ctrl_c_ends_it_cleanly(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Terminal("the house\n"))
    monkeypatch.setattr(command, "_show_answer", interrupt)
    code, _, err = run("chat", "@mini", *SHORT)
    assert (code, err) == (0, "")


def test_a_text_that_is_too_long_does_not_end_the_chat(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("word " * 400 + "\nthe house\n"))
    code, out, _ = run("chat", "@mini", *SHORT)
    assert code == 0
    assert "Write a shorter text" in out


def test_wrong_options_are_told_before_a_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(chat, "load_model", lambda *_, **__: pytest.fail("loaded"))
    code, _, err = run("chat", "@mini", "--temperature", 9)
    assert code == 2
    assert "temperature is 9.0" in err


def test_a_model_that_is_not_there(run):
    code, out, err = run("chat", "@absent")
    assert (code, out) == (1, "")
    assert "absent does not exist" in err
