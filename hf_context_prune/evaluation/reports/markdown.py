"""Markdown of values that others chose: text that stays text, code that stays in its block."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!~@$&^])")
_MOST = 2_000


class Trusted(str):
    """Markdown of our own making, with every foreign part of it inert already."""

    __slots__ = ()


def one_line(text: str) -> str:
    """A value in one line, without invisible characters, at most 2,000 characters long."""
    line = " ".join(text.split())
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= _MOST else f"{line[:_MOST]}..."


def inert(text: str) -> Trusted:
    """Text that Markdown shows as it is, in one line: no markup, HTML, link, mention, formula, list or heading."""
    line = _MARKUP.sub(r"\\\1", one_line(text))
    line = line.replace("://", r":\/\/")
    line = re.sub(r"(?i)\bwww\.", r"www\.", line)
    return Trusted(re.sub(r"^([-+=]+|\d+[.)])(?=\s|$)", lambda found: _escaped(found.group()), line))


def _escaped(marker: str) -> str:
    return f"{marker[:-1]}\\{marker[-1]}" if marker[0].isdigit() else f"\\{marker}"


def code(text: str) -> Trusted:
    """A value as code within a line."""
    line = one_line(text)
    ticks = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return Trusted(f"{ticks}{space}{line or ' '}{space}{ticks}".replace("|", r"\|"))


def block(language: str, text: str) -> Trusted:
    """Lines of code, fenced so that nothing in them ends the block."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return Trusted(f"{fence}{language}\n{text}\n{fence}")


def row(cells: Sequence[str]) -> str:
    """One line of a table; what is not trusted is made inert."""
    return f"| {' | '.join(cell if isinstance(cell, Trusted) else inert(cell) for cell in cells)} |"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Trusted:
    """A table, first column left, others right."""
    align = [Trusted("---"), *[Trusted("---:")] * (len(header) - 1)]
    return Trusted("\n".join(row(cells) for cells in (header, align, *rows)))
