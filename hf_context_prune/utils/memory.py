"""How much memory a run may take, and pages of mapped files that are given back to the system."""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import psutil
import torch
from torch import nn

from hf_context_prune.errors import ConfigError

from .temporary import own_temporary_folder

_LOGGER = logging.getLogger(__name__)
FREE_SHARE = 0.75
"""Share of the free memory that a run may take where no limit is set."""
SPILL_SHARE = 0.5
"""Share of the free memory that one kind of data may take; above it, it lies in memory-mapped files."""
_LIMIT: ContextVar[int | None] = ContextVar("memory limit", default=None)
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUP_FILES = {  # of control groups version 2 and 1: limit, usage, and prefix of the sums in memory.stat
    "": ("memory.max", "memory.current", ""),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
_SIZE = re.compile(r"(\d+)|(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b", re.ASCII | re.IGNORECASE)
_MADV_PAGEOUT = 21  # linux/mman-common.h; Python's mmap module has no name for it


def parse_bytes(value: int | str | None) -> int | None:
    """Return the bytes of a limit such as "8GiB", "800MB" or 8000000000; None stays None.

    A unit is one of B, KB, MB, GB and TB (thousands) or KiB, MiB, GiB and TiB (1,024), in letters of any case.

    Raises:
        ConfigError: It is none, or not above 0.
    """
    if value is None:
        return None
    size, found = 0, None if isinstance(value, bool) else _SIZE.fullmatch(str(value).strip())
    if found is not None:
        power = " kmgt".index((found[3] or " ").lower())
        size = int(found[1]) if found[1] else round(float(found[2]) * (1024 if found[4] else 1000) ** power)
    if size <= 0:
        raise ConfigError(f"max_memory is {value!r}; it must be a size above 0, such as '8GiB', '800MB' or 8000000000.")
    return size


@contextmanager
def memory_limit(most: int | None) -> Iterator[None]:
    """Limit what [`free_memory`][] reports while the block runs.

    Args:
        most: Bytes that the process may hold in all; None: what it holds now, and `FREE_SHARE` of what is free.
    """
    if most is None:
        most = own_memory() + int(FREE_SHARE * free_on_machine())
    token = _LIMIT.set(most)
    try:
        yield
    finally:
        _LIMIT.reset(token)


@contextmanager
def reserve_memory(size: int) -> Iterator[None]:
    """Let other runs of this user know, while the block runs, that this process will take so much more memory."""
    note, own = None, psutil.Process()
    try:
        note = own_temporary_folder() / f"memory-{os.getpid()}.json"
        note.write_text(json.dumps({"started": own.create_time(), "most": own_memory() + size}))
    except OSError as error:
        _LOGGER.warning(
            "Other runs can't be told of the memory that this one will take (%s), so one may begin that has no room. "
            "Begin none until this one ends.",
            error.strerror,
        )
    try:
        yield
    finally:
        if note is not None:
            with suppress(OSError):
                note.unlink()


def reserved_by_others() -> dict[int, int]:
    """Return the bytes that other runs of this user will still take, by process; notes of killed runs are removed."""
    found: dict[int, int] = {}
    try:
        notes = list(own_temporary_folder().glob("memory-*.json"))
    except OSError:  # no such folder can be made, so no run has left a note there
        return found
    for note in notes:
        try:
            other = psutil.Process(int(note.stem.partition("-")[2]))
            about = json.loads(note.read_text())
            if other.create_time() != about["started"]:  # another process has its number now
                raise psutil.NoSuchProcess(other.pid)
            if other.pid != os.getpid():
                found[other.pid] = max(0, int(about["most"]) - _held_by(other))
        except psutil.NoSuchProcess:
            with suppress(OSError):
                note.unlink()
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):  # it is being written, or just ended
            continue
    return found


def free_memory(device: torch.device | None = None) -> int:
    """Return the bytes that may still be taken: on the CPU under the limit of [`memory_limit`][].

    Args:
        device: A CUDA device, whose own memory counts; else the CPU's.
    """
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free, limit = free_on_machine(), _LIMIT.get()
    return free if limit is None else max(0, min(free, limit - own_memory()))


def fits_in_memory(size: int) -> bool:
    """Return whether so many bytes of one kind of data may lie in memory."""
    return size <= SPILL_SHARE * free_memory()


def own_memory() -> int:
    """Return the bytes of this process that no file backs: the system can't drop them."""
    return _held_by(psutil.Process())


def _held_by(process: psutil.Process) -> int:
    info = process.memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def free_on_machine() -> int:
    """Return the bytes that are free and that no other run will take: in a control group, of its own limit."""
    free = int(psutil.virtual_memory().available)
    for folder, controller in _own_groups():
        limit, usage, prefix = _GROUP_FILES[controller]
        try:
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            pages = sum(int(counts[f"{prefix}{name}_file"]) for name in ("active", "inactive"))  # can be dropped
        except (OSError, ValueError, KeyError):  # no such group, or "max"
            continue
        free = min(free, most - used + pages)
    return max(0, free - sum(reserved_by_others().values()))


def _own_groups() -> Iterator[tuple[Path, str]]:
    """Yield the folders of this process's control groups that limit memory, with their controller ("" of version 2)."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in set(controllers.split(",")) & set(_GROUP_FILES):
            mount = _GROUPS / controller
            yield mount / path.lstrip("/"), controller
            yield mount, controller  # a container sees its own group as the root of all, under its outer path


def release_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Give the pages of tensors that map a file back to the system; the next read takes them from the file again.

    No value changes: pages that were written to stay, and so do tensors in memory. Elsewhere than on Linux this does
    nothing, and the system drops the pages when it needs the room.
    """
    if sys.platform != "linux":
        return
    libc, mapped = ctypes.CDLL(None), _mapped_ranges()
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end <= _end_of_range(mapped, begin):
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_PAGEOUT)  # Linux 5.4; else refused


def release_weights(module: nn.Module) -> None:
    """Give the pages of a module's mapped weights back once nothing reads them soon; see [`release_pages`][]."""
    release_pages(parameter.detach() for parameter in module.parameters())


def mapped_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors on the CPU that files back; elsewhere than on Linux, of all tensors on the CPU.

    The system may drop those and read them again. All others count in [`own_memory`][] already.
    """
    mapped = _mapped_ranges() if sys.platform == "linux" else [(0, sys.maxsize)]
    return sum(
        tensor.nbytes
        for tensor in tensors
        if tensor.device.type == "cpu" and tensor.data_ptr() < _end_of_range(mapped, tensor.data_ptr())
    )


def _end_of_range(ranges: Sequence[tuple[int, int]], address: int) -> int:
    """Return where the last of some ascending ranges that begins at or before an address ends; 0: none does."""
    place = bisect_right(ranges, (address, sys.maxsize)) - 1
    return ranges[place][1] if place >= 0 else 0


def _mapped_ranges() -> list[tuple[int, int]]:
    """Return the (begin, end) addresses of this process that files back, ascending."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode = line.split(maxsplit=5)[:5]
        if inode != "0":
            begin, end = (int(address, 16) for address in addresses.split("-"))
            ranges.append((begin, end))
    return ranges
