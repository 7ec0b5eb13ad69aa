"""What a killed run goes on from: where it lies while a run is at work, and the key that says whose work it is."""

from __future__ import annotations

import hashlib
import os
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

from hf_context_prune.errors import PruningWarning
from hf_context_prune.utils.distributed import digest_batches, is_main_process, num_processes, on_main_process
from hf_context_prune.utils.precision import bfloat16_is_fast
from hf_context_prune.utils.version import __version__

from .cache import CACHE_VARIABLE, cache_dir
from .files import hold_lock

_FORGOTTEN_AFTER_DAYS = 7


@contextmanager
def open_resume_folder(*identity: object) -> Iterator[Path | None]:
    """A folder of the cache for what a run has finished so far; it goes once the work is done, and not if it fails.

    Folders of runs that nobody took up for a week go as well.

    Args:
        identity: What the same run, started again, has in common with this one, its output above all.

    Yields:
        The folder; None where the cache can't be written, so that nothing is kept.

    Raises:
        SaveError: Another run of this identity is at work.

    Warns:
        PruningWarning: The cache can't be written.
    """
    root = cache_dir() / "unfinished"
    folder = root / hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    with ExitStack() as held:

        def begin() -> str:
            held.enter_context(hold_lock(folder, what="doing the same"))
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ".writable").touch()
                (folder / ".writable").unlink()
            except OSError as error:
                return str(error)
            for other in root.iterdir():
                if other != folder:
                    _forget_old(other)
            return ""

        if reason := on_main_process(begin):
            warnings.warn(
                f"What this run finishes can't be kept in {root} ({reason}), so if it is killed, it starts anew. Set "
                f"{CACHE_VARIABLE} to a folder that can be written.",
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
                    folder.rmdir()  # nothing was finished
            raise
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)


def _forget_old(folder: Path) -> None:
    with suppress(OSError):  # another run may be removing it
        newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        if time.time() - newest > _FORGOTTEN_AFTER_DAYS * 86_400:
            shutil.rmtree(folder, ignore_errors=True)


def resume_key(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]], *options: object) -> str:
    """A hash of all that decides a result: every weight, the config, the text, the options, and what computes.

    `plan.fingerprint` is no such thing: it samples the weights, and does not tell a dtype from another.

    Args:
        model: The dense model; all its values are read.
        batches: The text.
        options: Whatever else decides the result; their `repr` counts.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(repr(options).encode())
    config = model.config
    digest.update(f"{config.to_json_string()} {getattr(config, '_attn_implementation', None)}".encode())
    # Sums may round otherwise, and another version may follow another rule.
    versions = (__version__, torch.__version__, transformers.__version__)
    computes = (*versions, torch.get_num_threads(), num_processes(), bfloat16_is_fast(model.device), os.name)
    digest.update(f"{computes} {model.device.type}".encode())
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(digest_batches(batches).encode())
    return digest.hexdigest()
