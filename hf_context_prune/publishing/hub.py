"""Push a saved folder to a repository of the Hub: an allow-list, one commit, verified afterwards.

Only files that the manifest of the folder lists are sent, so files beside them (``training_args.bin``, optimizer state,
notes) never leave. A push that fails leaves the repository as it was: large files wait on the Hub outside any commit,
and the next push does not send them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError

from hf_context_prune.errors import ConfigError, ContextPruneError, LoadError, PublishError
from hf_context_prune.storage.hub_errors import explain_hub_error
from hf_context_prune.storage.manifest import EDITABLE, find_unlisted_files, hash_file, verify_folder
from hf_context_prune.utils.file_names import MANIFEST_NAME
from hf_context_prune.utils.files import expand_home
from hf_context_prune.utils.foreign_code import refuse_foreign_code
from hf_context_prune.utils.hub_ids import is_hub_id
from hf_context_prune.utils.links import resolve_inside
from hf_context_prune.utils.secret_scan import refuse_tokens
from hf_context_prune.utils.upload_check import NOTHING_UPLOADED, RepoType, is_allowed

from .push import Push


@dataclass(frozen=True)
class PushResult:
    """The result of a push.

    Attributes:
        repo_id: Full id of the repository, owner included.
        url: URL of the commit that holds the folder.
        sha: Id of that commit.
        changed: Whether a commit was made; False if the repository already held the folder.
        pull_request: URL of the pull request that was opened, else None. It is not merged.
        left_out: Files that the manifest does not list, which were not sent.
    """

    repo_id: str
    url: str
    sha: str
    changed: bool
    pull_request: str | None = None
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: RepoType = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    retry_hint: str | None = None,
) -> PushResult:
    """Upload a folder that this package saved, in one commit; do nothing if the repository already holds the folder.

    Files of an earlier push by this package, and older weights, are deleted in the same commit; other files stay. More
    than `push.MAX_FILES` files go to a pull request in several commits, the card last: the branch is complete before
    and after the merge.

    Args:
        folder: The folder, with its manifest.
        repo_id: ``owner/name``, or ``name`` for your own account. It is created if it does not exist.
        repo_type: ``"model"`` or ``"space"``.
        private: Visibility of a new repository; None is public, unless the owner has another default. An existing
            repository must have this visibility.
        revision: Branch to commit to, created if it does not exist, or ``refs/pr/N``; None is ``main``.
        create_pr: Open a pull request against ``main`` instead, which needs no write permission.
        commit_message: First line of the commit.
        token: Access token; None takes the token of your login.
        retry_hint: The call that repeats a failed push, for a folder that is temporary; None is the command that pushes
            this folder.

    Returns:
        The repository and the commit that holds the folder: `result.url`, `result.sha`, and whether a commit was made
        (`result.changed`).

    Raises:
        LoadError: The folder was not saved by this package, or is damaged.
        PublishError: A file may not be uploaded, the Hub refused, or the connection broke; the message has the remedy.
        ConfigError: An argument is not allowed.

    Example:
        ```python
        from hf_context_prune import push_folder

        print(push_folder("mini-gpt", "me/mini-gpt", private=True).url)
        ```
    """
    path = expand_home(folder, LoadError)
    if repo_type not in ("model", "space"):
        raise ConfigError(f"repo_type is {repo_type!r}; it must be 'model' or 'space'.")
    if not is_hub_id(repo_id, with_owner=False):
        raise ConfigError(f"{repo_id!r:.120} is not the id of a repository; it must be owner/name, or name alone.")
    if create_pr and revision not in (None, "main"):
        raise ConfigError(f"create_pr opens a pull request against main; leave out revision={revision!r}.")
    files, left_out = files_to_push(path, repo_type)
    refuse_tokens(path, sorted(files), token)
    message = commit_message or f"Upload {'Space' if repo_type == 'space' else 'pruned model'} with hf-context-prune"
    options = ["--repo-type", repo_type] if repo_type != "model" else []
    options += [] if private is None else ["--private" if private else "--public"]
    options += ["--commit-message", commit_message] if commit_message else []
    where = ["--create-pr"] if create_pr else [] if revision is None else ["--revision", revision]
    push = Push(path, repo_id, repo_type, files, token, options, where, retry_hint)
    with _explain_failures(push):
        done = push.run(private, revision, create_pr, message)
    return PushResult(push.repo_id, done.url, done.sha, done.changed, done.pull_request, left_out)


def files_to_push(folder: Path, repo_type: RepoType) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the files of a folder that are sent, with their sha256, and the files beside them that are not.

    Raises:
        LoadError: The folder was not saved by this package, or is damaged.
        PublishError: Its manifest lists a file that may not be sent, a listed file leads out of the folder, or a model
            in it names code of others.
    """
    manifest = verify_folder(folder)
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    refused = [name for name in files if not is_allowed(name, repo_type)]
    if refused:
        raise PublishError(
            f"{folder} holds {', '.join(sorted(refused)[:5])}, which may not go to a {repo_type} repository: only "
            f"config, weights (safetensors, GGUF, ONNX), tokenizer, modeling files, plan, reports and card of a model, "
            f"and the text, pictures and wheel of a Space. Nothing was uploaded."
        )
    for name in (*files, MANIFEST_NAME):
        resolve_inside(folder, name, PublishError, remedy=NOTHING_UPLOADED)
    for place in sorted({".", *(str(Path(name).parent) for name in files)}):  # a Space may hold models
        refuse_foreign_code(folder / place, PublishError, saved_here=repo_type == "model" and place == ".")
    for name in (MANIFEST_NAME, *(name for name in EDITABLE if name in files)):
        found = hash_file(folder / name)
        if (folder / name).is_symlink() and found != files.get(name, found):  # no edit, but any file of this machine
            raise PublishError(
                f"{name} in {folder} is a link to another file than the one that was saved. Nothing was uploaded. Put "
                f"the text itself there, or save the folder again."
            )
        files[name] = found
    return files, tuple(find_unlisted_files(folder, manifest))


@contextmanager
def _explain_failures(push: Push) -> Iterator[None]:
    """Turn failures of the Hub's client into an error on the state of the repository, with the remedy."""
    try:
        yield
    except ContextPruneError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise PublishError(
            f"{push.subject} was not pushed to {push.repo_id}: {_reason_of(error, push.repo_id)}. {push.state()} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:500]})"
        ) from error


def _reason_of(error: BaseException, repo_id: str) -> str:
    return explain_hub_error(
        error,
        {
            "400": "the Hub found the card or a file wrong, as its message below says",
            "401": "you are not logged in, or the token is not valid; run `hf auth login`, or pass token=",
            "403": f"the token may not write there; use a token with write permission for {repo_id}, or open a pull "
            f"request (create_pr=True, --create-pr)",
            "404": "there is no such repository or branch, or your token may not see it",
            "409": "the Hub is busy with another change of the repository, or the name is taken by something else",
            "412": "someone else committed to it meanwhile, and this push might undo that; look at their commit first",
        },
    )
