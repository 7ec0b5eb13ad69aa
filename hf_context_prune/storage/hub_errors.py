"""Failures of the Hub's client as plain sentences, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_context_prune.utils.failed_writes import ONLY_OF_WRITES

_CLASSES: dict[str, type[BaseException] | tuple[type[BaseException], ...]] = {
    "gated": GatedRepoError,  # before its parent class
    "missing": RepositoryNotFoundError,
    "revision": RevisionNotFoundError,
    "invalid": HFValidationError,
    "offline": OfflineModeIsEnabled,
}
_SENTENCES = {
    "gated": "it is gated on the Hub; ask for access on its page, then log in with `hf auth login`",
    "missing": "there is no such repository on the Hub, or it is private; check the spelling, or log in with "
    "`hf auth login`",
    "revision": "it has no such branch, tag or commit on the Hub",
    "invalid": "this is not a Hub id (owner/name)",
    "offline": "HF_HUB_OFFLINE is set; unset it",
    "full": "its files can't be written to the cache; make room there, or set HF_HOME to a folder on a larger disk",
    "unreachable": "the connection broke, or could not be made; check the network and HF_HUB_OFFLINE, or try again "
    "later",
}


def explain_hub_error(error: BaseException, own: Mapping[str, str] | None = None, *, kind: str | None = None) -> str:
    """Return a sentence on a failure of the Hub's client: the reason and the remedy, without a full stop.

    Args:
        error: The exception of the client, or of a library that uses it.
        own: Sentences of the caller, which come before the general ones: by status (``"403"``), by kind (``"gated"``,
            ``"missing"``, ``"revision"``, ``"invalid"``, ``"offline"``, ``"full"``, ``"busy"``, ``"unreachable"``), or
            ``"other"`` for any other failure.
        kind: The kind of the failure, where the caller knows better.
    """
    sentences = {**_SENTENCES, **(own or {})}
    kinds = list(_kinds_of(error)) if kind is None else [kind]
    answered = f"the Hub answered with status {kinds[0]}; try again later" if kinds and kinds[0].isdecimal() else None
    found = next((sentences[kind] for kind in [*kinds, "other"] if kind in sentences), None)
    return found or answered or "the client of the Hub failed"


def _kinds_of(error: BaseException) -> Iterator[str]:
    """Yield the status of the answer, if there was one, and the kinds of the failure, the most specific first."""
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__ or step.__context__
    answers = [one.response for one in chain if isinstance(one, HfHubHTTPError) and one.response is not None]
    status = next((code for answer in answers if (code := getattr(answer, "status_code", None)) is not None), None)
    if status is not None:
        yield str(status)
    if any(isinstance(one, OSError) and one.errno in ONLY_OF_WRITES for one in chain):
        yield "full"
    yield from (kind for kind, classes in _CLASSES.items() if any(isinstance(one, classes) for one in chain))
    if status is not None and (status == 429 or status >= 500):
        yield "busy"
    if status is None and any(isinstance(one, HTTPError | ConnectionError) for one in chain):
        yield "unreachable"
