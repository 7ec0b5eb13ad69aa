"""The sha256 manifest of a saved folder: written last, so that a folder with a manifest is whole.

The manifest guards against damage and half-finished copies. It is not a signature: whoever can write the folder can
write the manifest too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path, PureWindowsPath
from typing import Any

from hf_context_prune.errors import LoadError, SaveError
from hf_context_prune.utils.file_names import CARD_NAME, EXPORT_REPORT_NAME, MANIFEST_NAME, MODELFILE_NAME, PLAN_NAME
from hf_context_prune.utils.files import expand_home, open_regular
from hf_context_prune.utils.reading import MAX_JSON_BYTES, read_json

FORMAT = "hf_context_prune"
VERSION = 1
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
"""Files that run code when they are loaded. None is ever written, and none may lie beside the weights."""

EDITABLE = frozenset({CARD_NAME, MODELFILE_NAME})
"""Files that people edit and no code loads: a folder in which only these changed is still whole."""

_WEIGHT_SUFFIXES = frozenset({".safetensors"})
_CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".whl"})
_LISTED_SUFFIXES = _WEIGHT_SUFFIXES | PICKLE_SUFFIXES | _CODE_SUFFIXES | {".jinja", ".model"}
_LISTED_NAMES = frozenset(
    {
        *("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "processor_config.json"),
        *("preprocessor_config.json", "video_preprocessor_config.json", "tekken.json", PLAN_NAME),
    }
)
"""What `transformers` reads of a folder by name; with the suffixes, all that it or Python would load or run."""
_OUR_MODEL_TYPE = "context_pruned_"  # as `PREFIX` in `modeling.specs`, whose package imports torch


def write_manifest(folder: Path) -> dict[str, Any]:
    """Make every file of a folder durable and write the manifest, last.

    Each file is read once: hashed and flushed (fsync) through the same handle. Files get the read and write
    permissions of new files in this place (`safetensors` makes its files readable only by their owner).

    Args:
        folder: The finished folder, without a manifest.

    Returns:
        The manifest: ``{"format": "hf_context_prune", "version": 1, "files": {path: {"sha256": str, "bytes": int}}}``.

    Raises:
        SaveError: The folder holds a link, a device or a file name that a manifest can't list.
        OSError: The disk is full, or a file can't be read or flushed.
    """
    # The folder was made with 0o777 minus the umask; the umask itself can't be read without changing it.
    permissions = stat.S_IMODE(folder.stat().st_mode) & 0o666
    files: dict[str, dict[str, Any]] = {}
    folders = []
    for root, folder_names, file_names in os.walk(folder):
        folders.append(Path(root))
        for name in [*folder_names, *file_names]:
            path = Path(root, name)
            relative, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode) or not _is_safe(relative) or relative == MANIFEST_NAME:
                raise SaveError(
                    f"{relative!r} can't be saved: only regular files with plain relative names (no link, no '..', "
                    f"backslash or drive) and other than {MANIFEST_NAME} may be in a saved folder."
                )
            path.chmod(stat.S_IMODE(mode) | permissions)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
                files[relative] = {"sha256": digest, "bytes": os.fstat(file.fileno()).st_size}
    manifest = {"format": FORMAT, "version": VERSION, "files": dict(sorted(files.items()))}
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for path in reversed(folders):
        fsync_folder(path)
    return manifest


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the entries of a folder durable; do nothing where the system or the file system has no such call.

    Raises:
        OSError: The disk failed.
    """
    if os.name == "nt":
        return  # a folder can't be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network and FUSE file systems
            raise
    finally:
        os.close(descriptor)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the manifest of a folder if this package wrote one, else None; do not compare it with the files.

    Args:
        folder: Any path.

    Returns:
        The manifest; None if the folder has no manifest, one of another program, or one that can't be read.
    """
    try:
        return _parse(Path(folder))
    except LoadError:
        return None


def verify_if_ours(folder: str | os.PathLike[str], *, hash_weights: bool = True) -> dict[str, Any] | None:
    """Check a folder as [`verify_folder`][] does if it claims to be of this package; leave any other folder unchecked.

    Args:
        folder: A folder that may be of this package.
        hash_weights: As for [`verify_folder`][].

    Returns:
        The manifest; None if the folder is of another program.

    Raises:
        LoadError: See [`verify_folder`][]: a manifest that is damaged or missing does not turn the check off.
    """
    return verify_folder(folder, hash_weights=hash_weights) if claims_to_be_ours(folder) else None


def claims_to_be_ours(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder claims to be of this package, whatever the state of its manifest.

    A folder does so by a manifest that names this package's format (also in a damaged one), by a pruning plan, by the
    report of an export, or by a model type of this package beside a ``manifest.json`` of any content. The
    ``manifest.json`` of another program alone says nothing.
    """
    folder = expand_home(folder, LoadError)
    if any(os.path.lexists(folder / name) for name in (PLAN_NAME, EXPORT_REPORT_NAME)):
        return True
    if not os.path.lexists(folder / MANIFEST_NAME):
        return False
    return _says(folder / MANIFEST_NAME, "format", FORMAT) or _says(
        folder / "config.json", "model_type", _OUR_MODEL_TYPE
    )


def _says(path: Path, field: str, start: str) -> bool:
    """Return whether a field of a JSON file has a value that begins so; in a damaged file the value may be anywhere."""
    try:
        values = read_json(path)
    except OSError:
        return False
    except ValueError:
        with open_regular(path) as file:
            return start.encode() in file.read(MAX_JSON_BYTES)
    return isinstance(values, dict) and str(values.get(field)).startswith(start)


def verify_folder(
    folder: str | os.PathLike[str], *, hash_weights: bool = True, allow_edits: bool = True
) -> dict[str, Any]:
    """Check a saved folder against its manifest, before anything in it is loaded.

    Args:
        folder: A folder saved by this package.
        hash_weights: False compares only the size of the ``*.safetensors`` files, which is instant. All other files
            are always hashed.
        allow_edits: Accept a card that was edited since; the card must still exist.

    Returns:
        The manifest.

    Raises:
        LoadError: The manifest is missing or malformed; a listed file is missing or has another size or checksum;
            or the folder holds a file that a loader would read or run and the manifest does not list, or a pickle,
            listed or not.
    """
    folder = expand_home(folder, LoadError)
    manifest = _parse(folder)
    remedy = "Save or download the model again."
    for name, entry in manifest["files"].items():
        if Path(name).suffix.lower() in PICKLE_SUFFIXES:
            raise LoadError(
                f"The manifest of {folder} lists {name}, but this package saves no pickles: the folder was changed by "
                f"another program. {remedy}"
            )
        path = folder / name
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if allow_edits and name in EDITABLE:
                    continue
                if size != entry["bytes"]:
                    raise LoadError(
                        f"{name} in {folder} has {size} bytes, but the manifest says {entry['bytes']}. {remedy}"
                    )
                if not hash_weights and path.suffix.lower() in _WEIGHT_SUFFIXES:
                    continue
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise LoadError(f"{name} is missing from {folder}, but the manifest lists it. {remedy}") from error
        except OSError as error:
            if isinstance(error, LoadError):
                raise
            raise LoadError(f"{name} in {folder} can't be read: {error.strerror}. {remedy}") from error
        if digest != entry["sha256"]:
            raise LoadError(
                f"{name} in {folder} has sha256 {digest}, but the manifest says {entry['sha256']}: it was changed or "
                f"damaged after it was saved. {remedy}"
            )
    for name in find_unlisted_files(folder, manifest):
        if _must_be_listed(Path(name)):
            raise LoadError(
                f"{name} in {folder} is not in the manifest. Weights, code, pickles, configs, templates and tokenizer "
                f"files that were not saved with the model are not loaded: remove that file, or save the model again."
            )
    return manifest


def _must_be_listed(path: Path) -> bool:
    """Return whether `transformers` or Python would read or run a file because it lies in the folder."""
    if path.suffix.lower() == ".pyc" and path.parent.name == "__pycache__":
        return False  # tools make them again, and Python runs none there without its source
    return path.suffix.lower() in _LISTED_SUFFIXES or path.name.lower() in _LISTED_NAMES


def find_unlisted_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the relative paths of files and links in a folder that its manifest does not list, sorted."""
    found = []
    for root, folder_names, file_names in os.walk(folder):
        links = [name for name in folder_names if Path(root, name).is_symlink()]
        found += [Path(root, name).relative_to(folder).as_posix() for name in [*links, *file_names]]
    return sorted(set(found) - set(manifest["files"]) - {MANIFEST_NAME})


def find_changed_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the listed files that are there and differ from the manifest, sorted; an edited card is none of them.

    Raises:
        OSError: A file can't be read.
    """
    found = []
    for name, entry in sorted(manifest["files"].items()):
        path = folder / name
        if name in EDITABLE or not os.path.lexists(path):
            continue
        same_size = stat.S_ISREG(path.lstat().st_mode) and path.stat().st_size == entry["bytes"]
        if not same_size or hash_file(path) != entry["sha256"]:
            found.append(name)
    return found


def _parse(folder: Path) -> dict[str, Any]:
    """Read and validate the manifest of a folder.

    Raises:
        LoadError: The manifest is missing or malformed.
    """
    path = folder / MANIFEST_NAME
    manifest: dict[str, Any]
    hint = "The folder was not saved by this package, or was copied in part: save or download the model again."
    if (folder / "training_args.bin").exists():
        hint = (
            "A Trainer saved it: write the model with callback.save_pretrained(folder), with its plan and card; "
            "load_checkpoint(folder) opens it in Python."
        )
    try:
        manifest = read_json(path)
        _validate(manifest)
    except OSError as error:
        raise LoadError(f"{folder} has no readable {MANIFEST_NAME} ({error.strerror}). {hint}") from error
    except ValueError as error:
        raise LoadError(f"{path} is not a manifest of this package: {error}. {hint}") from error
    return manifest


def _validate(manifest: object) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f'it must be an object with "format": "{FORMAT}"')
    version = manifest.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"its version is {version!r}, this release of hf_context_prune reads {VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ValueError('"files" must be an object')
    for name, entry in files.items():
        if not _is_safe(name):
            raise ValueError(f"{name!r} is not a plain relative path inside the folder")
        size = entry.get("bytes") if isinstance(entry, dict) else None
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f'{name!r} needs "sha256" (64 hex digits) and "bytes" (an integer from 0)')


def _is_safe(name: str) -> bool:
    """Return whether a path is relative, has ``/`` between its parts, and stays inside its folder on every system."""
    if "\\" in name or "\0" in name or PureWindowsPath(name).drive:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))
