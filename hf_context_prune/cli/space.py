"""``hf-context-prune space``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_context_prune.errors import ConfigError

from .output import out


def space(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Pruned folders that this tool wrote, Hub ids (owner/name, owner/name@revision), or one SPACE.yaml.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; an older one of ours is replaced.")],
    base: Annotated[
        str | None, typer.Option(help="The dense model of all of them. Default: what each one's plan says.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page. Default: Mini-GPTs.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the folder to this Space, owner/name; made if new.")
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new Space.")] = None,
) -> None:
    """Write a ready Gradio Space: dense and pruned model side by side.

    Local folders travel in it, for your own machine or container; for --push, every model must be on the Hub.
    """
    from hf_context_prune.publishing.space.folder import check_publishable, settings_for, write_space
    from hf_context_prune.publishing.space.settings import read_settings

    if Path(models[0]).suffix.lower() in (".yaml", ".yml"):
        given = [name for name, value in (("--base", base), ("--title", title)) if value is not None]
        if len(models) > 1 or given:
            raise ConfigError(f"{models[0]} says all of it: leave out {', '.join([*models[1:], *given])}.")
        settings = read_settings(models[0])
    else:
        settings = settings_for(models, base=base, title=title)
    if push is None and private is not None:
        raise ConfigError("--private and --public are about --push; give it, or leave them out.")
    if push is not None:
        check_publishable(settings)
    folder = write_space(settings, output)
    out(f"Wrote {folder} (try it: python {folder / 'app.py'})")
    if push is not None:
        from hf_context_prune.publishing.hub import push_folder

        done = push_folder(folder, push, repo_type="space", private=private)
        out(f"Pushed and verified: {done.url}" if done.changed else f"{done.repo_id} holds this folder already")
