"""A saved folder -> a repository of the Hub: an allow-list, one commit, verified afterwards.

Only files that the folder's manifest lists are sent, so what lies beside them (``training_args.bin``, optimizer state,
notes) never leaves. A push that breaks off leaves the repository as it was: large files wait on the Hub outside any
commit, and the next push does not send them again.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from hf_context_prune.errors import ConfigError, ContextPruneError, PublishError
from hf_context_prune.modeling.secret_scan import refuse_tokens
from hf_context_prune.modeling.upload_check import RepoType, is_allowed, matches_pattern
from hf_context_prune.storage.manifest import EDITABLE, find_unlisted_files, hash_file, read_manifest, verify_folder
from hf_context_prune.utils.file_names import MANIFEST_NAME
from hf_context_prune.utils.version import __version__

MAX_FILES = 100
"""Files in one commit at most (what the Hub advises); more go to a pull request, in several."""
_LAST = ("README.md", MANIFEST_NAME)  # of several commits, what makes the whole look whole
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PULL_REQUEST = re.compile(r"refs/pr/\d+")


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        repo_id: Full id of the repository, owner included.
        url: Of the commit that holds the folder.
        sha: Of that commit.
        changed: Whether a commit was made; False if the repository held the folder already.
        pull_request: URL of the pull request that was opened, else None. It is not merged.
        left_out: Files beside those of the manifest, which were not sent.
    """

    repo_id: str
    url: str
    sha: str
    changed: bool
    pull_request: str | None = None
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
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
    again: str | None = None,
) -> PushResult:
    """Upload a folder that this package saved, in one commit; nothing happens where the repository holds it already.

    What an earlier push of ours left in the repository, and older weights, go in the same commit; other files stay.
    With more than `MAX_FILES` files it opens a pull request and fills it in several commits, the card last: the branch
    is whole before and after it is merged.

    Args:
        folder: With its manifest.
        repo_id: ``owner/name``, or ``name`` for your own account; made if it does not exist.
        repo_type: ``"model"`` or ``"space"``.
        private: For a new repository; None is public, unless the owner's default is another. One that exists must be as
            it says.
        revision: Branch to commit to, made if it does not exist, or ``refs/pr/N``; None is ``main``.
        create_pr: Open a pull request against ``main`` instead, which needs no right to write.
        commit_message: First line of the commit.
        token: Access token; None takes the one that you logged in with.
        again: What to call after a push that broke off, for a folder that will be gone by then; None is the command
            that pushes this folder.

    Raises:
        LoadError: The folder was not saved by this package, or is damaged.
        PublishError: A file must not leave, the Hub refused, or the connection broke; says what to do.
        ConfigError: An argument that is not allowed.
    """
    path = Path(folder).expanduser()
    if repo_type not in ("model", "space"):
        raise ConfigError(f"repo_type is {repo_type!r}; it must be 'model' or 'space'.")
    if create_pr and revision not in (None, "main"):
        raise ConfigError(f"create_pr opens a pull request against main; leave out revision={revision!r}.")
    files, left_out = files_to_push(path, repo_type)
    refuse_tokens(path, sorted(files), token)
    message = commit_message or f"Upload {'Space' if repo_type == 'space' else 'pruned model'} with hf-context-prune"
    options = ["--repo-type", repo_type] if repo_type != "model" else []
    options += [] if private is None else ["--private" if private else "--public"]
    options += ["--commit-message", commit_message] if commit_message else []
    where = ["--create-pr"] if create_pr else [] if revision is None else ["--revision", revision]
    push = _Push(path, repo_id, repo_type, files, token, options, where, again)
    with _explained(push):
        return push.run(private, revision, create_pr, message, left_out)


def files_to_push(folder: Path, repo_type: RepoType) -> tuple[dict[str, str], tuple[str, ...]]:
    """The files of a folder that are sent, with their sha256, and those beside them that are not.

    Raises:
        LoadError: The folder was not saved by this package, or is damaged.
        PublishError: Its manifest lists a file that may not be sent.
    """
    manifest = verify_folder(folder)
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    refused = [name for name in files if not is_allowed(name, repo_type)]
    if refused:
        raise PublishError(
            f"{folder} holds {', '.join(sorted(refused)[:5])}, which may not go to a {repo_type} repository: only "
            f"config, safetensors, tokenizer, modeling files, plan, report and card of a model, and the text, pictures "
            f"and wheel of a Space. Nothing was uploaded."
        )
    for name in (MANIFEST_NAME, *(name for name in EDITABLE if name in files)):
        found = hash_file(folder / name)
        if (folder / name).is_symlink() and found != files.get(name, found):  # no edit, but any file of this machine
            raise PublishError(
                f"{name} in {folder} is a link to another file than the one that was saved. Nothing was uploaded. Put "
                f"the text itself there, or save the folder again."
            )
        files[name] = found
    return files, tuple(find_unlisted_files(folder, manifest))


def _is_weights(name: str) -> bool:
    return any(matches_pattern(name, pattern) for pattern in _WEIGHTS)


def _blob_id(path: Path) -> str:
    """As git names a file."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class _Push:
    """One push: the folder's files, and the client with the repository."""

    def __init__(
        self,
        folder: Path,
        repo_id: str,
        repo_type: RepoType,
        files: Mapping[str, str],
        token: str | None,
        options: list[str],
        where: list[str],
        again: str | None,
    ) -> None:
        self.folder, self.repo_id, self.repo_type, self.files = folder, repo_id, repo_type, files
        self.api = HfApi(token=token, library_name="hf-context-prune", library_version=__version__)
        self._options, self._where = options, where  # of the command that does this push
        self._again = again  # what does it instead
        self.unfinished: str | None = None  # the pull request that is being filled

    @property
    def _repo(self) -> dict[str, Any]:
        return {"repo_id": self.repo_id, "repo_type": self.repo_type}

    def run(
        self, private: bool | None, revision: str | None, create_pr: bool, message: str, left_out: tuple[str, ...]
    ) -> PushResult:
        sdk = {"space_sdk": "gradio"} if self.repo_type == "space" else {}
        url = self.api.create_repo(**self._repo, private=private, exist_ok=True, **sdk)
        self.repo_id = url.repo_id
        head = self._head(private, revision)
        there = self._files_at(head)
        changed = [name for name in sorted(self.files) if not self._is_there(name, there.get(name))]
        stale = sorted(self._stale(head, there))
        if not changed and not stale:
            return PushResult(self.repo_id, f"{url.rstrip('/')}/commit/{head}", head, False, None, left_out)
        parts = self._parts(changed, stale)
        where: dict[str, Any] = {"revision": revision, "create_pr": create_pr}
        if len(parts) > 1 and not create_pr and not _PULL_REQUEST.fullmatch(revision or ""):
            if revision not in (None, "main"):
                raise ConfigError(
                    f"{len(changed)} files are too many for one commit ({MAX_FILES}), so they go to a pull request, "
                    f"which is against main: leave out revision={revision!r}."
                )
            where = {"create_pr": True}
        pull_request, commit_url = None, ""
        for number, operations in enumerate(parts, 1):
            text = message if len(parts) == 1 else f"{message} ({number} of {len(parts)})"
            commit = self.api.create_commit(
                **self._repo, operations=operations, commit_message=text, parent_commit=head, **where
            )
            head, commit_url = commit.oid, commit.commit_url
            if commit.pr_url:
                pull_request, where = commit.pr_url, {"revision": commit.pr_revision}
                self.unfinished = commit.pr_revision
            elif len(parts) > 1:  # into a pull request that was there
                self.unfinished = revision
        self._verify(head)
        return PushResult(self.repo_id, commit_url, head, True, pull_request, left_out)

    def _parts(self, changed: list[str], stale: list[str]) -> list[list[Any]]:
        """Operations of one commit, or of several: the card and the manifest last, with what is deleted."""
        groups = [changed]
        if len(changed) + len(stale) > MAX_FILES:
            first = [name for name in changed if name not in _LAST]
            groups = [first[start : start + MAX_FILES] for start in range(0, len(first), MAX_FILES)]
            groups.append([name for name in changed if name in _LAST])
        parts: list[list[Any]] = [[self._addition(name) for name in group] for group in groups]
        parts[-1] += [CommitOperationDelete(name) for name in stale]
        return [operations for operations in parts if operations]

    def _addition(self, name: str) -> CommitOperationAdd:
        """A file as it was when it was looked through for tokens; text is held in memory until it is sent."""
        path = self.folder / name
        operation = CommitOperationAdd(name, path if _is_weights(name) else path.read_bytes())
        if operation.upload_info.sha256.hex() != self.files[name]:
            raise PublishError(
                f"{name} in {self.folder} changed while it was pushed. Nothing was uploaded. Push again."
            )
        return operation

    def state(self) -> str:
        """The repository after a push that broke off, and what to run."""
        where = ["--revision", self.unfinished] if self.unfinished else self._where
        command = shlex.join(["hf-context-prune", "push", str(self.folder), self.repo_id, *self._options, *where])
        if self.unfinished:
            again = f"{self._again} with revision={self.unfinished!r}" if self._again else f"`{command}`"
            return (
                f"Its main branch is as it was; the pull request {self.unfinished} is half filled: fill it with "
                f"{again}, or close it."
            )
        again = f"call {self._again} again" if self._again else f"run `{command}`"
        return (
            f"Nothing there changed (or, if only the Hub's last answer was lost, all did). Then {again}: what "
            f"arrived already is not sent again."
        )

    @property
    def what(self) -> str:
        """What is pushed, in words."""
        return "The model" if self._again else str(self.folder)

    def _head(self, private: bool | None, revision: str | None) -> str:
        """The commit that a branch names; the branch is made if it is not there."""
        try:
            info = self.api.repo_info(**self._repo, revision=revision)
        except RevisionNotFoundError:
            if revision is None or _PULL_REQUEST.fullmatch(revision):
                raise
            self.api.create_branch(**self._repo, branch=revision, exist_ok=True)
            info = self.api.repo_info(**self._repo, revision=revision)
        if private is not None and bool(info.private) != private:
            raise ConfigError(
                f"{self.repo_id} exists and is {'private' if info.private else 'public'}, and private={private} was "
                f"asked. Change it in the repository's settings, or leave private out. Nothing was uploaded."
            )
        return str(info.sha)

    def _files_at(self, commit: str) -> dict[str, RepoFile]:
        entries = self.api.list_repo_tree(**self._repo, revision=commit, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _is_there(self, name: str, remote: RepoFile | None) -> bool:
        if remote is None or remote.size != (self.folder / name).stat().st_size:
            return False
        if remote.lfs is not None:
            return bool(remote.lfs.sha256 == self.files[name])
        return bool(remote.blob_id == _blob_id(self.folder / name))

    def _stale(self, commit: str, there: Mapping[str, RepoFile]) -> set[str]:
        """What an earlier push of ours put there, and older weights, without what is sent now."""
        older: set[str] = set()
        if MANIFEST_NAME in there and not self._is_there(MANIFEST_NAME, there[MANIFEST_NAME]):
            file = self.api.hf_hub_download(**self._repo, filename=MANIFEST_NAME, revision=commit)
            older = set((read_manifest(Path(file).parent) or {"files": {}})["files"])
        if self.repo_type == "model":
            older |= {name for name in there if _is_weights(name)}
        return (older & set(there)) - set(self.files)

    def _verify(self, commit: str) -> None:
        there = self._files_at(commit)
        wrong = [name for name in self.files if not self._is_there(name, there.get(name))]
        if wrong:
            raise PublishError(
                f"The commit {commit} of {self.repo_id} does not hold {', '.join(sorted(wrong)[:5])} as {self.folder} "
                f"does (compared by checksum): a .gitignore there, or a file that changed meanwhile. Revert that "
                f"commit, and push again."
            )


@contextmanager
def _explained(push: _Push) -> Iterator[None]:
    """Turn what the client raises into an error that says what happened to the repository, and what to do."""
    try:
        yield
    except ContextPruneError:
        raise
    except HFValidationError as error:
        raise ConfigError(f"{push.repo_id!r} is not the id of a repository (owner/name): {error}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise PublishError(
            f"{push.what} was not pushed to {push.repo_id}: {_reason(error, push.repo_id)} {push.state()} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:500]})"
        ) from error


def _reason(error: BaseException, repo_id: str) -> str:
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__ or step.__context__
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return "HF_HUB_OFFLINE is set; unset it."
    status = next((one.response.status_code for one in chain if isinstance(one, HfHubHTTPError)), None)
    reasons = {
        400: "the Hub found the card or a file wrong, as it says below.",
        401: "you are not logged in, or the token is not valid: run `hf auth login`, or pass token=.",
        403: f"the token may not write there: use one with write permission for {repo_id}, or open a pull request "
        f"(create_pr=True, --create-pr).",
        404: "there is no such repository or branch, or your token may not see it.",
        409: "the Hub is busy with another change of it, or it exists as something else.",
        412: "someone else committed to it meanwhile, and this push might undo that; look at their commit first.",
    }
    if status is not None:
        return reasons.get(status, f"the Hub answered with status {status}; try again later.")
    if any(isinstance(one, HTTPError | ConnectionError) for one in chain):
        return "the connection broke, or could not be made."
    return "the upload failed."
