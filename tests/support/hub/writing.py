"""The write side of the Hub's protocol: create, preupload, large files, commits, pull requests, branches."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from tests.support.hub.server import Hub, Repo

PREFIXES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".gz", ".png", ".whl")
LARGE = 10_000_000  # bytes; what is larger never goes into git


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class RefusalError(Exception):
    """Ends the handling of a request with an error."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        self.status, self.body = status, json.dumps({"error": message}).encode()
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


class Writing:
    """Mixed into the request handler."""

    hub: Hub
    headers: Any

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def written(self, parts: list[str], query: dict, body: bytes) -> Any:
        """The JSON answer to a route of this side; None for the others."""
        match parts:
            case ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                return self._validate(json.loads(body)["content"])
            case ["api", kind, owner, name, "preupload", revision]:
                return self._preupload(self._writable(kind, owner, name, query), revision, json.loads(body)["files"])
            case ["api", kind, owner, name, "commit", revision]:
                repo = self._writable(kind, owner, name, query)
                return self._commit(repo, revision, body.decode().splitlines(), "create_pr" in query)
            case ["api", kind, owner, name, "branch", branch]:
                repo = self._writable(kind, owner, name, query)
                if branch in repo.refs:
                    raise RefusalError(409, "", "Reference already exists")
                repo.refs[branch] = repo.refs["main"]
                return {}
            case [*prefix, owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                kind = prefix[0] if prefix else "models"
                self._writable(kind, owner, name.removesuffix(".git"), {"create_pr": ["1"]})
                return self._batch(json.loads(body)["objects"])
            case ["lfs", "verify"]:
                if json.loads(body)["oid"] not in self.hub.blobs:
                    raise RefusalError(404, "", "No such object")
                return {}
            case ["lfs", oid]:
                if sha256(body) != oid:
                    raise RefusalError(400, "", "Another checksum")
                self.hub.blobs[oid] = body
                return {}
        return None

    def _owners(self) -> set[str]:
        if self.token not in self.hub.tokens:
            raise RefusalError(401, "", "Invalid username or password.")
        return self.hub.tokens[self.token]

    def _writable(self, kind: str, owner: str, name: str, query: dict) -> Repo:
        owners = self._owners()
        repo = self.hub.repos.get((kind, f"{owner}/{name}"))
        if repo is None:
            raise RefusalError(404, "RepoNotFound", "Repository not found")
        if owner not in owners and "create_pr" not in query:
            raise RefusalError(403, "", "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def _create(self, asked: dict) -> dict:
        owners = self._owners()
        owner = asked["organization"] or min(owners, default="")
        if owner not in owners:
            raise RefusalError(403, "", f"You don't have the rights to create a repository under {owner!r}")
        kind, id = asked.get("type", "model") + "s", f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{PREFIXES[kind]}{id}"}
        if (kind, id) in self.hub.repos:
            refusal = RefusalError(409, "", "You already created this repo")
            refusal.body = json.dumps(url).encode()
            raise refusal
        self.hub.create(kind, id, {".gitattributes": b"*.safetensors filter=lfs\n"})
        repo = self.hub.repos[kind, id]
        repo.private = asked.get("visibility") == "private"
        return url

    @staticmethod
    def _validate(content: str) -> dict:
        block = content.split("---")[1] if content.startswith("---") else ""
        try:
            sound = isinstance(yaml.safe_load(block), dict)
        except yaml.YAMLError:
            sound = False
        if not sound:
            refusal = RefusalError(400, "", "Bad card")
            refusal.body = json.dumps({"errors": [{"message": "not a mapping"}], "warnings": []}).encode()
            raise refusal
        return {"errors": [], "warnings": []}

    @staticmethod
    def _preupload(repo: Repo, revision: str, files: list[dict]) -> dict:
        sha = repo.resolve(revision)
        if sha is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        answers = []
        for file in files:
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LARGE
            answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if (content := repo.commits[sha].get(file["path"])) is not None:
                answers[-1]["oid"] = sha256(content) if large else blob_id(content)
        return {"files": answers}

    def _batch(self, objects: list[dict]) -> dict:
        answers = []
        for item in objects:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                verify = {"href": f"{self.hub.endpoint}/lfs/verify"}
                answer["actions"] = {"upload": {"href": f"{self.hub.cdn}/lfs/{item['oid']}"}, "verify": verify}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def _commit(self, repo: Repo, revision: str, lines: list[str], create_pr: bool) -> dict:
        items = [json.loads(line) for line in lines]
        head = repo.resolve(revision)
        if head is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if revision not in repo.refs:
            raise RefusalError(400, "", "Not a branch")
        parent = items[0]["value"].get("parentCommit")
        if parent not in (None, head) and not create_pr:
            raise RefusalError(412, "", f"{revision} does not point at {parent}")
        files = dict(repo.commits[parent or head])
        for item in items[1:]:
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise RefusalError(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif files.pop(value["path"], None) is None:
                raise RefusalError(404, "EntryNotFound", "A file with this name doesn't exist")
        number = sum(name.startswith("refs/pr/") for name in repo.refs) + 1
        ref = f"refs/pr/{number}" if create_pr else revision
        if create_pr:
            repo.refs[ref] = parent or head
        sha = repo.commit(files, ref=ref)
        url = f"{self.hub.endpoint}/{PREFIXES[repo.kind]}{repo.id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if create_pr else {})
