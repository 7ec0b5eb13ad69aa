"""Options that are saved and loaded as the configs of transformers are."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from hf_context_prune.errors import ConfigError, SaveError

from .file_names import CONFIG_NAME, PLAN_NAME
from .files import resolve_path, write_file
from .hub_files import fetch_file
from .options import OptionSet
from .reading import read_json, why


class SavedOptions(OptionSet):
    """Options with a file of their own."""

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write the options to ``pruner_config.json`` in a folder, which is made if it does not exist.

        Args:
            directory: The folder.

        Returns:
            Path of the file.

        Raises:
            SaveError: The file can't be written.
        """
        folder = resolve_path(directory, SaveError)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(f"{folder} can't be created: {error.strerror or error}. Choose another folder.") from error
        write_file(folder / CONFIG_NAME, self.to_json_string())
        return folder / CONFIG_NAME

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Self:
        """Read the options from a folder or Hub repository: its ``pruner_config.json``, else those of its plan.

        Args:
            source: A folder of `save_pretrained`, a pruned folder, or the Hub id of one.
            revision: Branch, tag or commit of the repository.

        Returns:
            The options.

        Raises:
            ConfigError: There is neither file, it can't be read, or an option is unknown.
        """
        for name in (CONFIG_NAME, PLAN_NAME):
            if (path := fetch_file(source, name, revision)) is None:
                continue
            try:
                values = read_json(path)
                return cls.from_dict(values if name == CONFIG_NAME else values["provenance"]["config"])
            except (OSError, ValueError, LookupError, TypeError) as error:
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(f"{name} of {source} holds no options: {why(error)}.") from error
        raise ConfigError(
            f"{source} has neither {CONFIG_NAME} nor {PLAN_NAME}. Name a folder that save_pretrained wrote, a pruned "
            f"folder, or the Hub id of one."
        )
