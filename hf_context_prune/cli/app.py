"""The command line: data on stdout, progress and messages on stderr, exit code 0, 1 (failed) or 2 (wrong usage)."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any

import typer
import wrapt
from rich.markup import escape

from hf_context_prune.errors import ConfigError, ContextPruneError
from hf_context_prune.utils.compat import silence_import_warnings
from hf_context_prune.utils.distributed import is_main_process

from .bench import bench
from .chat import chat
from .check import check
from .demo import demo
from .env import env
from .evaluate import evaluate
from .examples import examples_of
from .experiments import cross_domain, paper_grid
from .export import export
from .help import Command
from .inspect import inspect
from .output import errors, out, show_error
from .prune import prune
from .publish import card, push
from .recover import recover
from .report import report
from .serve import serve
from .space import space

app = typer.Typer(
    name="hf-context-prune",
    help="Make a language model physically smaller for one domain. Begin with `hf-context-prune demo`.",
    epilog="Help on a command, with examples: hf-context-prune prune -h",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_INTERRUPTED = 130
_SHORT_SECONDS = 2


def _version(value: bool) -> None:
    if value:
        from hf_context_prune.utils.version import __version__

        out(f"hf-context-prune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


_GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "Begin here": (demo, prune, chat),
    "Look and measure": (inspect, evaluate, bench, report, check),
    "Improve": (recover,),
    "Use and share": (export, serve, space, card, push),
    "Experiments": (cross_domain, paper_grid),
    "Help": (env,),
}
"""The commands by the panels of ``--help``."""
_FORWARDS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of a command that hands options to another program."""
for _group, _commands in _GROUPS.items():
    for _command in _commands:
        _name = _command.__name__.replace("_", "-")
        app.command(
            _name,
            cls=Command,
            epilog=examples_of(_name),
            rich_help_panel=_group,
            context_settings=_FORWARDS if _command is serve else None,
        )(_command)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if category.__module__.startswith("hf_context_prune"):
        errors.print(f"[yellow]Warning:[/] {escape(str(message))}", soft_wrap=True)


class _ShowMessage(logging.Handler):
    """Shows what the package logs, beside the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        colour = "[yellow]Warning:[/] " if record.levelno >= logging.WARNING else ""
        errors.print(f"{colour}{escape(record.getMessage())}", soft_wrap=True)


def _calm_progress_bars(transformers_logging: ModuleType) -> None:
    """Show bars of transformers only where they last, and remove them when they are done."""
    transformers_logging.set_tqdm_hook(
        lambda bar, args, options: bar(*args, **{**options, "delay": _SHORT_SECONDS, "leave": False})
    )


def _guarded(run: Callable[[], Any]) -> int:
    try:
        run()
    except ContextPruneError as error:
        show_error(str(error))
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        show_error(f"The output can't be written: {error.strerror}.")
        return 1
    except SystemExit as exit_:  # typer ends with it, and turns Ctrl-C into 130
        if exit_.code != _INTERRUPTED:
            raise
        errors.print(
            "Interrupted; nothing was put in place. The same command resumes after its last finished part, if it keeps "
            "parts, and starts again otherwise.",
            soft_wrap=True,
        )
        return 1
    return 0


def terminate(*_: object) -> None:
    """End a run on SIGTERM as on Ctrl-C, so that it removes its unfinished files; a second signal changes nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run() -> None:
    if not is_main_process():  # every process does the same; it is shown once
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        sys.stdout, errors.quiet = open(os.devnull, "w"), True  # noqa: SIM115 - open until the process ends
    app()


def main() -> None:
    """Run the ``hf-context-prune`` command."""
    signal.signal(signal.SIGTERM, terminate)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    wrapt.register_post_import_hook(_calm_progress_bars, "transformers.utils.logging")
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    silence_import_warnings()
    package, handler = logging.getLogger("hf_context_prune"), _ShowMessage()
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        sys.exit(_guarded(_run))
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


if __name__ == "__main__":
    main()
