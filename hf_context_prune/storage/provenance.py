"""The facts that a base model states about itself (licence, language, id): copied when pruned, never invented."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_context_prune.config import THRESHOLDS, PrunerConfig, ThresholdConfig, build_config
from hf_context_prune.errors import LoadError
from hf_context_prune.modeling.inference import dtype_name
from hf_context_prune.utils.links import resolve_inside
from hf_context_prune.utils.reading import parse_yaml, read_text

from .known_models import SMOLLM2
from .loading import LoadedModel
from .manifest import hash_file

_FIELDS = ("license", "license_name", "license_link", "language", "pipeline_tag")
_IN_GGUF = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}
_RENAMED = {"stock": "native_architecture", "vocab_multiple": "pad_to_multiple_of", "general_mix": "general_data_ratio"}
"""Options of earlier plans, with their names of today."""
_LONGEST = 300
_MAX_CARD_BYTES = 4 * 2**20


def read_base_card(base: LoadedModel) -> dict[str, Any]:
    """Read the facts of a base model that the card of the pruned model repeats.

    They come from the ``README.md`` in the model's folder or on the Hub, or from the header of its GGUF file.

    Args:
        base: The base model.

    Returns:
        ``license``, ``license_name``, ``license_link``, ``language``, ``pipeline_tag`` and ``id``, each only if it is
        stated; ``stated_by`` says where, or ``unknown`` why nothing could be read.
    """
    if base.source is not None and base.source.is_file():
        return _read_gguf_header(base.source)
    if base.source is not None:
        return _read_readme_in(base.source)
    if base.revision is None and "/" not in base.name:
        return {"unknown": "it was given in memory"}
    try:
        file = hf_hub_download(base.name, "README.md", revision=base.revision)
    except HFValidationError:
        return {"unknown": "it was given in memory"}
    except (OSError, ValueError, HTTPError):  # no card, no network, gated, ...
        return {"id": base.name, "unknown": "its model card could not be read"}
    return {"id": base.name, **_read_readme(Path(file), "its model card")}


def collect_provenance(base: LoadedModel) -> dict[str, Any]:
    """Return the entries of a plan's provenance that describe the base model."""
    return {
        "base_model": base.name,
        "base_revision": base.revision,
        "base_dtype": dtype_name(base.model),
        "base_card": read_base_card(base),
    }


def _read_readme_in(folder: Path) -> dict[str, Any]:
    if not (folder / "README.md").is_file():
        return {"unknown": "there is no README.md in its folder"}
    try:
        file = resolve_inside(folder, "README.md")
    except LoadError:
        return {"unknown": "the README.md in its folder leads out of the folder"}
    return _read_readme(file, "the README.md in its folder")


def _read_readme(file: Path, where: str) -> dict[str, Any]:
    try:
        block = REGEX_YAML_BLOCK.search(read_text(file, _MAX_CARD_BYTES))
        values = (parse_yaml(block[2]) if block else None) or {}
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        return {"unknown": f"{where} can't be read"}
    return {**_select_plain_values(values), "stated_by": where}


def _read_gguf_header(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    if hash_file(file) == SMOLLM2["sha256"]:
        return {name: value for name, value in SMOLLM2.items() if name != "sha256"}
    try:
        fields = GGUFReader(file).fields
        values = {ours: fields[theirs].contents() for ours, theirs in _IN_GGUF.items() if theirs in fields}
    except (OSError, ValueError, KeyError, IndexError) as error:
        return {"unknown": f"the header of its GGUF file can't be read ({type(error).__name__})"}
    return {**_select_plain_values(values), "stated_by": "the header of its GGUF file"}


def _select_plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields whose value is a short string or a list of at most 50 of them."""
    found = {}
    for name in _FIELDS:
        value = values.get(name)
        items = value if isinstance(value, list) else [value]
        if items and len(items) <= 50 and all(isinstance(item, str) and 0 < len(item) <= _LONGEST for item in items):
            found[name] = value
    return found


def config_from_provenance(values: Mapping[str, Any]) -> PrunerConfig | ThresholdConfig:
    """Build the config that a pruning plan was made with, also from the options of earlier plans.

    Args:
        values: ``provenance["config"]`` of a plan.

    Raises:
        ConfigError: An unknown key or value, or a combination that is no longer possible.
    """
    values = {_RENAMED.get(name, name): value for name, value in values.items()}
    if values.pop("vocab_auto", False):
        values["vocab_size"] = "auto"
    if "effort" in values:
        values["refit_lm_head"] = values.pop("effort") == "high"
    if any(values.get(name) is not None for name in THRESHOLDS):
        left_open = {item.name: item.default for item in fields(PrunerConfig)}
        # What was written with thresholds.
        left_open |= {"criterion": "l1", "reconstruction": "none", "allocation": "uniform", "refit_lm_head": False}
        left_open |= {"native_architecture": False}
        values = {name: value for name, value in values.items() if name not in left_open or value != left_open[name]}
    elif "units" not in values:
        _fill_in_units(values)
    return build_config(values)


def _fill_in_units(values: dict[str, Any]) -> None:
    """Say what an earlier plan left open: tokens took part in a budget, and rows were refitted, only if asked."""
    sizes = ("vocab_size", "vocab_coverage", "vocab_min_count")
    asked = any(values.get(name) is not None for name in sizes)
    if values.get("vocab_size") == "auto":
        values["vocab_size"] = None
    if asked:
        if not values.get("refit_lm_head"):
            values["refit_lm_head"] = None  # the rows were refitted, before the layers
        return
    found = build_config(values)
    if isinstance(found, PrunerConfig) and found.shares_budget:
        values["units"] = "neurons,kv_groups"
