"""``hf-context-prune card`` and ``hf-context-prune push``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .options import FolderArgument, FormatOption, OutputFormat, shared
from .output import out, out_json


class RepoType(StrEnum):
    """Kind of repository."""

    model = "model"
    space = "space"


def card(
    folder: FolderArgument,
    name: Annotated[
        str | None, shared("How the card names the model, such as owner/name. By default the folder's name.")
    ] = None,
    overwrite: Annotated[bool, shared("Replace a card that was edited by hand.", None, "--overwrite")] = False,
) -> None:
    """Write the model card (README.md, picture) of a pruned folder again, from the folder alone."""
    from hf_context_prune import make_card

    out(f"Wrote {make_card(folder, name=name, overwrite=overwrite)}")


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that this tool wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; made if it does not exist.")],
    repo_type: Annotated[RepoType, shared("Kind of repository: model or space.")] = RepoType.model,
    private: Annotated[
        bool | None,
        shared("Visibility of a new repository; an existing one must have it already.", None, "--private/--public"),
    ] = None,
    revision: Annotated[str | None, shared("Branch, made if it does not exist, or refs/pr/N.")] = None,
    create_pr: Annotated[bool, shared("Open a pull request against main instead.", None, "--create-pr")] = False,
    commit_message: Annotated[str | None, shared("First line of the commit.")] = None,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Upload a folder to the Hub in one commit, card included; do nothing if the Hub holds it already.

    Log in first with `hf auth login`, or set HF_TOKEN. Files that this tool did not save are left out, and text that
    holds an access token is refused.
    """
    from hf_context_prune import push_folder

    done = push_folder(
        folder,
        repo_id,
        repo_type=repo_type.value,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )
    if format is OutputFormat.json:
        out_json(done.to_dict())
    elif format is OutputFormat.quiet:
        out(done.url)
    else:
        if done.left_out:
            out(f"Left out, as this tool did not save them: {', '.join(done.left_out)}")
        if not done.changed:
            out(f"{done.repo_id} holds this folder already: no commit was made ({done.url})")
        else:
            out(f"Pushed and verified: {done.url}")
        if done.pull_request:
            out(f"Pull request, to be merged: {done.pull_request}")
