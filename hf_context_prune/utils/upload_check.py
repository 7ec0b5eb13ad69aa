"""The files of a model or a Space that may leave this machine, checked before every upload."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from hf_context_prune.errors import PublishError

from .file_names import EXPORT_REPORT_NAME, MANIFEST_NAME, MODELFILE_NAME, PROCESSOR_FILES
from .foreign_code import refuse_foreign_code
from .links import list_inside
from .secret_scan import refuse_tokens

RepoType = Literal["model", "space"]
MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "*.model", *PROCESSOR_FILES),
    "additional_chat_templates/*.jinja",
    *("configuration_context_pruned.py", "geometry.py", "modeling_context_pruned.py"),
    *("moe_specs.py", "registered.py", "spec_parts.py", "specs.py", "weights_header.py", "wrapper_specs.py"),
    *("pruning_plan.json", "eval_report.json", MANIFEST_NAME, "README.md", "widths.png", ".eval_results/*.yaml"),
    *("*.gguf", MODELFILE_NAME, "*.onnx", "*.onnx.data", "export.json", "quanto_qmap.json", EXPORT_REPORT_NAME),
)
"""Files that may go to a model repository; ``*`` does not match across folders."""
SPACE_SUFFIXES = frozenset({".py", ".md", ".txt", ".yaml", ".json", ".css", ".png", ".whl"})
"""Suffixes of files that may go to a Space: text, pictures and the wheel of this package."""
NOTHING_UPLOADED = "Nothing was uploaded. Put the file itself there, or remove it."
"""Remedy for a file that leads out of a folder."""


def refuse_upload(folder: str | Path, token: str | None = None) -> None:
    """Refuse to upload a folder that a model's own ``push_to_hub`` wrote, if a file is not allowed or holds a token.

    Raises:
        PublishError: A file may not be uploaded, leads out of the folder, or names code of others; the message names
            the file and the reason.
    """
    path = Path(folder)
    names = list_inside(path, PublishError, remedy=NOTHING_UPLOADED)
    refused = [name for name in names if not is_allowed(name, "model")]
    if refused:
        raise PublishError(
            f"The saved model holds {', '.join(refused[:5])}, which may not go to a model repository. Nothing was "
            f"uploaded."
        )
    refuse_foreign_code(path, PublishError)
    refuse_tokens(path, names, token)


def is_allowed(name: str, repo_type: RepoType) -> bool:
    """Return whether a file with this relative path may go to a repository."""
    if repo_type == "space":
        return Path(name).suffix.lower() in SPACE_SUFFIXES
    return any(matches_pattern(name, pattern) for pattern in MODEL_FILES)


def matches_pattern(name: str, pattern: str) -> bool:
    """Return whether a relative path matches a pattern; ``*`` does not match across folders."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
