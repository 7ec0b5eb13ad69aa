"""Whether tensors are finite, and a hash of their values: for the weights of one model, found in one pass over them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from .linalg import all_finite
from .memory import release_pages


class TensorFacts(NamedTuple):
    """What is known of a tensor's values: whether all are finite, and their SHA-256."""

    is_finite: bool
    digest: bytes


_Place = tuple[int, torch.Size, torch.dtype]
_KNOWN: ContextVar[dict[_Place, TensorFacts | None] | None] = ContextVar("known tensors", default=None)


@contextmanager
def remember_weights(model: nn.Module) -> Iterator[None]:
    """Read each weight of a model at most once for these facts while the block runs, in which no weight may change.

    A model that is larger than memory is read from its file each time. Other models may share its tensors.
    """
    tensors = chain(model.parameters(), model.buffers())
    token = _KNOWN.set(dict.fromkeys(map(_place, tensors)))
    try:
        yield
    finally:
        _KNOWN.reset(token)


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value of a tensor is NaN or Inf."""
    found = _remembered(tensor)
    return all_finite(tensor.detach()) if found is None else found.is_finite


def values_digest(tensor: torch.Tensor) -> bytes:
    """Return the SHA-256 of a tensor's values."""
    found = _remembered(tensor)
    return _digest(tensor) if found is None else found.digest


def _remembered(tensor: torch.Tensor) -> TensorFacts | None:
    known, place = _KNOWN.get(), _place(tensor)
    if known is None or place not in known:
        return None
    if known[place] is None:
        known[place] = TensorFacts(all_finite(tensor.detach()), _digest(tensor))
        release_pages([tensor.detach()])
    return known[place]


def _place(tensor: torch.Tensor) -> _Place:
    return tensor.data_ptr(), tensor.shape, tensor.dtype


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).digest()
