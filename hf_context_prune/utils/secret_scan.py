"""A search for access tokens in files, before anything leaves the machine."""

from __future__ import annotations

import re
from pathlib import Path

from hf_context_prune.errors import PublishError

_CHUNK = 1 << 20
_OVERLAP = 4096  # longer than any form below
_OPAQUE = {".safetensors", ".png", ".whl", ".model"}  # files that hold no settings as text
# A token may begin here: also after an escape of JSON ("\n", "\u00e9"), whose last character is a letter or digit.
_START = rb"(?:(?<![A-Za-z0-9])|(?<=\\[bfnrt])|(?<=\\u[0-9a-fA-F]{4}))"
_FORMS: dict[str, bytes] = {
    "a Hugging Face token": rb"(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    "a GitLab token": rb"glpat-[A-Za-z0-9_-]{20,}",
    "an API key (sk-...)": rb"sk-(?:proj-|ant-|or-v1-)?[A-Za-z0-9_-]{32,}",
    "an AWS access key": rb"(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google API key": rb"AIza[A-Za-z0-9_-]{35}",
    "a Slack token": rb"xox[abeprs]-[A-Za-z0-9-]{20,}",
    "a PyPI token": rb"pypi-AgE[A-Za-z0-9_-]{50,}",
    "an NVIDIA key": rb"nvapi-[A-Za-z0-9_-]{40,}",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
}
*_WORDS, _KEY = _FORMS.values()
_ANY = re.compile(b"%s(?:%s)|(%s)" % (_START, b"|".join(b"(%s)" % form for form in _WORDS), _KEY))


def hide_tokens(text: str) -> str:
    """Return a text with ``...`` in place of every access token."""
    return _ANY.sub(b"...", text.encode("utf-8", "replace")).decode()


def refuse_tokens(folder: Path, names: list[str], own_token: str | None = None) -> None:
    """Refuse access tokens in the text files of a folder; the search needs constant memory.

    Args:
        folder: The folder.
        names: Relative paths of the files.
        own_token: One more token to refuse, whatever its form.

    Raises:
        PublishError: A file holds a token. The message names file and line, and shows only the first characters.
    """
    own = own_token.encode() if own_token and len(own_token) >= 8 else None
    for name in names:
        if Path(name).suffix.lower() not in _OPAQUE:
            _refuse_in(folder / name, name, own)


def _refuse_in(path: Path, name: str, own: bytes | None) -> None:
    line, rest = 1, b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            text = rest + chunk
            match = _ANY.search(text)
            at, kind, shown = -1, "", b""
            if match is not None:
                at, kind = match.start(), list(_FORMS)[(match.lastindex or 1) - 1]
                shown = match.group()[:6]
            elif own is not None and own in text:
                at, kind, shown = text.index(own), "the token of this upload", own[:3]
            if at >= 0:
                number = line + text.count(b"\n", 0, at)
                raise PublishError(
                    f"{name} holds {kind} in line {number} ({shown.decode()}...). Nothing was uploaded. Remove the "
                    f"token, save the folder again, and revoke the token if it was ever shared."
                )
            rest = text[-_OVERLAP:]
            line += text[: len(text) - len(rest)].count(b"\n")
