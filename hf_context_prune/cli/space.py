"""``hf-context-prune space``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_context_prune.errors import ConfigError
from hf_context_prune.utils.locks import reserves

from .options import Output, shared
from .output import out

if TYPE_CHECKING:
    from hf_context_prune.publishing.space.settings import Settings


@reserves("output")
def space(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Pruned folders that this tool wrote, Hub ids (owner/name, owner/name@revision), or one SPACE.yaml. "
            "Several sizes of one domain and base share a slider.",
        ),
    ],
    output: Output,
    base: Annotated[
        str | None,
        shared("The base of all models: folder, .gguf file, Hub id, or demo. By default the one that each plan names."),
    ] = None,
    title: Annotated[str | None, shared("Heading of the page. By default it names the domain.")] = None,
    examples: Annotated[
        bool,
        shared(
            "Run all models once on this machine, so that the page opens with a finished example.",
            None,
            "--examples/--no-examples",
        ),
    ] = True,
    push: Annotated[
        str | None,
        shared(
            "Upload the folder to this Space, owner/name; made if it does not exist.", None, "--push", metavar="REPO"
        ),
    ] = None,
    private: Annotated[bool | None, shared("Visibility of a new Space.", None, "--private/--public")] = None,
) -> None:
    """Write a Gradio Space that is ready to run: base and pruned model side by side.

    Local folders are copied into it, for your own machine or container; for --push, every model must be on the Hub.
    """
    from hf_context_prune import check_space_publishable, push_folder, write_space

    if push is None and private is not None:
        raise ConfigError("--private and --public are about --push; give it, or leave them out.")
    settings = _settings(models, base, title)
    if push is not None:
        check_space_publishable(settings)
    folder = write_space(settings, output, examples=examples)
    out(f"Wrote {folder} (try it: python {folder / 'app.py'})")
    if push is not None:
        done = push_folder(folder, push, repo_type="space", private=private)
        out(f"Pushed and verified: {done.url}" if done.changed else f"{done.repo_id} holds this folder already")


def _settings(models: list[str], base: str | None, title: str | None) -> Settings:
    from hf_context_prune import make_space_settings, read_space_settings

    if Path(models[0]).suffix.lower() not in (".yaml", ".yml"):
        return make_space_settings(models, base=base, title=title)
    given = [name for name, value in (("--base", base), ("--title", title)) if value is not None]
    if len(models) > 1 or given:
        raise ConfigError(f"{models[0]} holds all settings of the Space: leave out {', '.join([*models[1:], *given])}.")
    return read_space_settings(models[0])
