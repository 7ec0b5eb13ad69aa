"""The local server in a process of its own; tests set it up, and read what it saw, through a pipe."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from tests.support.hub.server import Hub, Repo, Request


def _serve(connection: Connection) -> None:
    with Hub() as hub:
        connection.send((hub.endpoint, hub.cdn))
        while (asked := connection.recv()) is not None:
            name, arguments, options = asked
            with hub.lock:
                connection.send(getattr(hub, name)(*arguments, **options))


class RemoteRepo:
    """A repository of the server as it is whenever it is looked at."""

    def __init__(self, hub: HubProcess, kind: str, id: str) -> None:
        self._hub, self._kind, self._id = hub, kind, id

    def commit(self, files: Mapping[str, bytes], *, ref: str = "main") -> str:
        """As `Repo.commit`."""
        return self._hub.ask("commit", self._kind, self._id, dict(files), ref=ref)

    def __getattr__(self, name: str) -> Any:
        now: Repo = self._hub.ask("read", self._kind, self._id)
        return getattr(now, name)


class HubProcess:
    """Starts the server, for use in a `with` block.

    Attributes:
        endpoint: Its address.
        cdn: The address of its second port.
    """

    def __enter__(self) -> HubProcess:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.endpoint, self.cdn = self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError("the server did not end")

    def ask(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the `Hub` there."""
        self._pipe.send((name, arguments, options))
        return self._pipe.recv()

    @property
    def log(self) -> list[Request]:
        """Every request so far."""
        return self.ask("requests")

    def repo(self, kind: str, id: str, files: Mapping[str, bytes], **options: bool) -> RemoteRepo:
        """As `Hub.create`."""
        self.ask("create", kind, id, dict(files), **options)
        return self.at(kind, id)

    def at(self, kind: str, id: str) -> RemoteRepo:
        """A repository that is there."""
        return RemoteRepo(self, kind, id)

    def once_after(self, path: str, method: str, *arguments: Any, **options: Any) -> None:
        """As `Hub.once_after`."""
        self.ask("once_after", path, method, *arguments, **options)
