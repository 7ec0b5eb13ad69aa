"""The wheel of this package, made from the installed one: from an index, a checkout, or in editable mode."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from hf_context_prune.errors import SaveError
from hf_context_prune.utils.links import resolve_inside
from hf_context_prune.utils.version import install_command

_DISTRIBUTION = "hf-context-prune"
_PACKAGE = "hf_context_prune"
_SUFFIXES = {".py", ".typed", ".jinja", ".css"}  # of the package; an editor may have left other files
_EPOCH = (1980, 1, 1, 0, 0, 0)  # so that one package always gives the same bytes
_WHEEL = "Wheel-Version: 1.0\nGenerator: hf-context-prune\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder: Path) -> Path:
    """Pack the installed package as a wheel.

    Args:
        folder: Folder to write to.

    Returns:
        Path of the wheel.

    Raises:
        SaveError: The package is not installed (only on the path), so its metadata is not known.
    """
    installed = _installed()
    stem = f"{_PACKAGE}-{installed.version}"
    content: dict[str, bytes] = {}
    root = Path(str(files(_PACKAGE)))
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.is_file() and path.suffix in _SUFFIXES:
            real = resolve_inside(root, relative.as_posix(), SaveError)
            content[f"{_PACKAGE}/{relative.as_posix()}"] = real.read_bytes()
    for name in ("METADATA", "entry_points.txt", "licenses/LICENSE"):
        text = installed.read_text(name)
        if text is not None:
            content[f"{stem}.dist-info/{name}"] = text.encode()
    content[f"{stem}.dist-info/WHEEL"] = _WHEEL.encode()
    record = f"{stem}.dist-info/RECORD"
    lines = [f"{name},sha256={_digest(raw)},{len(raw)}" for name, raw in content.items()]
    content[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, raw in content.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), raw, zipfile.ZIP_DEFLATED)
    return wheel


def pin_requirements() -> list[str]:
    """Return the requirements of a Space, each at the version that is installed here.

    Raises:
        SaveError: This package or a requirement is not installed.
    """
    pinned = {}
    for text in _installed().requires or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "space"}):
            continue
        try:
            version = Version(metadata.version(requirement.name))
        except metadata.PackageNotFoundError as error:
            raise SaveError(
                f"A Space pins the versions that are installed here, but {requirement.name} is not installed: "
                f"{install_command('space')}."
            ) from error
        pinned[requirement.name.lower()] = f"{requirement.name}=={version.public}"  # without a local part such as +cpu
    return [pinned[name] for name in sorted(pinned)]


def _installed() -> metadata.Distribution:
    try:
        return metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise SaveError(f"{_DISTRIBUTION} is not installed. Install it: {install_command('space')}.") from error


def _digest(raw: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()
