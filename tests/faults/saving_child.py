"""Run by test_saving_faults.py: saves a folder and stops at a named point, or runs into a file-size limit.

Usage: saving_child.py kill TARGET POINT | limit TARGET WRITER. It imports no torch, so it starts fast.
"""

import os
import resource
import shutil
import signal
import sys
import typing
from pathlib import Path

from hf_context_prune.errors import SaveError
from hf_context_prune.storage import staging

FILES = {"config.json": b"{}", "model.safetensors": b"new" * 1000, "sub/vocab.txt": b"new"}
LIMIT = 64 * 1024


def stop() -> None:
    """Tell the parent, then wait for its SIGKILL."""
    os.write(1, b"ready\n")
    while True:
        signal.pause()


def write(folder: Path, *, stop_after_first: bool = False) -> None:
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        if stop_after_first:
            stop()


def on_call(owner: object, name: str, number: int, *, after: bool = False) -> None:
    """Stop at the numbered call (from 1) of a function, before or after it does its work."""
    real, calls = getattr(owner, name), 0

    def hooked(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            stop()
        result = real(*args, **kwargs)
        if calls == number and after:
            stop()
        return result

    setattr(owner, name, hooked)


def arm(point: str) -> None:
    if point.startswith("two-renames"):
        staging._exchange = lambda first, second: False
    match point:
        case "before-staging":
            on_call(shutil, "disk_usage", 1)
        case "before-manifest":
            on_call(os, "fsync", len(FILES))
        case "manifest-not-flushed":
            on_call(os, "fsync", len(FILES) + 1)
        case "before-rename":
            on_call(staging, "_put_in_place", 1)
        case "placed":
            on_call(staging, "_put_in_place", 1, after=True)
        case "two-renames-between":
            on_call(os, "rename", 1, after=True)
        case "two-renames-placed":
            on_call(os, "rename", 2, after=True)
        case "not-marked":
            on_call(Path, "touch", 1)
        case "marked":
            on_call(Path, "touch", 1, after=True)
        case "removing-older":
            on_call(shutil, "rmtree", 1)
        case "two-renames-removing-older":
            on_call(staging, "remove_folder", 1)
        case "two-renames-removed-in-part":
            on_call(os, "unlink", 2)
        case "older-removed":
            on_call(shutil, "rmtree", 1, after=True)
        case "unmarked":
            on_call(os, "rmdir", 1)
        case "first-file" | "done":
            pass
        case _:
            raise ValueError(point)


def kill(target: str, point: str) -> None:
    arm(point)
    with staging.staged_folder(target, required_bytes=0) as folder:
        write(folder, stop_after_first=point == "first-file")
    assert not {"torch", "transformers"} & set(sys.modules), "saving must not import them"
    if point == "done":
        stop()


def limit(target: str, writer: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    try:
        with staging.staged_folder(target, required_bytes=0) as folder:
            (folder / "config.json").write_bytes(b"{}")
            if writer == "python":
                (folder / "vocab.txt").write_bytes(b"0" * (LIMIT + 1))
            elif writer == "copy":
                shutil.copyfile(typing.__file__, folder / "modeling.py")
            elif writer == "numpy":
                import numpy

                numpy.zeros(2 * LIMIT, dtype=numpy.uint8).tofile(folder / "model.gguf")
            elif writer == "safetensors":
                import numpy
                from safetensors.numpy import save_file

                save_file({"weight": numpy.zeros(LIMIT, dtype=numpy.uint8)}, folder / "model.safetensors")
            else:
                from tokenizers import Tokenizer, models

                vocab = {f"a_long_token_to_fill_the_file_{i}": i for i in range(5000)}
                Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(folder / "tokenizer.json"))
    except SaveError as error:
        os.write(1, str(error).encode())


if __name__ == "__main__":
    {"kill": kill, "limit": limit}[sys.argv[1]](*sys.argv[2:])
