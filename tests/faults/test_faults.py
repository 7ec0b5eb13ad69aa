"""A write fails, or the process is killed at one: at any call that writes, of any command.

A failing write is a full disk, a full quota, a file-size limit or a broken block. The command then ends with a typed
error (exit code 1, no traceback) that says the reason. Its target is absent or whole, an older one is as it was byte
for byte, and nothing else is left in the output's parent, in $TMPDIR or in the cache, but locks and what the next run
resumes from. `checks.py` lists writes that may fail without failing a command.

After a kill the target is absent or whole, and an older one as it was or replaced by a whole one. The next run of the
same command succeeds, whatever the kill left, removes that, and gives the same bits.

Samples run every day, and every call with every error each night.
"""

import random

import pytest

from tests.faults.checks import ERRNOS, distinct_points, kill, strike
from tests.faults.commands import COMMANDS

SLOW = {"export-onnx"}
"""Ten seconds a run: not every day, and every night each call with one of the errors."""
NOT_DAILY = {*SLOW, "export-torchao", "demo"}
"""Their calls are those of quanto and of prune."""
DAILY_KILLS, NIGHTLY_KILLS = 10, 3
"""Kills of a day, one a command; and of a night, by command."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in NOT_DAILY])
def test_a_sample_of_writes_fails(runner, name):
    draw, problems, older = random.Random(name), [], list(COMMANDS).index(name) % 2 == 1
    points = distinct_points(runner.calls(name, older=older), draw)
    for number in draw.sample(points, 1 if older else 2):
        problems += strike(runner, name, number, draw.choice(ERRNOS), older=older)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_a_sample_of_kills(runner):
    draw, problems = random.Random(33), []
    names = draw.sample([name for name in COMMANDS if name not in NOT_DAILY], DAILY_KILLS)
    for place, name in enumerate(names):
        number = draw.choice(distinct_points(runner.calls(name), draw))
        problems += kill(runner, name, number, older=place % 2 == 1)
    print(f"{len(names)} kills: {', '.join(names)}")
    assert not problems, "\n".join(problems)


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMMANDS)
def test_every_write_fails(runner, name):
    """Of the four errors, two strike where there is no older result, and two over an older one, in turns."""
    draw, problems, count = random.Random(0), [], 0
    for older in (False, True):
        for number in distinct_points(runner.calls(name, older=older), draw):
            for place, error in enumerate(ERRNOS):
                turn = (place + number) % len(ERRNOS)
                if turn % 2 == older and (name not in SLOW or turn < 2):
                    problems += strike(runner, name, number, error, older=older)
                    count += 1
    print(f"{name}: {count} failed writes")
    assert not problems, "\n".join(problems)


@pytest.mark.nightly
def test_kills_of_every_command(runner):
    draw, problems, count = random.Random(34), [], 0
    for name in COMMANDS:
        for place in range(NIGHTLY_KILLS):
            older = place % 2 == 1
            number = draw.choice(distinct_points(runner.calls(name, older=older), draw))
            problems += kill(runner, name, number, older=older)
            count += 1
    print(f"{count} kills")
    assert count >= 40
    assert not problems, "\n".join(problems)
