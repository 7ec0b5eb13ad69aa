"""Markdown of foreign values: text stays text, and code stays in its block."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!~@$&^])")
_MOST = 2_000


class Trusted(str):
    """Markdown that this package wrote, in which every foreign part is inert already."""

    __slots__ = ()


def one_line(text: str) -> str:
    """Return a value in one line, without invisible characters, cut to 2,000 characters."""
    line = " ".join(text.split())
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= _MOST else f"{line[:_MOST]}..."


def inert(text: str) -> Trusted:
    """Escape text so that Markdown shows it as it is: no markup, HTML, link, mention, formula, list or heading."""
    line = _MARKUP.sub(r"\\\1", one_line(text))
    line = line.replace("://", r":\/\/")
    line = re.sub(r"(?i)\bwww\.", r"www\.", line)
    return Trusted(re.sub(r"^([-+=]+|\d+[.)])(?=\s|$)", lambda found: _escaped(found.group()), line))


def _escaped(marker: str) -> str:
    return f"{marker[:-1]}\\{marker[-1]}" if marker[0].isdigit() else f"\\{marker}"


def code(text: str) -> Trusted:
    """Return a value as code within a line."""
    line = one_line(text)
    ticks = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return Trusted(f"{ticks}{space}{line or ' '}{space}{ticks}".replace("|", r"\|"))


def block(language: str, text: str) -> Trusted:
    """Return lines of code, fenced so that nothing in them ends the block."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return Trusted(f"{fence}{language}\n{text}\n{fence}")


def row(cells: Sequence[str]) -> str:
    """Return one row of a table; cells that are not [`Trusted`][] are escaped."""
    return f"| {' | '.join(cell if isinstance(cell, Trusted) else inert(cell) for cell in cells)} |"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Trusted:
    """Return a table: the first column aligned left, the others right."""
    align = [Trusted("---"), *[Trusted("---:")] * (len(header) - 1)]
    return Trusted("\n".join(row(cells) for cells in (header, align, *rows)))
