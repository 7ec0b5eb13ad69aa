"""Ids of repositories on the Hugging Face Hub."""

from __future__ import annotations

import re
from typing import TypeGuard

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_FORM = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)


def is_hub_id(value: object, *, with_owner: bool = True) -> TypeGuard[str]:
    """Return whether a value can be the id of a repository, by the rules of `huggingface_hub`.

    Args:
        value: Any value.
        with_owner: Whether the id must have the form ``owner/name``; False also allows ``name``.
    """
    if not isinstance(value, str) or not _FORM.fullmatch(value) or (with_owner and "/" not in value):
        return False
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True
