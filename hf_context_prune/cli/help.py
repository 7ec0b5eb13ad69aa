"""Layout of ``--help``: names of options are never cut, and examples come last."""

from __future__ import annotations

from enum import Enum
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from hf_context_prune.utils.options import PANELS

_ORDER = ("Arguments", "Options", *PANELS, "Help")


class Command(TyperCommand):
    """A command whose help has two columns: names and text.

    The layout of typer has up to six columns, for short names, negations and types too. In 80 columns they cut long
    names and leave little room for the text.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - typer's own classes
        """Print the help."""
        console = Console(highlight=False)
        console.print(Padding(Text(self.get_usage(ctx), style="bold"), (1, 1)))
        for paragraph in (self.help or "").split("\n\n"):
            console.print(Padding(Text(" ".join(paragraph.split())), (0, 1, 1, 1)))
        panels: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            if not getattr(parameter, "hidden", False):
                panels.setdefault(_panel_of(parameter), []).append(parameter)
        for title, parameters in sorted(panels.items(), key=lambda item: _ORDER.index(item[0])):
            console.print(Panel(_rows(parameters), title=title, title_align="left", border_style="dim"))
        console.print(Text(self.epilog or ""), soft_wrap=True)  # examples can be copied


def _panel_of(parameter: Any) -> str:  # noqa: ANN401 - as above
    if parameter.name == "help":
        return "Help"
    usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
    return getattr(parameter, "rich_help_panel", None) or usual


def _rows(parameters: list[Any]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(no_wrap=True, style="bold cyan")
    table.add_column(ratio=1)
    for parameter in parameters:
        table.add_row(_names(parameter), Text.from_markup(_text(parameter)))
    return table


def _names(parameter: Any) -> str:  # noqa: ANN401 - as above
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    return "\n".join([", ".join(sorted(parameter.opts, key=len)), *parameter.secondary_opts])


def _text(parameter: Any) -> str:  # noqa: ANN401 - as above
    """Return the help text with the default, and whether the option is required."""
    parts = [parameter.help or ""]
    if parameter.required:
        parts.append("[red]Required.[/]")
    elif (default := _default(parameter)) is not None:
        parts.append(f"[dim]Default: {escape(default)}.[/]")
    return " ".join(parts)


def _default(parameter: Any) -> str | None:  # noqa: ANN401 - as above
    value = parameter.default
    # Versions of click have a marker of their own for "no default".
    if not isinstance(value, str | int | float | Enum) or getattr(parameter, "show_default", True) is False:
        return None
    if isinstance(value, bool):
        return (parameter.opts if value else parameter.secondary_opts)[0] if parameter.secondary_opts else None
    return str(value.value if isinstance(value, Enum) else value)
