"""The folder in which a run keeps finished work until it ends, and the key of the inputs that the work belongs to."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from hf_context_prune.errors import PruningWarning, SaveError
from hf_context_prune.modeling.layer_device import layer_device
from hf_context_prune.utils.compat import attention_implementation
from hf_context_prune.utils.distributed import digest_batches, is_main_process, num_processes, on_main_process
from hf_context_prune.utils.locks import hold_lock
from hf_context_prune.utils.precision import bfloat16_is_fast
from hf_context_prune.utils.tensor_facts import values_digest
from hf_context_prune.utils.version import __version__

from .cache import CACHE_VARIABLE, cache_dir
from .own_folders import MARKER, hold_own, is_empty, is_own, make_own, mark_own, remove_left, remove_own
from .staging import bytes_with_margin
from .write_errors import format_bytes

_FORGOTTEN_AFTER_DAYS = 7
_NAME = re.compile("[0-9a-f]{32}")


@contextmanager
def open_resume_folder(*identity: object) -> Iterator[Path | None]:
    """Open a folder of the cache for the finished work of a run; remove it at the end, but not if the run fails.

    Folders of other runs that nothing was written to for a week are removed as well. A folder that this package did not
    mark as its own (see `own_folders.py`) is neither used nor removed.

    Args:
        identity: Values that the same run has when it is started again: its output folder and its options.

    Yields:
        The folder; None if the cache can't be written, so that nothing is kept.

    Raises:
        SaveError: Another run with this identity is at work.

    Warns:
        PruningWarning: The cache can't be written.
    """
    root = cache_dir() / "unfinished"
    folder = root / hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    with ExitStack() as held:

        def begin() -> str:
            held.enter_context(hold_lock(folder, what="doing the same"))
            try:
                root.mkdir(parents=True, exist_ok=True)
                _open(folder)
                held.enter_context(hold_own(folder))
            except BlockingIOError as error:  # its lock is in another temporary folder
                raise SaveError(
                    f"Another run is doing the same, and keeps its finished work in {folder}: wait for it to end, or "
                    f"choose another --output."
                ) from error
            except OSError as error:
                return str(error)
            for other in root.iterdir():
                if other != folder and _NAME.fullmatch(other.name):
                    _forget_old(other)
            return ""

        if reason := on_main_process(begin):
            warnings.warn(
                f"Finished work can't be kept in {root} ({reason}), so this run would start from the beginning if it "
                f"were killed. Set {CACHE_VARIABLE} to a writable folder.",
                PruningWarning,
                stacklevel=3,
            )
            yield None
            return
        try:
            yield folder
        except BaseException:
            if is_main_process():
                with suppress(OSError):
                    if {path.name for path in folder.rglob("*") if not path.is_dir()} == {MARKER}:  # nothing finished
                        remove_own(folder, held)
            raise
        if is_main_process():
            with suppress(OSError):  # what stays is forgotten later
                remove_own(folder, held)


def _open(folder: Path) -> None:
    """Make the folder, or open the one that an earlier run left.

    Raises:
        OSError: It can't be written, or is not of this package.
    """
    if not os.path.lexists(folder):
        make_own(folder)
    elif not is_own(folder):
        raise OSError(f"{folder} is not a folder of this package")
    elif is_empty(folder):
        mark_own(folder)
    elif not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder} can't be written by this user")


def _forget_old(folder: Path) -> None:
    """Remove a folder that this package made and no run wrote to for a week, unless a run is at work in it."""
    with suppress(OSError, SaveError):  # another run may be removing it
        newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
        if time.time() - newest > _FORGOTTEN_AFTER_DAYS * 86_400 and is_own(folder):
            with hold_lock(folder):
                remove_left(folder)


def has_room(folder: Path, required_bytes: int, *, what: str) -> bool:
    """Return whether the disk of a resume folder has room for further work of a run, which is else not kept.

    Args:
        folder: The folder.
        required_bytes: Bytes that the work may take.
        what: The work, for the warning: "The pruned model".

    Warns:
        PruningWarning: There is no room.
    """
    needed, free = bytes_with_margin(required_bytes), shutil.disk_usage(folder).free
    if free >= needed:
        return True
    warnings.warn(
        f"{what} can't be kept in {folder}: that needs {format_bytes(needed)}, and {format_bytes(free)} are free. If "
        f"this run is killed, the same command starts again. Make room there, or set {CACHE_VARIABLE} to another "
        f"folder.",
        PruningWarning,
        stacklevel=2,
    )
    return False


def resume_key(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]], *options: object) -> str:
    """Return a hash of all that decides a result: every weight, the config, the text, the options, the libraries.

    [`fingerprint`][] is not enough: it reads only a sample of the weights, and does not depend on the dtype.

    Args:
        model: The base model; all its values are read.
        batches: The text.
        options: All other values that decide the result; their `repr` counts.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(repr(options).encode())
    config = model.config
    digest.update(f"{config.to_json_string()} {attention_implementation(config)}".encode())
    # With other threads or processes sums round differently, and other versions may compute differently.
    versions = (__version__, torch.__version__, transformers.__version__)
    computes = (*versions, torch.get_num_threads(), num_processes(), bfloat16_is_fast(model.device), os.name)
    digest.update(f"{computes} {layer_device(model).type}".encode())
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(values_digest(value))
    digest.update(digest_batches(batches).encode())
    return digest.hexdigest()
