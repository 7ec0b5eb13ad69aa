"""A small server on 127.0.0.1 that speaks the Hub's protocol, for the real client.

Repositories live in memory: commits by sha, branches that name one, files as bytes. Answers have the shape of the real
ones where the clients (`huggingface_hub`, `transformers`, `datasets`) look: a small file is a relative 307 to a cached
copy, an LFS file a 302 with ``X-Linked-*`` to another origin (a second port here), every error has its
``X-Error-Code``, and a repository that does not exist is a 401, as for everyone without a token. Every request is
logged; an unknown route is a 501, so that a client that starts to ask something else shows.

What is written (`writing.py`) needs a token: `Hub.tokens` says to which owners each may write. A token may open pull
requests everywhere. ``python -m tests.support.hub.server TOKEN OWNER`` serves an empty Hub until its input ends.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from tests.support.hub.writing import LFS_SUFFIXES, RefusalError, Writing, blob_id, sha256

DATE = "2026-01-02T03:04:05.000Z"


def files_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder, as a commit takes them."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@dataclass
class Repo:
    """A repository: its commits, and the branches and other refs that name one of them."""

    kind: str  # "models", "datasets" or "spaces"
    id: str
    gated: bool = False
    busy: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], *, ref: str = "main") -> str:
        """Move a ref to a commit with exactly these files; returns the sha."""
        story = [self.kind, self.id, self.refs.get(ref), sorted((name, sha256(raw)) for name, raw in files.items())]
        sha = hashlib.sha1(json.dumps(story).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None

    def info(self, sha: str) -> dict:
        """A commit, as the API for models and datasets describes it."""
        return {
            "_id": sha[:24],
            "id": self.id,
            "author": self.id.partition("/")[0],
            "sha": sha,
            "createdAt": DATE,
            "lastModified": DATE,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": name} for name in sorted(self.commits[sha])],
        }

    def entries(self, sha: str, *, expand: bool) -> dict[str, dict]:
        """Files and folders of a commit by path, as the tree API describes them."""
        found: dict[str, dict] = {}
        for name, content in sorted(self.commits[sha].items()):
            for parent in [str(path) for path in Path(name).parents][-2::-1]:
                found[parent] = {"type": "directory", "oid": blob_id(parent.encode()), "size": 0, "path": parent}
            found[name] = {"type": "file", "oid": blob_id(content), "size": len(content), "path": name}
            if name.endswith(LFS_SUFFIXES):
                found[name]["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        if expand:
            for entry in found.values():
                entry["lastCommit"] = {"id": sha, "title": "A commit", "date": DATE}
        return found


@dataclass(frozen=True)
class Request:
    """What a client asked, and the status that it got."""

    method: str
    path: str  # decoded, without the query
    status: int

    def __str__(self) -> str:
        return f"{self.method} {self.path} -> {self.status}"


class Hub:
    """The server, for use in a `with` block: it listens on two free ports, in threads of its own.

    Attributes:
        log: Every request, in the order of the answers.
        tokens: Each with the owners to whose repositories it may write.
        blobs: What was uploaded to large file storage, by sha256.
        cuts: Uploads that are cut in the middle, from the next on.
        faults: Statuses that requests get instead of an answer, once each: (method, end of the path, status, code).
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, set[str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.cuts = 0
        self.faults: list[tuple[str, str, int, str]] = []
        self.log: list[Request] = []
        self.lock = threading.RLock()
        self._watches: list[tuple[str, Callable[[], object]]] = []
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), type("_Bound", (_Handler,), {"hub": self})) for _ in "12"
        ]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> Hub:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def create(self, kind: str, id: str, files: Mapping[str, bytes], *, gated: bool = False, busy: bool = False) -> str:
        """Create a repository whose branch main holds these files, perhaps behind a gate or an overloaded server."""
        repo = self.repos[kind, id] = Repo(kind, id, gated, busy)
        return repo.commit(files)

    def commit(self, kind: str, id: str, files: Mapping[str, bytes], *, ref: str = "main") -> str:
        """As `Repo.commit`."""
        return self.repos[kind, id].commit(files, ref=ref)

    def read(self, kind: str, id: str) -> Repo:
        """A repository as it is now."""
        return self.repos[kind, id]

    def requests(self) -> list[Request]:
        """The log."""
        return self.log

    def allow(self, token: str, *owners: str) -> None:
        """Let a token write to the repositories of these owners."""
        self.tokens[token] = set(owners)

    def cut(self, uploads: int) -> None:
        """Cut that many uploads in the middle, from the next one on."""
        self.cuts = uploads

    def fault(self, method: str, end: str, status: int) -> None:
        """Answer one request, by method and end of its path, with a status."""
        self.faults.append((method, end, status, ""))

    def once_after(self, path: str, method: str, *arguments: Any, **options: Any) -> None:
        """Call a method of this class once: after the first answer to a path, before the next request is answered."""
        self._watches.append((path, lambda: getattr(self, method)(*arguments, **options)))

    def answered(self, request: Request) -> None:
        self.log.append(request)
        for watch in [watch for watch in self._watches if watch[0] == request.path]:
            self._watches.remove(watch)
            watch[1]()


@dataclass
class _Answer:
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def _json(value: object) -> _Answer:
    return _Answer(200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(value).encode())


class _Handler(Writing, BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together: in two packets each answer would wait 40 ms for an ACK
    timeout = 30  # an idle connection is closed

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        body = self._body()
        if body is None:  # cut in the middle
            self.hub.answered(Request(self.command, unquote(path), 0))
            return
        with self.hub.lock:
            try:
                self._fault(path)
                answer = self._route([unquote(part) for part in path.strip("/").split("/")], parse_qs(query), body)
            except RefusalError as refusal:
                answer = _Answer(refusal.status, refusal.headers, refusal.body)
            self.hub.answered(Request(self.command, unquote(path), answer.status))
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _body(self) -> bytes | None:
        """What came with the request; None where the connection is to be cut."""
        size = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self.hub.cuts > 0:
            self.hub.cuts -= 1
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        return self.rfile.read(size)

    def _fault(self, path: str) -> None:
        for fault in self.hub.faults:
            method, end, status, code = fault
            if method == self.command and path.endswith(end):
                self.hub.faults.remove(fault)
                raise RefusalError(status, code, "As the test wants it")

    def _route(self, parts: list[str], query: dict, body: bytes) -> _Answer:
        if self.command in ("POST", "PUT") and (value := self.written(parts, query, body)) is not None:
            return _json(value)
        match parts:
            case ["api", ("models" | "datasets" | "spaces") as kind, owner, name, *rest]:
                form = parse_qs(body.decode()) if self.command == "POST" else {}
                return self._api(self._repo(kind, f"{owner}/{name}"), rest, query, form)
            case ["api", "resolve-cache", kind, owner, name, sha, *file]:
                return self._content(self._repo(kind, f"{owner}/{name}"), sha, file, {"X-Repo-Commit": sha})
            case ["cdn", kind, owner, name, sha, *file]:  # to know the address is enough
                return self._content(self.hub.repos[kind, f"{owner}/{name}"], sha, file, {})
            case [("datasets" | "spaces") as kind, owner, name, "resolve", revision, *file]:
                return self._file(self._repo(kind, f"{owner}/{name}"), revision, "/".join(file))
            case [owner, name, "resolve", revision, *file]:
                return self._file(self._repo("models", f"{owner}/{name}"), revision, "/".join(file))
        return _Answer(501)

    def _repo(self, kind: str, id: str) -> Repo:
        if self.token and self.token not in self.hub.tokens:
            raise RefusalError(401, "", "Invalid username or password.")
        repo = self.hub.repos.get((kind, id))
        if repo is None or (
            repo.private and self.token not in self.hub.tokens
        ):  # without a token nobody learns whether it is missing or private
            raise RefusalError(401, "RepoNotFound", "Repository not found")
        if repo.busy:
            raise RefusalError(503, "Unavailable", "Service Unavailable")
        return repo

    def _sha(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _api(self, repo: Repo, rest: list[str], query: dict, form: dict) -> _Answer:
        match rest:
            case [] | ["revision", _]:
                return _json(repo.info(self._sha(repo, rest[1] if rest else "main")))
            case ["tree", revision, *folder] if self.command == "GET":
                return self._tree(repo, revision, "/".join(folder), query)
            case ["paths-info", revision] if self.command == "POST":
                entries = repo.entries(self._sha(repo, revision), expand=_is_true(form, "expand"))
                return _json([entries[path] for path in form.get("paths", []) if path in entries])
            case ["commits", revision]:
                sha = self._sha(repo, revision)
                return _json([{"id": sha, "title": "A commit", "message": "", "authors": [], "date": DATE}])
            case ["refs"]:
                branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repo.refs.items()]
                return _json({"branches": branches, "converts": [], "tags": []})
        return _Answer(501)

    def _tree(self, repo: Repo, revision: str, folder: str, query: dict) -> _Answer:
        entries = repo.entries(self._sha(repo, revision), expand=_is_true(query, "expand"))
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise RefusalError(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        below = [entry for path, entry in entries.items() if not folder or path.startswith(f"{folder}/")]
        if not _is_true(query, "recursive"):
            below = [entry for entry in below if "/" not in entry["path"][len(folder) :].strip("/")]
        return _json(below)

    def _file(self, repo: Repo, revision: str, name: str) -> _Answer:
        if repo.gated:
            raise RefusalError(
                401,
                "GatedRepo",
                f"Access to {repo.kind[:-1]} {repo.id} is restricted. You must have access to it and be authenticated "
                "to access it. Please log in.",
            )
        sha = self._sha(repo, revision)
        content = repo.commits[sha].get(name)
        if content is None:
            raise RefusalError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
        lfs = name.endswith(LFS_SUFFIXES)
        etag = sha256(content) if lfs else blob_id(content)
        headers = {"X-Repo-Commit": sha, "X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag}"'}
        where = quote(f"{repo.kind}/{repo.id}/{sha}/{name}")
        if lfs:  # another host on the real Hub, so that the client takes the metadata from this answer
            return _Answer(302, headers | {"Location": f"{self.hub.cdn}/cdn/{where}"})
        return _Answer(307, headers | {"Location": f"/api/resolve-cache/{where}"})

    def _content(self, repo: Repo, sha: str, file: list[str], headers: dict[str, str]) -> _Answer:
        content = repo.commits[sha]["/".join(file)]
        headers |= {"ETag": f'"{blob_id(content)}"', "Accept-Ranges": "bytes"}
        unit, _, wanted = (self.headers.get("Range") or "").partition("=")
        if unit != "bytes":
            return _Answer(200, headers, content)
        first, _, last = wanted.partition("-")
        start, stop = int(first), min(int(last or len(content)) + 1, len(content))
        if start >= len(content):
            return _Answer(416, {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return _Answer(206, headers, content[start:stop])


def _is_true(values: dict[str, list[str]], name: str) -> bool:
    return values.get(name, [""])[0].lower() in ("true", "1")


if __name__ == "__main__":
    with Hub() as served:
        served.allow(sys.argv[1], sys.argv[2])
        print(served.endpoint, flush=True)
        sys.stdin.read()
