"""``--help`` at 80 columns: no name is cut, every command ends with examples, and each example parses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
import typer

from hf_context_prune.cli.app import app

COMMANDS = typer.main.get_command(app).commands
FULL = re.compile(r"(?<![\w-])--?[a-z][\w-]*")


@pytest.fixture
def place(tmp_path):
    return tmp_path


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")


@pytest.mark.parametrize("name", COMMANDS)
def test_no_name_is_cut(name, run, narrow):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    shown = set(FULL.findall(out))
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option":
            assert {*parameter.opts, *parameter.secondary_opts} <= shown
        else:
            assert f"│ {parameter.metavar} " in out
    assert run(name, "-h") == (0, out, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name):
    """Of names and options that exist; two or three of each command, and all of the command itself."""
    lines = COMMANDS[name].epilog.replace("\\\n", " ").splitlines()
    assert lines[0] == "Examples:"
    found = [shlex.split(line.partition(" < ")[0]) for line in lines[1:]]
    assert 2 <= len(found) <= 3
    for program, command, *arguments in found:
        assert (program, command) == ("hf-context-prune", name)
        COMMANDS[name].make_context(name, arguments)


def test_the_list_of_commands_says_where_to_begin(run, narrow):
    code, out, _ = run("-h")
    assert code == 0
    assert "…" not in out
    panels = re.findall(r"─ ([A-Z][\w ]+) ─", out)
    assert panels == ["Options", "Begin here", "Look and measure", "Improve", "Use and share", "Experiments", "Help"]
    begin = out.index("Begin here")
    assert begin < out.index("│ demo ") < out.index("│ prune ") < out.index("│ chat ") < out.index("Look and measure")
    assert "--install-completion" in out
    assert "--show-completion" in out


def test_a_command_without_arguments_says_what_is_missing(run):
    code, out, err = run("chat")
    assert (code, out) == (2, "")
    assert "MODEL" in err


def run_alone(*arguments, **environment):
    """What the program prints in a process of its own, which must not load heavy packages."""
    program = (
        f"import sys; sys.argv = {['hf-context-prune', *arguments]!r}\n"
        "from hf_context_prune.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as exit_: assert not exit_.code, exit_.code\n"
        "assert not {'torch', 'transformers', 'datasets', 'gradio'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_is_there_at_once():
    assert "--pruning-ratio" in run_alone("prune", "--help")


def test_completion_names_commands_and_options():
    def complete(words):
        request = {"_HF_CONTEXT_PRUNE_COMPLETE": "complete_bash", "COMP_WORDS": words}
        return run_alone(**request, COMP_CWORD=str(len(words.split()) - 1)).split()

    assert complete("hf-context-prune ch") == ["chat", "check"]
    assert complete("hf-context-prune chat --temp") == ["--temperature"]
