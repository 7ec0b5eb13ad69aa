"""One push: the files of a folder against those of a repository, in one commit or several, verified afterwards."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from hf_context_prune.errors import ConfigError, PublishError
from hf_context_prune.storage.manifest import read_manifest
from hf_context_prune.utils.file_names import MANIFEST_NAME
from hf_context_prune.utils.upload_check import RepoType, matches_pattern
from hf_context_prune.utils.version import __version__

MAX_FILES = 100
"""Largest number of files in one commit (as the Hub advises); more go to a pull request, in several commits."""
_LAST = ("README.md", MANIFEST_NAME)  # in the last of several commits: with them the repository looks complete
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.onnx", "*.onnx.data")
_PULL_REQUEST = re.compile(r"refs/pr/\d+")


@dataclass(frozen=True)
class Pushed:
    """A finished push.

    Attributes:
        url: URL of the commit that holds the folder.
        sha: Id of that commit.
        changed: Whether a commit was made.
        pull_request: URL of the pull request that was opened; None if none was.
    """

    url: str
    sha: str
    changed: bool
    pull_request: str | None = None


def _is_weights(name: str) -> bool:
    return any(matches_pattern(name, pattern) for pattern in _WEIGHTS)


def _blob_id(path: Path) -> str:
    """Return the id that git gives a file."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Push:
    """One push: the files of a folder, and the client with the repository.

    Args:
        folder: The folder.
        repo_id: Id of the repository; the owner is filled in by `run`.
        repo_type: ``"model"`` or ``"space"``.
        files: The files to send, with their sha256.
        token: Access token; None takes the saved one.
        options: Options of the command that does this push.
        where: Options of that command that name the branch or pull request.
        retry_hint: The call that repeats the push; None is that command.
    """

    def __init__(
        self,
        folder: Path,
        repo_id: str,
        repo_type: RepoType,
        files: Mapping[str, str],
        token: str | None,
        options: list[str],
        where: list[str],
        retry_hint: str | None,
    ) -> None:
        self.folder, self.repo_id, self.repo_type, self.files = folder, repo_id, repo_type, files
        self.api = HfApi(token=token, library_name="hf-context-prune", library_version=__version__)
        self._options, self._where, self._retry_hint = options, where, retry_hint
        self.unfinished: str | None = None  # the pull request that is being filled

    @property
    def _repo(self) -> dict[str, Any]:
        return {"repo_id": self.repo_id, "repo_type": self.repo_type}

    def run(self, private: bool | None, revision: str | None, create_pr: bool, message: str) -> Pushed:
        """Make the repository if it does not exist, commit what differs, and verify the commit.

        Args:
            private: Visibility of a new repository; one that exists must have it. None asks for none.
            revision: Branch or ``refs/pr/N``; None is ``main``.
            create_pr: Open a pull request.
            message: First line of the commit.

        Raises:
            ConfigError: The repository has another visibility, or the files need a pull request against `main`.
            PublishError: A file changed meanwhile, or the commit does not hold the folder.
        """
        sdk = {"space_sdk": "gradio"} if self.repo_type == "space" else {}
        url = self.api.create_repo(**self._repo, private=private, exist_ok=True, **sdk)
        self.repo_id = url.repo_id
        head = self._head(private, revision)
        there = self._files_at(head)
        changed = [name for name in sorted(self.files) if not self._is_there(name, there.get(name))]
        stale = sorted(self._stale(head, there))
        if not changed and not stale:
            return Pushed(f"{url.rstrip('/')}/commit/{head}", head, False)
        parts = self._parts(changed, stale)
        where: dict[str, Any] = {"revision": revision, "create_pr": create_pr}
        if len(parts) > 1 and not create_pr and not _PULL_REQUEST.fullmatch(revision or ""):
            if revision not in (None, "main"):
                raise ConfigError(
                    f"{len(changed)} files are too many for one commit (at most {MAX_FILES}), so they go to a pull "
                    f"request against main. Leave out revision={revision!r}."
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
            elif len(parts) > 1:  # into a pull request that existed
                self.unfinished = revision
        self._verify(head)
        return Pushed(commit_url, head, True, pull_request)

    def _parts(self, changed: list[str], stale: list[str]) -> list[list[Any]]:
        """Return the operations of each commit; the card, the manifest and the deletions come last."""
        groups = [changed]
        if len(changed) + len(stale) > MAX_FILES:
            first = [name for name in changed if name not in _LAST]
            groups = [first[start : start + MAX_FILES] for start in range(0, len(first), MAX_FILES)]
            groups.append([name for name in changed if name in _LAST])
        parts: list[list[Any]] = [[self._addition(name) for name in group] for group in groups]
        parts[-1] += [CommitOperationDelete(name) for name in stale]
        return [operations for operations in parts if operations]

    def _addition(self, name: str) -> CommitOperationAdd:
        """Return the upload of a file as it was when it was searched for tokens; text is held in memory until then."""
        path = self.folder / name
        operation = CommitOperationAdd(name, path if _is_weights(name) else path.read_bytes())
        if operation.upload_info.sha256.hex() != self.files[name]:
            raise PublishError(f"{name} in {self.folder} changed during the push. Nothing was uploaded. Push again.")
        return operation

    def state(self) -> str:
        """Return sentences on the repository after a push that failed, with the command that repeats the push."""
        where = ["--revision", self.unfinished] if self.unfinished else self._where
        command = shlex.join(["hf-context-prune", "push", str(self.folder), self.repo_id, *self._options, *where])
        if self.unfinished:
            retry = f"{self._retry_hint} with revision={self.unfinished!r}" if self._retry_hint else f"`{command}`"
            return (
                f"The main branch is as it was; the pull request {self.unfinished} is incomplete: complete it with "
                f"{retry}, or close it."
            )
        retry = f"call {self._retry_hint} again" if self._retry_hint else f"run `{command}`"
        return (
            f"Nothing changed there (or everything did, if only the Hub's last answer was lost). Then {retry}: files "
            f"that arrived are not sent again."
        )

    @property
    def subject(self) -> str:
        """The pushed folder or model, in words."""
        return "The model" if self._retry_hint else str(self.folder)

    def _head(self, private: bool | None, revision: str | None) -> str:
        """Return the commit of a branch; make the branch if it does not exist."""
        try:
            info = self.api.repo_info(**self._repo, revision=revision)
        except RevisionNotFoundError:
            if revision is None or _PULL_REQUEST.fullmatch(revision):
                raise
            self.api.create_branch(**self._repo, branch=revision, exist_ok=True)
            info = self.api.repo_info(**self._repo, revision=revision)
        if private is not None and bool(info.private) != private:
            raise ConfigError(
                f"{self.repo_id} exists and is {'private' if info.private else 'public'}, but private={private} was "
                f"given. Change it in the settings of the repository, or leave private out. Nothing was uploaded."
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
        """Return the files of an earlier push by this package, and older weights, without the files sent now."""
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
                f"does (compared by checksum): a .gitignore there, or a file that changed meanwhile. Revert the "
                f"commit, and push again."
            )
