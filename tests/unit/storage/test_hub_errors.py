"""Failures of the Hub's client become a sentence with the remedy."""

from __future__ import annotations

import errno

import httpx
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_context_prune.storage.hub_errors import explain_hub_error


def answer(kind, status):
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://localhost")))


def caused_by(error):
    try:
        raise LocalEntryNotFoundError("not in the cache") from error
    except LocalEntryNotFoundError as found:
        return found


def test_every_failure_has_its_sentence(subtests):
    for error, words in (
        (answer(GatedRepoError, 403), "ask for access"),
        (answer(RepositoryNotFoundError, 404), "check the spelling"),
        (answer(RepositoryNotFoundError, 401), "hf auth login"),
        (answer(RevisionNotFoundError, 404), "branch, tag or commit"),
        (HFValidationError("a b"), "owner/name"),
        (OfflineModeIsEnabled("offline"), "unset it"),
        (HTTPError("no route"), "check the network"),
        (ConnectionError("reset"), "check the network"),
        (caused_by(ConnectionError("reset")), "check the network"),
        (caused_by(answer(HfHubHTTPError, 503)), "status 503; try again later"),
        (answer(HfHubHTTPError, 400), "status 400"),
        (OSError(errno.ENOSPC, "No space left on device", "/cache/blob"), "set HF_HOME"),
        (caused_by(OSError(errno.EDQUOT, "Disk quota exceeded")), "make room"),
        (OSError(errno.EACCES, "Permission denied"), "the client of the Hub failed"),
        (ValueError("x"), "the client of the Hub failed"),
    ):
        with subtests.test(error=repr(error)):
            assert words in explain_hub_error(error)


def test_sentences_of_the_caller_come_first(subtests):
    own = {"403": "no right", "busy": "wait", "missing": "gone", "other": "else"}
    for error, words in (
        (answer(GatedRepoError, 403), "no right"),
        (answer(HfHubHTTPError, 429), "wait"),
        (answer(HfHubHTTPError, 500), "wait"),
        (answer(RepositoryNotFoundError, 404), "gone"),
        (answer(HfHubHTTPError, 418), "else"),
        (ValueError("x"), "else"),
    ):
        with subtests.test(error=repr(error)):
            assert explain_hub_error(error, own) == words
    assert explain_hub_error(ValueError("x"), own, kind="busy") == "wait"
