"""A pruned folder -> an OpenAI-compatible API, by `transformers serve`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_context_prune.errors import ConfigError, LoadError
from hf_context_prune.export.report import ExportReport
from hf_context_prune.modeling.registry import expose_classes
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.model_config import read_config
from hf_context_prune.utils.file_names import EXPORT_REPORT_NAME
from hf_context_prune.utils.version import install_command

_PACKAGES = ("fastapi", "openai", "pydantic", "uvicorn")


def serve(folder: Path, arguments: Sequence[str] = ()) -> None:
    """Serve a folder with `transformers serve`, which alone finds the classes of native widths only.

    Args:
        folder: A pruned folder, or its export to torchao.
        arguments: Options of `transformers serve`.

    Raises:
        ConfigError: A package is missing, or the folder is an export that transformers can't read.
        LoadError: The folder is damaged.
    """
    check_is_folder(folder)
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"Serving needs {', '.join(missing)}: {install_command('serving')}.")
    from transformers.cli.transformers import main

    if EXPORT_REPORT_NAME in verify_folder(folder)["files"]:
        report = ExportReport.load(folder / EXPORT_REPORT_NAME)
        if report.format != "torchao":  # transformers would draw the weights that it does not find at random
            raise ConfigError(
                f"{folder} is an export to {report.format}, which transformers can't serve. Serve the folder that it "
                f"was made from ({report.source}), or an export to torchao."
            )
    else:
        read_config(str(folder), folder, None)  # registers the entry that a folder brings along
    expose_classes()
    sys.argv = ["transformers", "serve", str(folder), *arguments]
    main()


def check_is_folder(folder: Path) -> None:
    """Refuse what is no local folder.

    Raises:
        LoadError: There is no such folder.
    """
    if not folder.is_dir():
        if str(folder).startswith("-"):
            raise LoadError(
                f"{folder} stands where the folder should: `hf-context-prune serve DIR`, and all options after it."
            )
        raise LoadError(
            f"There is no folder {folder}. `serve` takes a local pruned folder; download one from the Hub first "
            f"(hf download OWNER/NAME --local-dir DIR)."
        )
