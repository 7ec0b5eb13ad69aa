"""A command is killed at a call that writes: its target is absent or whole, and the next run leaves nothing behind.

The next run of the same command succeeds, whatever the kill left, removes that, and gives the same bits.
"""

import random

import pytest

from tests.faults.checks import distinct_points, kill
from tests.faults.commands import COMMANDS

DAILY, NIGHTLY = 10, 3
"""Kills of every day, one a command; and kills a command of every night."""


@pytest.mark.slow
def test_ten_kills(runner):
    draw, problems = random.Random(33), []
    names = draw.sample([name for name in COMMANDS if name != "export-onnx"], DAILY)
    for place, name in enumerate(names):
        number = draw.choice(distinct_points(runner.calls(name), draw))
        problems += kill(runner, name, number, older=place % 2 == 1)
    print(f"{len(names)} kills: {', '.join(names)}")
    assert not problems, "\n".join(problems)


@pytest.mark.nightly
def test_kills_of_every_command(runner):
    draw, problems, count = random.Random(34), [], 0
    for name in COMMANDS:
        for place in range(NIGHTLY):
            older = place % 2 == 1
            number = draw.choice(distinct_points(runner.calls(name, older=older), draw))
            problems += kill(runner, name, number, older=older)
            count += 1
    print(f"{count} kills")
    assert count >= 40
    assert not problems, "\n".join(problems)
