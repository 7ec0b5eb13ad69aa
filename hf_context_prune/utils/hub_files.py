"""A small file of a folder or of a repository of the Hub."""

from __future__ import annotations

from pathlib import Path

from hf_context_prune.errors import ConfigError

from .files import expand_home


def fetch_file(source: str | Path, name: str, revision: str | None = None) -> Path | None:
    """Return the path of a file in a folder, or in a repository of the Hub after fetching it; None if it has none.

    Args:
        source: The folder, or the id of the repository.
        name: Name of the file.
        revision: Branch, tag or commit of the repository.

    Raises:
        ConfigError: There is no such folder, and the repository can't be read.
    """
    folder = expand_home(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download  # not needed for the help of the command line
    from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError

    from .hub_ids import is_hub_id

    if not is_hub_id(str(source)):
        raise ConfigError(f"{source} is neither a folder nor the id of a repository (owner/name).")

    try:
        return Path(hf_hub_download(str(source), name, revision=revision))
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError, HTTPError) as error:
        raise ConfigError(f"{source} can't be read on the Hub ({error}).") from error
